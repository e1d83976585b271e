"""Layers over devices compute what one plain function computes, and send what formulas say."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tilescan.experiments.measurements import sharded_transformer as transformer
from tilescan.experiments.measurements.compiled import memory
from tilescan.experiments.measurements.devices import devices
from tilescan.experiments.measurements.exactness import difference
from tilescan.experiments.measurements.sharded_layers import TENSOR, Shape
from tilescan.experiments.measurements.sharded_training import markov_chains
from tilescan.experiments.measurements.traffic import sent

SHAPE = Shape(2, 16, 2, 16, 4, vocab=32, rows=4)
SHARDED = [
    pytest.param("tensor", dict(stored=True), marks=pytest.mark.slow),
    pytest.param("megatron_sp", dict(head_chunk=2, remat=True), marks=pytest.mark.slow),
    pytest.param(
        "ring_self_attention",
        dict(sharded_weights=True, causal=True, layers=1),
        marks=pytest.mark.slow,
    ),
    pytest.param("linformer", dict(vocab=0), marks=pytest.mark.slow),
]
MORE = [
    ("tensor", dict(vocab=0, causal=True)),
    ("megatron_sp", dict(vocab=0, stored=True, causal=True)),
    ("ring", dict(sharded_weights=True, remat=True, head_chunk=2)),
    ("ulysses", dict(causal=True, sharded_weights=True)),
    ("all_gather", dict(blocks=("mlp", "attention"), residual=False)),
    ("linformer", dict(sharded_weights=True)),
]


def filled(arguments, vocab):
    rng = np.random.default_rng(0)

    def fill(x):
        if x.dtype == np.int32:
            return rng.integers(0, vocab, x.shape).astype(np.int32)
        return (0.2 * rng.standard_normal(x.shape)).astype(np.float32)

    return jax.tree.map(fill, arguments)


def plain(strategy, s, params, data):
    """The loss on one device, in straight lines."""

    def norm(x, scale):
        return (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-5) * scale

    def attend(x, w):
        q, k, v = (jnp.einsum("bte,ehd->bhtd", x, w["qkv"][:, c]) for c in range(3))
        if strategy == "linformer":
            k, v = (
                jnp.einsum("kt,bhtd->bhkd", p, y) for p, y in zip(w["project"], (k, v), strict=True)
            )
        scores = q @ k.swapaxes(-1, -2) / np.sqrt(s.width // s.heads)
        if s.causal:
            scores += jnp.log(jnp.tril(jnp.ones((s.length, s.length))))[None, None]
        o = jax.nn.softmax(scores) @ v
        return jnp.einsum("bhtd,hde->bte", o, w["out"])

    run = {"attention": attend, "mlp": lambda x, w: jax.nn.gelu(x @ w["up"]) @ w["down"]}
    x = data["x"] if "x" in data else params["embedding"][data["tokens"]]
    for n in range(s.layers):
        w = {k: a[n] for k, a in params.items() if k != "embedding"}
        for i, block in enumerate(s.blocks):
            scale = w["norms"][i][None, None] if s.residual else None
            x = x + run[block](norm(x, scale), w) if s.residual else run[block](x, w)
    if "x" in data:
        return jnp.sum(x)
    logits = x @ params["embedding"].T
    picked = jnp.take_along_axis(jax.nn.log_softmax(logits), data["targets"][..., None], -1)
    return -jnp.mean(picked)


def assert_is_plain(strategy, changes):
    s = dataclasses.replace(SHAPE, **changes)
    step, arguments = transformer.program(strategy, s, 4)
    params, data = filled(arguments, s.vocab)
    loss, grads, dx = jax.jit(step)(params, data)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: x.astype(np.float64) if x.dtype.kind == "f" else x, params)
        x = {k: v.astype(np.float64) if v.dtype.kind == "f" else v for k, v in data.items()}
        real = {k: v for k, v in x.items() if v.dtype.kind == "f"}
        loss_of = lambda params, real: plain(strategy, s, params, {**x, **real})
        want, (pull, wanted) = jax.jit(jax.value_and_grad(loss_of, (0, 1)))(wide, real)
        want_dx = wanted.get("x")
    assert difference(loss, want) < 1e-5
    for name, g in grads.items():
        assert difference(g, pull[name]) < 2e-5, name
    if want_dx is not None:
        assert difference(dx, want_dx) < 2e-5


@pytest.mark.parametrize(("strategy", "changes"), SHARDED)
def test_a_step_is_that_of_one_device(strategy, changes):
    assert_is_plain(strategy, changes)


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "changes"), MORE)
def test_other_strategies(strategy, changes):
    assert_is_plain(strategy, changes)


def test_megatron_sends_four_whole_activations_and_memory_is_split():
    s = Shape(2, 32, 1, 16, 4, stored=True)
    compiled = {
        strategy: transformer.compile_program(strategy, s, 4, "forward") for strategy in TENSOR
    }
    counts = {strategy: sent(program) for strategy, program in compiled.items()}
    whole = 4 * 2 * 32 * 16
    assert counts["tensor"] == {"all-reduce": {"bytes": 2 * 2 * whole * 3 / 4, "runs": 2}}
    assert counts["megatron_sp"] == {
        "all-gather": {"bytes": 2 * whole * 3 / 4, "runs": 2},
        "reduce-scatter": {"bytes": 2 * whole * 3 / 4, "runs": 2},
    }
    found = memory(compiled["tensor"])
    assert found["arguments"] == transformer.weight_bytes("tensor", s, 4) + whole
    assert found["results"] == whole


def test_what_an_mlp_keeps_is_what_the_paper_counts():
    for n, tokens in ((2, 8), (4, 32)):
        s = Shape(1, tokens * 8, 1, 8, 1, blocks=("mlp",), residual=False)
        x, hidden = 4 * tokens * 8 * 8, 4 * tokens * 8 * 32
        # The input, and of the hidden layer what is in front of the activation and behind.
        assert transformer.kept_bytes("tensor", s, n) == x + 2 * hidden // n
        assert transformer.kept_bytes("ring", s, n) == (x + 2 * hidden) // n


def test_what_cannot_be_shared_is_named():
    with pytest.raises(ValueError, match="3 must divide heads=4"):
        transformer.program("ulysses", SHAPE, 3)
    with pytest.raises(ValueError, match="length=16 must be a multiple of the 3"):
        transformer.program("ring", SHAPE, 3)
    with pytest.raises(ValueError, match="strategy='rings' is unknown"):
        transformer.program("rings", SHAPE, 2)
    with pytest.raises(RuntimeError, match="device_count=99999"):
        devices(99999)


def test_sequences_are_chains_and_hide_what_is_to_be_guessed():
    batch = next(markov_chains(9, 4, 64, False, 0))
    np.testing.assert_array_equal(batch["tokens"][:, 1:], batch["targets"][:, :-1])
    assert batch["tokens"].max() < 8 and batch["weights"].min() == 1
    follows = {}
    for a, b in zip(batch["tokens"].ravel(), batch["targets"].ravel(), strict=True):
        follows.setdefault(a, set()).add(b)
    assert all(len(found) <= 4 for found in follows.values())
    batch = next(markov_chains(9, 4, 64, True, 0))
    hidden = batch["tokens"] == 8
    np.testing.assert_array_equal(hidden, batch["weights"] == 1)
    np.testing.assert_array_equal(batch["tokens"][~hidden], batch["targets"][~hidden])
    assert 0.08 < hidden.mean() < 0.25 and batch["targets"].max() < 8
