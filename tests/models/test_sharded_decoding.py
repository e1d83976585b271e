"""Decoding with a cache sharded along time over devices gives the logits of one device."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from tilescan.models import LanguageModel, LanguageModelConfig
from tilescan.training import sharding
from tilescan.training.collectives import collectives, sent_bytes
from tilescan.training.settings import MeshConfig

FIELDS = dict(
    vocab_size=32, d_model=16, repeats=1, n_heads=4, n_kv_heads=2, mlp_dim=32,
)  # fmt: skip
CASES = {
    "attention": (MeshConfig(data=2, sequence=4), dict(), False),
    "packed and sinks": (
        MeshConfig(data=1, sequence=8),
        dict(pattern=("local_attention:5",), mixers=dict(local_attention=dict(sinks=2))),
        True,
    ),
    "hybrid": (
        MeshConfig(data=1, sequence=4, tensor=2),
        dict(
            pattern=("attention", "mamba2"), mixers=dict(mamba2=dict(head_dim=4, state_dim=4))
        ),
        False,
    ),
    "alibi": (MeshConfig(data=2, sequence=4), dict(position="alibi"), False),
}  # fmt: skip
SLOW = {"hybrid", "alibi", "packed and sinks"}


def draw(model):
    """Random parameters."""
    shapes = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 1), np.int32)))
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda a: 0.3 * rng.standard_normal(a.shape).astype(a.dtype), shapes)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in CASES]
)
def test_logits_are_those_of_one_device(name):
    """A prompt, a few tokens at once, then tokens one by one, over the shards' borders.

    In the quick suite without the few: one program less.
    """
    ends = (12, 16, *range(17, 25)) if name in SLOW else (12, *range(13, 25))
    mesh, fields, packed = CASES[name]
    model = LanguageModel(LanguageModelConfig(**FIELDS | fields))
    rng, params = np.random.default_rng(0), draw(model)
    tokens = rng.integers(0, 32, (2, 24)).astype(np.int32)
    ids = np.sort(rng.integers(1, 4, (2, 24)), axis=1).astype(np.int32)

    def read(state, part, ids):
        more = dict(segment_ids=ids) if packed else {}
        return model.apply(params, part, state=state, **more)

    want, last = jax.jit(read)(model.init_state(2, 32), tokens, ids)
    with sharding.use(sharding.make_mesh(mesh)):
        step, state, got = jax.jit(read), model.init_state(2, 32), []
        for start, stop in itertools.pairwise((0, *ends)):
            logits, state = step(state, tokens[:, start:stop], ids[:, start:stop])
            got.append(logits)
    np.testing.assert_allclose(np.concatenate(got, axis=1), want, atol=2e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), state, last)


def test_a_step_sends_as_little_for_a_long_cache_as_for_a_short_one():
    model = LanguageModel(LanguageModelConfig(**FIELDS))
    token = jnp.zeros((1, 1), jnp.int32)
    params = draw(model)
    mesh = sharding.make_mesh(MeshConfig(data=1, sequence=8))

    def sent(max_len):
        state = jax.eval_shape(lambda: model.init_state(1, max_len))
        over_time = jax.sharding.NamedSharding(
            mesh, jax.sharding.PartitionSpec(None, None, "sequence")
        )
        state = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(
                a.shape, a.dtype, sharding=over_time if a.ndim > 2 else None
            ),
            state,
        )
        with sharding.use(mesh):
            step = jax.jit(lambda state: model.apply(params, token, state=state)[0])
            return sum(sent_bytes(collectives(step.lower(state).compile().as_text())).values())

    assert sent(1024) == sent(64) < 4096


def test_a_cache_that_devices_cannot_share_is_an_error():
    model = LanguageModel(LanguageModelConfig(**FIELDS))
    token = jnp.zeros((1, 1), jnp.int32)
    params = draw(model)
    with (
        sharding.use(sharding.make_mesh(MeshConfig(data=1, sequence=8))),
        pytest.raises(ValueError, match="max_len=30 can't be sharded .* use max_len=32"),
    ):
        jax.eval_shape(lambda: model.apply(params, token, state=model.init_state(1, 30)))
