"""Chunked losses of the head against the plain formulas, in float64 and on whole logits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from tilescan.ops.cross_entropy import chunked_cross_entropy, chunked_log_probabilities

B, T, E, V = 2, 11, 6, 13
SLOW = pytest.mark.slow
KEYS = ("loss", "nll", "correct", "weight", "exact", "rows")


def inputs(dtype=np.float64, tied=False, seed=0):
    rng = np.random.default_rng(seed)
    hidden, head = rng.normal(size=(B, T, E)), rng.normal(size=(V, E) if tied else (E, V))
    targets = rng.integers(0, V, (B, T))
    weights = np.where(rng.random((B, T)) < 0.3, 0.0, rng.random((B, T)))
    real = [x.astype(dtype) for x in (hidden, head, weights)]
    return *real[:2], targets.astype(np.int32), real[2]


def plain(hidden, head, targets, weights, z_loss=0.0, tied=False, scale=None, cap=None):
    logits = jnp.einsum("bte,ve->btv" if tied else "bte,ev->btv", hidden, head)
    logits = logits if scale is None else logits * scale
    logits = logits if cap is None else cap * jnp.tanh(logits / cap)
    log_p = jax.nn.log_softmax(logits)
    nll = -jnp.take_along_axis(log_p, targets[..., None], -1)[..., 0]
    log_z = jax.nn.logsumexp(logits, -1)
    wrong = (jnp.argmax(logits, -1) != targets) & (weights > 0)
    rows = jnp.any(weights > 0, 1)
    return {
        "loss": jnp.sum(weights * (nll + z_loss * log_z**2)),
        "nll": jnp.sum(weights * nll),
        "correct": jnp.sum(weights * (jnp.argmax(logits, -1) == targets)),
        "weight": jnp.sum(weights),
        "exact": jnp.sum(rows & ~jnp.any(wrong, 1)),
        "rows": jnp.sum(rows),
    }


OPTIONS = {
    "plain": {},
    "tied": {"tied": True, "z_loss": 0.1},
    "capped": {"z_loss": 1e-2, "scale": 0.7, "cap": 3.0},
}
# Chunks that divide nothing, that are all positions, and that are longer.
QUICK = [("capped", 4), ("tied", 11), ("plain", 64)]


def sums_and_gradients(loss, *arrays, **options):
    """(gradients, sums, sums without a gradient, which is another program)."""

    def scaled(hidden, head):
        sums = loss(hidden, head, *arrays[2:], **options)
        return 3.0 * sums["loss"], sums

    gradients, sums = jax.grad(scaled, (0, 1), has_aux=True)(*arrays[:2])
    return gradients, sums, scaled(*arrays[:2])[1]


@functools.cache
def of_whole_logits(case):
    """(arrays, what comes of them) in float64."""
    arrays = inputs(tied=OPTIONS[case].get("tied", False))
    run = functools.partial(sums_and_gradients, plain, **OPTIONS[case])
    return arrays, jax.tree.map(np.asarray, jax.jit(run)(*arrays))


@pytest.mark.parametrize(
    ("case", "chunk"),
    [
        (case, chunk) if (case, chunk) in QUICK else pytest.param(case, chunk, marks=SLOW)
        for case in OPTIONS
        for chunk in (1, 4, 11, 64)
    ],
)
def test_sums_and_gradients_are_those_of_whole_logits(case, chunk):
    names = {"scale": "logit_scale", "cap": "logit_cap"}
    ours = {names.get(k, k): v for k, v in OPTIONS[case].items()}
    with jax.enable_x64(True):
        arrays, (want, expected, _) = of_whole_logits(case)
        run = functools.partial(sums_and_gradients, chunked_cross_entropy, chunk=chunk, **ours)
        got, sums, evaluated = jax.jit(run)(*arrays)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-12)
    assert set(sums) == set(evaluated) == set(KEYS)
    for name in KEYS:
        for found in (sums, evaluated):
            np.testing.assert_allclose(found[name], expected[name], rtol=1e-12, err_msg=name)


def test_it_counts_what_the_training_step_counts():
    from tilescan.training.steps import cross_entropy

    hidden, head, targets, weights = inputs(np.float32, seed=3)
    targets = np.array(targets)
    targets[1] = np.argmax(np.asarray(hidden[1]) @ np.asarray(head), -1)  # a row that is right

    @jax.jit
    def both(hidden, head, targets, weights):
        want = cross_entropy(hidden @ head, targets, weights, z_loss=0.01)
        options = dict(chunk=3, z_loss=0.01)
        return want, chunked_cross_entropy(hidden, head, targets, weights, **options)

    want, got = both(hidden, head, targets, weights)
    assert float(want["exact"]) == 1 and set(got) == set(want)
    for name in want:
        np.testing.assert_allclose(got[name], want[name], rtol=1e-5, err_msg=name)
        assert got[name].dtype == jnp.float32


def test_targets_without_weight_are_not_looked_at_and_others_must_be_tokens():
    hidden, head, *rest = inputs(np.float32)
    targets, weights = (np.array(x) for x in rest)
    call = jax.jit(functools.partial(chunked_cross_entropy, chunk=4))
    loss = lambda targets, weights: float(call(hidden, head, targets, weights)["loss"])
    ignored = np.where(weights > 0, targets, np.int32(-100))
    assert loss(ignored, weights) == loss(targets, weights)
    targets[0, 0] = V
    assert np.isnan(loss(targets, np.ones_like(weights)))


def test_bfloat16_is_accumulated_in_float32():
    """Gradients of the head over many chunks are as good as those of one chunk."""
    rng = np.random.default_rng(0)
    T, E, V = 512, 8, 16
    hidden = jnp.asarray(1 + 0.1 * rng.normal(size=(1, T, E)), jnp.bfloat16)
    head = jnp.asarray(0.3 * rng.normal(size=(E, V)), jnp.bfloat16)
    targets = jnp.asarray(rng.integers(0, 4, (1, T)), jnp.int32)

    def gradient(chunk, dtype):
        def loss(head):
            sums = chunked_cross_entropy(
                hidden.astype(dtype), head, targets, jnp.ones((1, T)), chunk=chunk
            )
            return sums["loss"]

        return jax.jit(jax.grad(loss))(head)

    exact = np.asarray(gradient(T, jnp.float32), np.float32)
    got = gradient(4, jnp.bfloat16)
    assert got.dtype == jnp.bfloat16
    error = np.abs(np.asarray(got, np.float32) - exact).max() / np.abs(exact).max()
    assert error < 6e-3, error  # sums in bfloat16 would stop growing at 256 times their steps


@pytest.mark.parametrize("tied", [pytest.param(False, marks=SLOW), True])
def test_log_probabilities_take_any_cotangent(tied):
    with jax.enable_x64(True):
        hidden, head, targets, weights = inputs(tied=tied)
        ours = functools.partial(
            chunked_log_probabilities, targets=targets, chunk=4, tied=tied, temperature=0.7
        )

        def whole(hidden, head):
            logits = jnp.einsum("bte,ve->btv" if tied else "bte,ev->btv", hidden, head) / 0.7
            return jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], -1)[..., 0]

        @functools.partial(jax.jit, static_argnums=0)
        def run(f, hidden, head):
            # Products over tokens: no sum of losses.
            cubed = lambda *a: jnp.sum(jnp.sum(weights * f(*a), 1) ** 3)
            return f(hidden, head), jax.grad(cubed, (0, 1))(hidden, head)

        (values, got), (expected, want) = (run(f, hidden, head) for f in (ours, whole))
        np.testing.assert_allclose(values, expected, rtol=1e-12)
        for a, b in zip(got, want, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-10)


def test_logits_are_never_whole():
    """Bytes of the compiled gradient grow with the chunk, not with T times V."""
    T, E, V = 1024, 8, 512

    def temp_bytes(chunk):
        def loss(hidden, head, targets, weights):
            return chunked_cross_entropy(hidden, head, targets, weights, chunk=chunk)["loss"]

        f32 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
        shapes = f32((1, T, E)), f32((E, V)), f32((1, T), dtype=jnp.int32), f32((1, T))
        compiled = jax.jit(jax.grad(loss, (0, 1))).lower(*shapes).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temp_bytes(32) < 5 * 32 * V * 4 + 3 * 4 * (T * E + E * V) < T * V * 4 / 4


def test_devices_share_the_head():
    """Inside shard_map rows are sharded and the head's gradient is summed over devices."""
    mesh = jax.make_mesh((2,), ("data",), (AxisType.Auto,), devices=jax.devices()[:2])
    hidden, head, targets, weights = inputs(np.float32)
    call = functools.partial(chunked_cross_entropy, chunk=4)

    def local(hidden, head, targets, weights):
        return jax.lax.psum(call(hidden, head, targets, weights)["loss"], "data")

    sharded = P("data")
    shared = jax.shard_map(
        local, mesh=mesh, in_specs=(sharded, P(), sharded, sharded), out_specs=P()
    )
    got = jax.jit(jax.grad(shared, (0, 1)))(hidden, head, targets, weights)
    whole = lambda *a: call(*a)["loss"]
    want = jax.jit(jax.grad(whole, (0, 1)))(hidden, head, targets, weights)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": np.zeros((T, E))}, r"hidden must be \[B, T, E\]"),
        ({"head": np.zeros((V, E))}, r"head must be \[E, V\] with E = 6 \(tied=False\)"),
        ({"targets": np.zeros((B, T + 1), jnp.int32)}, r"targets must be \[B, T\] = \(2, 11\)"),
        ({"chunk": 0}, "chunk=0 must be at least 1"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    hidden, head, targets, weights = inputs(np.float32)
    arguments = dict(hidden=hidden, head=head, targets=targets, chunk=4) | change
    with pytest.raises(ValueError, match=message):
        chunked_log_probabilities(**arguments)
