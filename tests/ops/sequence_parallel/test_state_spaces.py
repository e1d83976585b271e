"""State spaces over time sharded over devices against one device's, in float64."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from tilescan.ops import s4, state_space
from tilescan.ops.sequence_parallel import state_spaces
from tilescan.ops.sequence_parallel.kinds import SCAN_KINDS
from tilescan.ops.sequence_parallel.on_mesh import on_mesh

B, T, H, R, N = 2, 24, 3, 2, 2
TIME, WHOLE = P(None, "sequence"), P()
OPS = ("diagonal_state_space", "dplr_state_space")


def mesh_of(**sizes):
    devices = jax.devices()[: int(np.prod(list(sizes.values())))]
    axes = (AxisType.Auto,) * len(sizes)
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axes, devices=devices)


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def inputs(name, channels=False):
    """Arguments by name; modes that fade little over a device's time, and some that fade."""
    rng = np.random.default_rng(0)
    shape = (H, R) if channels else (H,)
    Lambda, low_rank, b, _ = (
        np.broadcast_to(x, (H, N)) for x in s4.hippo_legs_nplr(2 * N)[:3] + (0j,)
    )
    system = dict(A=Lambda) if name == OPS[0] else dict(Lambda=Lambda, P=low_rank)
    system |= dict(B=b, C=rng.standard_normal((H, N)) + 1j * rng.standard_normal((H, N)))
    arrays = dict(u=rng.standard_normal((B, T, *shape)), log_dt=np.log([0.01, 0.1, 0.5])) | system
    return arrays | dict(initial_state=rng.standard_normal((B, *shape, 2 * N)))


def packed(T, devices):
    """Segments that start on a device's first step, last over more than a device, come again."""
    n, ids = T // devices, np.zeros((B, T), np.int32)
    ids[0, n:] = 1
    ids[0, n + 2 :] = 0
    ids[0, n + 4 : n + 5] = 5
    ids[0, T - n - 1 :] = 4
    ids[1, 3:] = 2  # to the end
    return ids


def program(op, arrays, devices=None):
    """cotangents -> (what `op` gives, gradients in all floating arrays), on one device or many."""
    # NumPy's arrays are cut on the host; a jax.Array is by a program.
    fixed = {k: v for k, v in arrays.items() if v.dtype == np.int32}
    moved = {k: v for k, v in arrays.items() if k not in fixed}
    run = lambda arrays: op(**arrays)
    if devices is not None:
        specs = {k: TIME if k in ("u", "segment_ids") else WHOLE for k in arrays}
        run = jax.shard_map(
            run,
            mesh=mesh_of(sequence=devices),
            in_specs=(specs,),
            out_specs=(TIME, WHOLE),
            check_vma=False,
        )

    @jax.jit
    def everything(moved, fixed, cotangents):
        out, pull = jax.vjp(lambda moved: run(moved | fixed), moved)
        return out, pull(cotangents)[0]

    return functools.partial(everything, moved, fixed)


def cotangents_of(arrays):
    rng = np.random.default_rng(1)
    return tuple(rng.standard_normal(arrays[k].shape) for k in ("u", "initial_state"))


def assert_equal(got, want, name=""):
    paths, _ = jax.tree.flatten_with_path(want)
    for (path, w), g in zip(paths, jax.tree.leaves(got), strict=True):
        w, where = np.asarray(w), jax.tree_util.keystr(path)
        assert np.isfinite(w).all() and w.any() and g.dtype == w.dtype
        atol = 1e-11 * np.abs(w).max()
        np.testing.assert_allclose(g, w, atol=atol, rtol=0, err_msg=f"{name} {where}")


