"""Recurrent mixers give the same numbers where the mesh in use shards time, batch and channels."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from tilescan.models.gated_delta_net import GatedDeltaNet
from tilescan.models.gated_linear_attention import GatedLinearAttention
from tilescan.models.h3 import H3
from tilescan.models.mamba import Mamba
from tilescan.models.mamba2 import Mamba2
from tilescan.models.mixers import MIXERS, is_recurrent
from tilescan.models.s4 import S4, S4D

B, T, E = 2, 24, 8
X = np.random.default_rng(0).standard_normal((B, T, E), np.float32)
IDS = np.array([[1] * 7 + [2] * 14 + [1] * 3, [3] * 12 + [4] * 12], np.int32)


def mesh_of(**sizes):
    devices = jax.devices()[: int(np.prod(list(sizes.values())))]
    axes = (AxisType.Auto,) * len(sizes)
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axes, devices=devices)


def params_of(mixer):
    shapes = nn.unbox(jax.eval_shape(mixer.init, jax.random.key(0), jnp.asarray(X))["params"])
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda a: 0.4 * rng.standard_normal(a.shape).astype(np.float32), shapes)


def state_of(mixer):
    """As after some tokens, the last ones of the second row's segment and of another."""
    rng = np.random.default_rng(2)
    state = mixer.init_state(B, T)
    random = lambda a: rng.standard_normal(a.shape).astype(np.float32)
    state = jax.tree.map(lambda a: random(a) if a.ndim > 1 else a, state)
    return state._replace(segment=jnp.array([1, 9], jnp.int32))


# With 2 heads, or 16 channels, for 2 devices along "tensor".
CARRIED, PACKED, WHOLE = "a state and segments", "segments", "whole"
CASES = {
    "mamba, log_step": (Mamba(E, state_dim=3, sequence_parallel="log_step"), CARRIED),
    "mamba2": (Mamba2(E, state_dim=4, head_dim=8, decay_scale=0.9), CARRIED),
    "gla, all_gather": (
        GatedLinearAttention(E, n_heads=2, gate_rank=3, sequence_parallel="all_gather"),
        CARRIED,
    ),
    "gated_deltanet, chain": (GatedDeltaNet(E, n_heads=2, sequence_parallel="chain"), CARRIED),
    "h3 with heads, long taps": (H3(E, head_dim=2, taps=9, state_dim=4), WHOLE),
    "h3 with heads, packed": (H3(E, head_dim=2, taps=5, state_dim=4), CARRIED),
    "h3, packed, long taps": (H3(E, taps=9, state_dim=4, sequence_parallel="log_step"), CARRIED),
    "s4d": (S4D(E, state_dim=4), WHOLE),
    "s4d, by chunks": (S4D(E, state_dim=4, fft=False, sequence_parallel="chain"), WHOLE),
    "s4d, bidirectional, packed": (S4D(E, state_dim=4, bidirectional=True), PACKED),
    "s4, packed": (S4(E, state_dim=4, sequence_parallel="all_gather"), CARRIED),
    "s4, bidirectional": (S4(E, state_dim=4, bidirectional=True), WHOLE),
    "s4, bidirectional, packed": (S4(E, state_dim=4, bidirectional=True), PACKED),
}


# A carried state and a border of short convolutions; long ones are in ops/sequence_parallel.
QUICK = ("mamba, log_step",)


@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in CASES]
)
def test_outputs_states_and_gradients(name):
    mixer, what = CASES[name]
    params = params_of(mixer)
    state, ids = state_of(mixer) if what == CARRIED else None, None if what == WHOLE else IDS
    weight = np.random.default_rng(3).standard_normal(X.shape, np.float32)

    def loss(params, x, state, ids):
        y, state = mixer.apply({"params": params}, x, state=state, segment_ids=ids)
        return jnp.sum(y * weight), (y, state)

    run = jax.jit(lambda *args: jax.value_and_grad(loss, (0, 1), has_aux=True)(*args))
    (_, want), gradients = run(params, X, state, ids)
    mesh = mesh_of(sequence=4, tensor=2)
    with jax.set_mesh(mesh):
        x = jax.device_put(X, NamedSharding(mesh, P(None, "sequence")))
        (_, got), cut_gradients = run(params, x, state, ids)
    for a, b in zip(
        jax.tree.leaves((got, cut_gradients)), jax.tree.leaves((want, gradients)), strict=True
    ):
        np.testing.assert_allclose(a, b, atol=2e-5 * max(1.0, np.abs(b).max()))


def test_every_recurrent_mixer_is_among_the_cases():
    recurrent = {mixer for name, mixer in MIXERS.items() if is_recurrent(name)}
    assert {type(mixer) for mixer, _ in CASES.values()} == recurrent
    for mixer in recurrent:
        assert "sequence_parallel" in {field.name for field in dataclasses.fields(mixer)}


@pytest.mark.parametrize(
    ("mixer", "kind", "collective"),
    [
        (Mamba2(E, state_dim=4, head_dim=8), "all_gather", "all-gather"),
        (Mamba2(E, state_dim=4, head_dim=8), "chain", "collective-permute"),
        (S4D(E, state_dim=4), "all_scan", "all-to-all"),
    ],
    ids=["mamba2 gathers", "mamba2 in a chain", "s4d exchanges"],
)
def test_no_device_holds_all_of_time(mixer, kind, collective):
    """In the compiled program of a device, but for S4's kernel and channels."""
    mixer = dataclasses.replace(mixer, sequence_parallel=kind)
    params, mesh = params_of(mixer), mesh_of(sequence=4)
    sharding = NamedSharding(mesh, P(None, "sequence"))
    with jax.set_mesh(mesh):
        run = jax.jit(
            lambda params, x: mixer.apply({"params": params}, x)[0],
            in_shardings=(NamedSharding(mesh, P()), sharding),
            out_shardings=sharding,
        )
        text = run.lower(params, X).compile().as_text()
    assert re.search(rf" {collective}(-start)?\(", text)
    if not isinstance(mixer, S4D):
        assert not re.search(rf"\[{B},{T},", text)


def test_a_single_step_stays_whole():
    """Decoding with a mesh that shards time."""
    mixer = Mamba(E, state_dim=3)
    params, state = params_of(mixer), state_of(mixer)
    run = jax.jit(lambda x: mixer.apply({"params": params}, x, state=state))
    want = run(X[:, :1])
    with jax.set_mesh(mesh_of(sequence=2, tensor=2)):
        jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), run(X[:, :1]), want)


def test_what_cannot_be_cut_says_so():
    mixer = Mamba2(E, head_dim=8, state_window=5)
    message = "mamba2: state_window=5 needs all of time on one device, .* mesh.sequence = 4 shards"
    with jax.set_mesh(mesh_of(sequence=4)), pytest.raises(ValueError, match=message):
        jax.eval_shape(mixer.apply, {"params": params_of(mixer)}, X)


def test_time_that_the_devices_do_not_divide():
    mixer = GatedLinearAttention(E, n_heads=2)
    message = (
        "22 steps can't be sharded over mesh.sequence = 4 devices: its length must be a multiple"
    )
    with jax.set_mesh(mesh_of(sequence=4)), pytest.raises(ValueError, match=message):
        jax.eval_shape(mixer.apply, {"params": params_of(mixer)}, X[:, :22])
