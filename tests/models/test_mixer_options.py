"""Options of mixers, on a mixer that is made up."""

import functools
import json
from typing import Any

import jax.numpy as jnp
import jax.random
import pytest
from flax import linen as nn
from ml_collections import ConfigDict

from tilescan.models import LanguageModel, LanguageModelConfig, blocks
from tilescan.models.mixers import MIXERS
from tilescan.training.config import (
    ConfigError,
    as_dict,
    default_config,
    known_keys,
    override,
    settings,
)


class Average(nn.Module):
    """A mixer with an option of each type: decays as numbers, no parameters."""

    d_model: int
    decay: float = 0.5
    state_dim: int = 4
    powers: tuple[int, ...] = (1, 2)
    limit: float | None = None
    gated: bool = True
    kind: str = "plain"
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, *, state=None, positions=None, segment_ids=None):
        y = self.decay * x
        return y, None if state is None else state + jnp.sum(y, 1)

    @nn.nowrap
    def init_state(self, batch, max_len):
        return jnp.zeros((batch, self.d_model), self.dtype)


@pytest.fixture(autouse=True)
def average(monkeypatch):
    monkeypatch.setitem(MIXERS, "average", Average)


def config(**mixers):
    return LanguageModelConfig(
        vocab_size=7, d_model=8, n_heads=2, pattern=("average", "mlp"), repeats=2, mixers=mixers
    )


def test_options_reach_the_module():
    mixer = blocks.make_mixer(config(average=dict(decay=0.25, powers=[3])), "average")
    assert (mixer.d_model, mixer.decay, mixer.powers, mixer.state_dim) == (8, 0.25, (3,), 4)
    model = LanguageModel(config(average=dict(decay=0.0)))
    tokens = jnp.arange(6).reshape(1, 6) % 7
    call = functools.partial(model.init_with_output, state=model.init_state(1, 6))
    (_, state), _ = jax.jit(call)(jax.random.key(0), tokens)
    assert state.layers[0].shape == (2, 1, 8) and not jnp.any(state.layers[0])


def test_configurations_that_say_the_same_are_equal():
    said = config(average=dict(state_dim=4, decay=0.5, limit=None, powers=[1, 2]))
    assert said == config() and hash(said) == hash(config())
    assert config(average=dict(state_dim=5)) != config()
    assert hash(config(average=dict(powers=[3]))) == hash(config(average=dict(powers=(3,))))


def test_a_variant_has_the_options_of_its_mixer_and_its_own():
    pattern = ("average", "average:b", "average:c")
    mixers = {
        "average:b": dict(decay=0.5, kind="other"),
        "average": dict(decay=0.25),
        "average:c": dict(decay=0.25),
    }
    c = LanguageModelConfig(vocab_size=7, d_model=8, pattern=pattern, mixers=mixers)
    made = [blocks.make_mixer(c, block) for block in pattern]
    assert [m.decay for m in made] == [0.25, 0.5, 0.25]
    assert [m.kind for m in made] == ["plain", "other", "plain"]
    assert c.mixers == {"average": {"decay": 0.25}, "average:b": {"decay": 0.5, "kind": "other"}}
    only = LanguageModelConfig(vocab_size=7, d_model=8, pattern=("average:b",), mixers=mixers | {
        "average:c": {}
    })  # fmt: skip
    assert blocks.make_mixer(only, "average:b").decay == 0.5


def test_a_name_says_a_window_once():
    options = {"local_attention:8": {"window": 9}}
    with pytest.raises(ValueError, match="window=9, but the name 'local_attention:8' says it"):
        LanguageModelConfig(vocab_size=7, pattern=("local_attention:8",), mixers=options)
    wide = {"local_attention": {"window": 9}, "local_attention:b": {"sinks": 2}}
    c = LanguageModelConfig(
        vocab_size=7, pattern=("local_attention:8", "local_attention:b"), mixers=wide
    )
    made = [blocks.make_mixer(c, block) for block in c.pattern]
    assert [(m.window, m.sinks) for m in made] == [(8, 0), (9, 2)]