def segmented(name, devices):
    """(arrays for one device, for many): the state belongs to row 0's first segment alone."""
    arrays, ids = inputs(name), packed(T, devices)
    before = np.array([0, 7], np.int32)
    whole = arrays | dict(segment_ids=np.concatenate([before[:, None], ids], 1))
    return whole, arrays | dict(segment_ids=ids, segment_before=before)


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        (OPS[1], SCAN_KINDS[-1:]),
        pytest.param(OPS[0], SCAN_KINDS, marks=pytest.mark.slow),
        pytest.param(OPS[1], SCAN_KINDS, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_packed_sequences_with_a_state(name, kinds):
    """Values, the last state and all gradients, of each kind."""
    arrays, split = segmented(name, 4)
    cotangents = cotangents_of(arrays)
    want = program(functools.partial(getattr(state_space, name), chunk=8), arrays)(cotangents)

    def every_kind(**arrays):
        call = functools.partial(getattr(state_spaces, name), chunk=4)
        return tuple(zip(*(call(**arrays, kind=kind) for kind in kinds), strict=True))

    run = program(every_kind, split, 4)
    for i, kind in enumerate(kinds):
        # Where the others' cotangents are 0, gradients are this kind's.
        own = tuple(tuple(x * (i == j) for j in range(len(kinds))) for x in cotangents)
        (y, final), gradients = run(own)
        assert_equal(((y[i], final[i]), gradients), want, kind)


@pytest.mark.parametrize(
    ("name", "devices", "kind", "channels"),
    [
        pytest.param(OPS[0], 3, "log_step", True, marks=pytest.mark.slow),
        pytest.param(OPS[0], 8, "all_gather", False, marks=pytest.mark.slow),
        pytest.param(OPS[1], 6, "log_step", False, marks=pytest.mark.slow),
        pytest.param(OPS[1], 8, "all_scan", False, marks=pytest.mark.slow),
        pytest.param(OPS[1], 1, "chain", False, marks=pytest.mark.slow),
    ],
)
def test_any_number_of_devices_without_segments(name, devices, kind, channels):
    """Steps of a device that fill no chunk, and channels of a system."""
    arrays = inputs(name, channels=channels)
    cotangents = cotangents_of(arrays)
    want = program(getattr(state_space, name), arrays)(cotangents)
    call = functools.partial(getattr(state_spaces, name), kind=kind)
    assert_equal(program(call, arrays, devices)(cotangents), want)


@pytest.mark.parametrize("name", [OPS[0], pytest.param(OPS[1], marks=pytest.mark.slow)])
def test_every_axis_is_cut_at_once(name):
    arrays, _ = segmented(name, 2)
    # Two of the systems, for two devices along "tensor".
    two = dict(u=np.s_[..., :2], initial_state=np.s_[:, :2], segment_ids=np.s_[:])
    arrays = {k: v[two.get(k, np.s_[:2])] for k, v in arrays.items()}
    op = getattr(state_space, name)
    want = jax.jit(lambda arrays: op(**arrays))(arrays)
    order = [k for k in arrays if k not in ("initial_state", "segment_ids")]
    options = {k: v for k, v in arrays.items() if k not in order}
    with jax.set_mesh(mesh_of(data=2, sequence=2, tensor=2)):
        got = jax.jit(lambda args, options: on_mesh(op, "ring", *args, **options))(
            [arrays[k] for k in order], options
        )
    assert_equal(got, want)


@pytest.mark.parametrize(
    "kind", [k if k == "log_step" else pytest.param(k, marks=pytest.mark.slow) for k in SCAN_KINDS]
)
def test_what_devices_send_knows_no_matrix(kind):
    """Messages are states and whether they are kept: none is as large as a transition."""
    arrays, split = segmented(OPS[1], 4)
    call = functools.partial(state_spaces.dplr_state_space, kind=kind)
    specs = {k: TIME if k in ("u", "segment_ids") else WHOLE for k in split}
    run = jax.shard_map(
        lambda arrays: call(**arrays)[0],
        mesh=mesh_of(sequence=4), in_specs=(specs,), out_specs=TIME, check_vma=False,
    )  # fmt: skip
    text = jax.jit(run).lower(jax.tree.map(jnp.asarray, split)).compile().as_text()
    found = re.findall(r"= \(?(.*?)\)? (?:collective-permute|all-gather)(?:-start)?\(", text)
    sizes = [
        int(np.prod([int(n) for n in shape.split(",") if n]))
        for shapes in found
        for shape in re.findall(r"f64\[([\d,]*)\]", shapes)
    ]
    state = B * H * 2 * N
    assert max(sizes) == {"all_gather": 4 * state, "all_scan": state // H}.get(kind, state)
    assert set(sizes) <= {max(sizes), B, 4 * B}
