"""An empty batch is a batch; any other size of 0 is refused, by all ops in the same words."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from every_op import OPS, arrays
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from tilescan import ops
from tilescan.models import LanguageModel, LanguageModelConfig
from tilescan.ops import masks
from tilescan.ops.sequence_parallel import ATTENTION, convolutions, scans


def results_and_gradients(call, x):
    def loss(x):
        y = call(x)
        return sum(jnp.sum(jnp.cos(a)) for a in jax.tree.leaves(y)), y

    (_, y), gradients = jax.value_and_grad(loss, has_aux=True)(x)
    return y, gradients


# Others show the same of their kind.
SHOWN = ("dplr_state_space", "attention", "attention, own bias", "attention, lambda")
SHOWN += ("attention, window and prefix", "retention", "delta_rule", "selective_scan")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if n in SHOWN else ()) for n in OPS]
)
def test_an_empty_batch_goes_through_with_its_gradients(name):
    op = OPS[name]
    x, ids = arrays(op, B=0)
    run = jax.jit(lambda x: results_and_gradients(lambda x: op.call(x, ids), x))
    y, gradients = jax.tree.map(np.asarray, run(x))
    of_two = jax.eval_shape(op.call, *arrays(op))
    for got, want in zip(*map(jax.tree.leaves, (y, of_two)), strict=True):
        # A loss is a sum over the batch.
        assert (got.shape, got.dtype) == ((0, *want.shape[1:]) if want.shape else (), want.dtype)
        assert not np.any(got)
    for key, g in gradients.items():
        assert (g.shape, g.dtype) == (x[key].shape, x[key].dtype)
        assert not np.any(g), key


@pytest.mark.slow
@pytest.mark.parametrize("T", [1, 300])
@pytest.mark.parametrize("name", [n for n in OPS if n not in ("chunked_cross_entropy", "s4d_step")])
def test_an_empty_batch_of_one_step_and_of_many(name, T):
    op = OPS[name]
    x, ids = arrays(op, B=0, T=T, S=T)
    both = lambda x: results_and_gradients(lambda x: op.call(x, ids), x)
    y, gradients = jax.eval_shape(both, x)
    assert all(a.shape[0] == 0 for a in jax.tree.leaves(y))
    assert jax.tree.map(jnp.shape, gradients) == jax.tree.map(jnp.shape, x)


@pytest.mark.parametrize("method", ["fft", "matmul", "direct"])
def test_an_empty_batch_by_every_method_of_the_long_convolution(method):
    x = dict(u=jnp.zeros((0, 50, 4)), kernel=jnp.ones((40, 4)))
    both = lambda x: results_and_gradients(lambda x: ops.long_convolution(**x, method=method), x)
    (y, state), gradients = jax.eval_shape(both, x)
    assert y.shape == (0, 50, 4) and state.shape == (0, 39, 4)
    assert gradients["kernel"].shape == (40, 4)


@pytest.mark.parametrize(
    "mask",
    [
        masks.BlockSparse(np.eye(2, dtype=bool), 8) & masks.Segments(np.zeros((0, 16), np.int32)),
        masks.Causal() & masks.Segments(np.zeros((0, 16), np.int32)),
        masks.Causal() | masks.Segments(np.zeros((0, 16), np.int32)),
    ],
    ids=str,
)
def test_an_empty_batch_by_masks_that_hold_ids(mask):
    x = [jnp.zeros((0, 16, 2, 4))] * 3
    both = lambda x: results_and_gradients(lambda x: ops.attention(*x, mask=mask), x)
    o, gradients = jax.eval_shape(both, x)
    assert o.shape == (0, 16, 2, 4) and all(g.shape == o.shape for g in gradients)


@pytest.mark.parametrize(
    "name, letter", [(name, x) for name, op in OPS.items() for x in sorted(op.letters - {"B"})]
)
def test_no_other_size_is_0(name, letter):
    x, ids = arrays(OPS[name], **{letter: 0})
    with pytest.raises(ValueError, match=r"must be \[[^]]*\] with no empty axis but B, got shape"):
        jax.eval_shape(OPS[name].call, x, ids)


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: ops.ssd(jnp.ones((1, 4, 2, 4)), jnp.ones((1, 4, 2)), -jnp.ones(2),
                         *[jnp.ones((1, 4, 1, 2))] * 2, chunk=0), "chunk"),
        (lambda: ops.gated_linear_attention(*[jnp.ones((1, 4, 2, 4))] * 3, chunk=0), "chunk"),
        (lambda: ops.delta_rule(*[jnp.ones((1, 4, 2, 4))] * 3, jnp.ones((1, 4, 2)), chunk=0),
         "chunk"),
    ],
)  # fmt: skip
def test_chunks_of_0_are_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()


TIME = (0, 32, 8, 4)
SPLIT = {
    **{
        kind: functools.partial(op, mask=masks.Causal())
        for kind, op in ATTENTION.items()
        if kind != "ring_kernel"
    },
    "gated_linear_attention": lambda q, k, v: scans.gated_linear_attention(q, k, v, -(v**2)),
    "delta_rule": lambda q, k, v: scans.delta_rule(q, k, v, v[..., 0]),
    "linear_recurrence": lambda q, k, v: scans.linear_recurrence(q, k),
    "short_convolution": lambda q, k, v: convolutions.short_convolution(
        q[..., 0], jnp.ones((3, 8), q.dtype)
    ),
    "long_convolution": lambda q, k, v: convolutions.long_convolution(
        q[..., 0], jnp.ones((30, 8), q.dtype)
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SPLIT)
def test_an_empty_batch_of_sequences_cut_over_devices(name):
    mesh = jax.make_mesh((8,), ("sequence",), axis_types=(AxisType.Auto,))

    def loss(x):
        return sum(jnp.sum(a) for a in jax.tree.leaves(SPLIT[name](*x)))

    time = P(None, "sequence")
    mapped = functools.partial(jax.shard_map, mesh=mesh, in_specs=time, out_specs=time)
    gradients = jax.eval_shape(mapped(jax.grad(loss), check_vma=False), [jnp.zeros(TIME)] * 3)
    assert [g.shape for g in gradients] == [TIME] * 3


def _of_mixer(mixer, with_state):
    config = LanguageModelConfig(
        vocab_size=20, d_model=64, n_heads=2, pattern=(mixer, "mlp"), repeats=1
    )
    model = LanguageModel(config)
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((2, 9), jnp.int32))["params"]
    tokens = jnp.zeros((0, 9), jnp.int32)

    def loss(params):
        state = dict(state=model.init_state(0, 20)) if with_state else dict(segment_ids=tokens)
        logits, _ = model.apply({"params": params}, tokens, **state)
        return jnp.sum(logits), logits

    return jax.eval_shape(jax.value_and_grad(loss, has_aux=True), params)


MIXERS = "attention local_attention:8 mamba mamba2 s4 s4d h3 gla gated_deltanet".split()


# Their ops are those of other mixers, or are shown above to take an empty batch.
LIKE_OTHERS = ("local_attention:8", "mamba", "s4", "s4d", "h3", "gla", "gated_deltanet")


@pytest.mark.parametrize("with_state", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize(
    "mixer", [pytest.param(m, marks=pytest.mark.slow if m in LIKE_OTHERS else ()) for m in MIXERS]
)
def test_an_empty_batch_goes_through_a_model(mixer, with_state):
    (_, logits), _ = _of_mixer(mixer, with_state)
    assert logits.shape == (0, 9, 20)