@pytest.mark.parametrize(
    ("mixers", "message"),
    [
        (dict(avrage={}), "'avrage' is not a mixer; did you mean 'average'"),
        (dict(average=dict(state=3)), "'average' has no 'state'; did you mean 'state_dim'"),
        (dict(average=dict(dtype="int8")), "'average' has no 'dtype'"),
        (dict(average=dict(state_dim=4.0)), "average.state_dim must be int, got 4.0"),
        (dict(average=dict(state_dim=True)), "average.state_dim must be int, got True"),
        (dict(average=dict(limit="x")), r"average.limit must be float \| None, got 'x'"),
        (dict(average=dict(gated=1)), "average.gated must be bool, got 1"),
        (dict(average=3), "options of 'average' must be a mapping, got 3"),
        (
            dict(gla=dict(n_heads=2)),
            r"'gla' has options \(n_heads\), but is not in pattern: known: a",
        ),
        (
            {"average:b": dict(decay=0.1)},
            "'average:b' has options .*; did you mean|.*known: average",
        ),
        ({"avrage:b": dict(decay=0.1)}, "'avrage:b' is not a mixer; did you mean 'average'"),
    ],
)
def test_bad_options_are_named(mixers, message):
    with pytest.raises(ValueError, match=message):
        config(**mixers)


def test_a_configuration_has_a_section_per_mixer():
    c = default_config()
    c.model.pattern = ("average",)
    for assignment in (
        "--config.model.mixers.average.state_dim=64",
        "model.mixers.average.limit=3",
        "model.mixers.average.powers=(3,4)",
    ):
        override(c, assignment)
    assert "model.mixers.average.decay" in known_keys()
    model = settings(c).model_config(7)
    assert model.mixers == {"average": {"state_dim": 64, "limit": 3.0, "powers": (3, 4)}}
    text = ConfigDict(as_dict(settings(c)))
    assert settings(text) == settings(c)


def test_unknown_options_get_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'model.mixers.average.state_dim'"):
        override(default_config(), "model.mixers.average.state_din=3")
    with pytest.raises(ConfigError, match="model.mixers.average.gated must be of type bool"):
        override(default_config(), "model.mixers.average.gated=3")
    with pytest.raises(ConfigError, match="'model.mixers.average' is a section"):
        override(default_config(), "model.mixers.average=3")
    with pytest.raises(AttributeError, match='"state_dim" instead of "state_din"'):
        default_config().model.mixers.average.state_din = 3
    for bad, message in (
        (
            {"average": {"state_din": 3}},
            "'model.mixers.average.state_din'; did you mean 'model.mix",
        ),
        ({"average": 3}, "'model.mixers.average' is a section of the configuration, not 3"),
        ({"avrage": {}}, "unknown key 'model.mixers.avrage'; did you mean 'model.mixers.average'"),
    ):
        with pytest.raises(ConfigError, match=message):
            settings(ConfigDict({"model": {"mixers": bad}}))


def test_a_variant_gets_its_section_when_it_is_set():
    c = default_config()
    c.model.pattern = ("average", "average:b", "local_attention:8")
    for assignment in (
        "model.mixers.average.state_dim=5",
        "--config.model.mixers.average:b.decay=0.125",
        "model.mixers.local_attention:8.sinks=2",
        "model.mixers.local_attention:8.qk_norm=True",
    ):
        override(c, assignment)
    made = settings(c).model_config(7)
    assert made.mixers == {
        "average": {"state_dim": 5},
        "average:b": {"decay": 0.125},
        "local_attention:8": {"sinks": 2, "qk_norm": True},
    }
    assert settings(ConfigDict(json.loads(json.dumps(as_dict(settings(c)))))) == settings(c)
    for assignment, message in (
        ("model.mixers.average:b.decai=1", "did you mean 'model.mixers.average:b.decay'"),
        ("model.mixers.avrage:b.decay=1", "unknown key 'model.mixers.avrage:b.decay'; did you"),
        ("model.mixers.average:c.gated=3", "average:c.gated must be of type bool"),
    ):
        with pytest.raises(ConfigError, match=message):
            override(c, assignment)
    with c.unlocked():
        c.model.mixers["average:b"] = {"decai": 1.0}
    with pytest.raises(ConfigError, match="unknown key 'model.mixers.average:b.decai'; did you"):
        settings(c)
