"""What LanguageModelConfig fills in, and what it refuses."""

import math

import numpy as np
import pytest

from tilescan.models import LanguageModelConfig, RopeScaling
from tilescan.models.blocks import make_mixer
from tilescan.ops import masks


def config(**fields):
    return LanguageModelConfig(**(dict(vocab_size=10, d_model=64, n_heads=4) | fields))


def test_defaults_follow_from_the_width():
    c = config()
    assert (c.n_kv_heads, c.head_dim, c.mlp_dim, c.n_blocks) == (4, 16, 192, 12)
    assert config(mlp="gelu").mlp_dim == 256


def seen(block, options=None, **fields):
    mixers = {} if options is None else {block: options}
    return make_mixer(config(pattern=(block, "mlp"), mixers=mixers, **fields), block).sees


def test_what_attention_sees_follows_from_its_options():
    assert seen("attention") == masks.Causal()
    assert seen("attention", causal=False) == masks.Full()
    assert seen("attention", {"causal": False}) == masks.Full()
    assert seen("attention", {"mask": masks.Prefix(3)}) == masks.Prefix(3)
    assert seen("local_attention:5") == masks.SlidingWindow(4, 0)
    assert seen("local_attention", {"window": 5}) == masks.SlidingWindow(4, 0)
    assert seen("local_attention:5", causal=False) == masks.SlidingWindow(4, 4)
    assert seen("local_attention:5", {"sinks": 2}) == masks.Lambda(2, 5)
    within = seen("local_attention:5", {"mask": masks.Prefix(3)})
    assert within == masks.Prefix(3) & masks.SlidingWindow(4, 0)


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


def local(**options):
    return dict(pattern=("local_attention",), mixers={"local_attention": options})


def attending(**options):
    return dict(mixers={"attention": options})


IDS = np.ones((1, 4), np.int32)


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
        (dict(pattern=("local_attention",)), "needs window, e.g. 'local_attention:256'"),
        (local(window=0), "'local_attention', window=0 must be at least 1"),
        (dict(pattern=("local_attention:0",)), "'local_attention:0', window=0 must be at least 1"),
        (local(window=3, sinks=-1), "sinks=-1 must be 0 or more"),
        (local(window=3, sinks=1, causal=False), "sinks=1 needs causal=True"),
        (dict(pattern=("attention:",)), "'attention:' in pattern has no variant after the colon"),
        (attending(mask="causal"), "attention.mask must be .*Mask | None, got 'causal'"),
        (attending(mask=masks.Segments(IDS)), "mask can't hold Segments"),
        (attending(n_heads=5), "of 'attention', n_heads=5 does not divide d_model=64"),
        (attending(n_kv_heads=3), "of 'attention', n_kv_heads=3 must divide n_heads=4"),
        (attending(head_dim=7), "of 'attention', .*head_dim=7 is odd"),
        (attending(position="learned"), "of 'attention', position is 'learned', which is unknown"),
        (dict(mixers={"mlp": {"kind": "swigloo"}}), "of 'mlp', kind is 'swigloo'.*mean 'swiglu'"),
        (dict(attention_sequence_parallel="rnig"), "did you mean 'ring'"),
        (dict(attention_sequence_parallel="chain"), "attention_sequence_parallel is 'chain'"),
        (dict(scan_sequence_parallel="ring"), "scan_sequence_parallel is 'ring'"),
        (dict(dtype="int32"), "dtype='int32' is not a floating type"),
        (dict(dtype="float33"), "dtype='float33' is not a floating type"),
        (dict(repeats=0), "repeats=0 must be at least 1"),
        (dict(d_model="64"), "d_model='64' must be an integer"),
        (dict(d_model=math.nan), "d_model=nan must be an integer"),
        (dict(rope_theta=math.nan), "rope_theta=nan must be a finite number"),
        (dict(rope_scaling=dict(kind="yarn")), "'yarn' is unknown; it can be 'linear' or 'llama3'"),
    ],
)
def test_bad_values_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        config(**fields)


def test_a_block_has_the_models_fields_unless_it_has_its_own():
    c = config(
        pattern=("attention", "attention:small", "local_attention:8", "mlp", "mlp:wide"),
        qk_norm=True,
        attention_scale=0.5,
        mixers={
            "attention": {"rope_theta": 5.0, "logit_cap": 3.0},
            "attention:small": {"n_heads": 2, "rope_theta": 7.0, "position": "none"},
            "mlp:wide": {"dim": 7, "kind": "gelu"},
        },
    )
    made = {block: make_mixer(c, block) for block in c.pattern}
    heads = lambda m: (m.n_heads, m.n_kv_heads, m.head_dim)
    assert heads(made["attention"]) == heads(made["local_attention:8"]) == (4, 4, 16)
    assert heads(made["attention:small"]) == (2, 2, 32)
    assert [made[b].rope_theta for b in c.pattern[:3]] == [5.0, 7.0, 10000.0]
    assert [made[b].logit_cap for b in c.pattern[:3]] == [3.0, 3.0, None]
    assert [made[b].position for b in c.pattern[:3]] == ["rope", "none", "rope"]
    assert all(made[b].qk_norm and made[b].scale == 0.5 for b in c.pattern[:3])
    assert (made["mlp"].kind, made["mlp"].dim) == ("swiglu", 192)
    assert (made["mlp:wide"].kind, made["mlp:wide"].dim) == ("gelu", 7)
    assert config(mixers={"attention": {"n_kv_heads": None}}) == config()
