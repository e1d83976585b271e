"""Configurations that were saved before a field moved: same model, same parameters, same logits."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict

from tilescan.models import LanguageModel, LanguageModelConfig
from tilescan.models.blocks import make_mixer
from tilescan.models.earlier_configs import current_fields
from tilescan.ops import masks
from tilescan.training.config import (
    ConfigError,
    as_dict,
    default_config,
    differing_keys,
    settings,
)

# "model" of a run's config.json as it was written then: every field, options of every mixer.
SAVED = json.loads("""{
  "vocab_size": 31, "d_model": 24, "pattern": ["local_attention", "mlp", "attention", "gla"],
  "repeats": 2, "input_features": null, "n_heads": 4, "n_kv_heads": 2, "head_dim": null,
  "causal": true, "mask": null, "window": 5, "sinks": 2, "position": "rope",
  "rope_theta": 10000.0, "rope_scaling": null, "qk_norm": false, "attention_scale": null,
  "attention_logit_cap": null, "attention_bias": false, "mlp": "swiglu", "mlp_dim": null,
  "mlp_bias": false, "norm": "rmsnorm", "norm_eps": 1e-05, "post_norm": false,
  "tie_embeddings": true, "embed_scale": null, "logit_scale": null, "logit_cap": null,
  "max_len": 1024, "remat": "none", "scan_layers": true, "attention_implementation": null,
  "sequence_parallel": "ulysses+chain", "sequence_balance": "contiguous",
  "mixers": {"gla": {"n_heads": 2, "gate_rank": 3}, "mamba2": {"state_dim": 64}}
}""")
# What that version's model gave for the parameters of `params_of` and these tokens.
TOKENS = jnp.asarray((np.arange(38) * 7 % 31).reshape(2, 19))
LOGITS = [
    [[0.19782872, -0.19177110, -0.10197289, -0.20366980],
     [0.20165974, 0.16633311, -0.21881342, -0.09373318]],
    [[0.06175303, -0.55560911, 0.17803696, -0.13876626],
     [0.04264298, -0.34740967, -0.08076832, -0.02302754]],
]  # fmt: skip
BLOCKS = ("local_attention_0", "mlp_1", "attention_2", "gla_3")


def params_of(model):
    shapes = jax.eval_shape(model.init, jax.random.key(0), TOKENS)["params"]
    shapes, rng = flatten_dict(nn.unbox(shapes), sep="/"), np.random.default_rng(0)
    drawn = {path: rng.normal(0, 0.3, shapes[path].shape) for path in sorted(shapes)}
    return unflatten_dict({k: jnp.asarray(v, jnp.float32) for k, v in drawn.items()}, sep="/")


def saved_run(**model):
    """A whole saved configuration, as JSON gives it back."""
    run = json.loads(json.dumps(as_dict(settings(default_config()))))
    return run | {"model": SAVED | model}


def test_a_saved_model_gives_the_logits_that_it_gave():
    model = LanguageModel(LanguageModelConfig(**current_fields(SAVED)))
    params = params_of(model)
    assert set(params["backbone"]["layers"]) == set(BLOCKS)
    logits, _ = model.apply({"params": params}, TOKENS)
    np.testing.assert_allclose(logits[:, [3, 18], :4], LOGITS, atol=2e-6)


def test_a_saved_configuration_is_read_as_what_it_meant():
    config = settings(ConfigDict(saved_run())).model_config(31)
    assert config == LanguageModelConfig(
        vocab_size=31,
        d_model=24,
        pattern=("local_attention", "mlp", "attention", "gla"),
        repeats=2,
        n_heads=4,
        n_kv_heads=2,
        mixers={
            "local_attention": {"window": 5, "sinks": 2},
            "gla": {"n_heads": 2, "gate_rank": 3},
        },
        attention_sequence_parallel="ulysses",
        scan_sequence_parallel="chain",
    )
    assert make_mixer(config, "attention").sequence_parallel == "ulysses"
    assert make_mixer(config, "gla").sequence_parallel == "chain"
    assert current_fields(current_fields(SAVED)) == current_fields(SAVED)


def test_a_run_of_then_is_continued_by_todays_configuration():
    today = default_config()
    today.model.update(d_model=24, repeats=2, n_heads=4, n_kv_heads=2, vocab_size=31)
    today.model.pattern, today.model.max_len = tuple(SAVED["pattern"]), 1024
    today.model.mixers.local_attention.update(window=5, sinks=2)
    today.model.mixers.gla.update(n_heads=2, gate_rank=3)
    ours = as_dict(settings(today))
    strategies = {"model.attention_sequence_parallel", "model.scan_sequence_parallel"}
    assert set(differing_keys(ours, saved_run())) == strategies
    differing = differing_keys(ours, saved_run(window=6))
    assert differing["model.mixers.local_attention.window"] == (5, 6)


@pytest.mark.parametrize(
    ("earlier", "now"),
    [
        (dict(window=3), dict(mixers={})),  # without a local attention it meant nothing
        (
            dict(window=3, sinks=0, pattern=["local_attention"]),
            dict(pattern=["local_attention"], mixers={"local_attention": {"window": 3}}),
        ),
        (
            dict(mask=masks.Prefix(3), mixers={}),
            dict(mixers={"attention": {"mask": masks.Prefix(3)}}),
        ),
        (
            dict(sequence_parallel="all_gather"),
            dict(
                mixers={},
                attention_sequence_parallel="all_gather",
                scan_sequence_parallel="all_gather",
            ),
        ),
        (dict(n_heads=4, unknown=3), dict(n_heads=4, unknown=3)),
        (
            dict(window=3, pattern="mlp", mixers={"gla": {"n_heads": 2}}),
            dict(pattern="mlp", mixers={}),
        ),
    ],
)
def test_fields_that_moved(earlier, now):
    assert current_fields(earlier) == now


def test_contradictions_are_named():
    with pytest.raises(ValueError, match="scan_sequence_parallel is 'log_step', but by its earlie"):
        current_fields(dict(sequence_parallel="chain", scan_sequence_parallel="log_step"))
    mixers = {"local_attention": {"window": 4}}
    with pytest.raises(ValueError, match="local_attention.window is 4, but by its earlier .* is 3"):
        current_fields(dict(window=3, pattern=["local_attention"], mixers=mixers))
    with pytest.raises(ConfigError, match="model: sequence_parallel='rnig' is unknown; did you me"):
        settings(ConfigDict(saved_run(sequence_parallel="rnig")))
