"""What LanguageModelConfig fills in, and what it refuses."""

import pytest

from tilescan.models import LanguageModelConfig, RopeScaling
from tilescan.ops import masks


def config(**fields):
    return LanguageModelConfig(**(dict(vocab_size=10, d_model=64, n_heads=4) | fields))


def test_defaults_follow_from_the_width():
    c = config()
    assert (c.n_kv_heads, c.head_dim, c.mlp_dim, c.n_blocks) == (4, 16, 192, 12)
    assert config(mlp="gelu").mlp_dim == 256
    assert c.attention_mask == masks.Causal()
    assert config(causal=False).attention_mask == masks.Full()
    assert config(window=5).local_mask == masks.SlidingWindow(4, 0)
    assert config(window=5, causal=False).local_mask == masks.SlidingWindow(4, 4)
    assert config(window=5, sinks=2).local_mask == masks.Lambda(2, 5)


def test_plain_values_of_a_config_file_are_understood():
    c = config(
        pattern=["attention", "mlp"],
        dtype="bfloat16",
        rope_scaling=dict(kind="linear", factor=2.0),
    )
    assert c.pattern == ("attention", "mlp")
    assert c.dtype.name == "bfloat16"
    assert c.rope_scaling == RopeScaling("linear", 2.0)
    assert hash(c) == hash(config(dtype="bfloat16", rope_scaling=RopeScaling("linear", 2.0)))


@pytest.mark.parametrize(
    "fields,message",
    [
        (dict(pattern=("atention", "mlp")), "'atention'.*did you mean 'attention'"),
        (dict(pattern=()), "pattern is empty"),
        (dict(n_heads=5), "n_heads=5 does not divide d_model=64"),
        (dict(n_kv_heads=3), "n_kv_heads=3 must divide n_heads=4"),
        (dict(n_kv_heads=0), "n_kv_heads=0 must be at least 1"),
        (dict(head_dim=7), "head_dim=7 is odd"),
        (dict(position="ropes"), "did you mean 'rope'"),
        (dict(mlp="swigloo"), "did you mean 'swiglu'"),
        (dict(norm="rms"), "did you mean 'rmsnorm'"),
        (dict(remat="dot"), "did you mean 'dots'"),
        (dict(pattern=("local_attention",)), "needs window"),
        (dict(window=0), "window=0 must be at least 1"),
        (dict(sinks=-1), "sinks=-1 must be 0 or more"),
        (dict(sinks=1, causal=False), "sinks=1 needs causal=True"),
        (dict(mask="causal"), "mask must be a mask of ops.masks"),
        (dict(dtype="int32"), "dtype='int32' is no floating type"),
        (dict(dtype="float33"), "dtype='float33' is no floating type"),
        (dict(repeats=0), "repeats=0 must be at least 1"),
        (dict(rope_scaling=dict(kind="yarn")), "'yarn' is unknown; it can be 'linear' or 'llama3'"),
    ],
)
def test_bad_values_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        config(**fields)
