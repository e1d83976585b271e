"""Every op under Explicit, Auto and Manual axes: values and gradients are those of one device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from axis_cases import CASES, SHARDED, Case, everything, normal
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from tilescan.ops import masks
from tilescan.ops.attention import attention
from tilescan.ops.linear_recurrence import linear_recurrence
from tilescan.ops.partitioned import partitioned, partitioned_cross_entropy
from tilescan.ops.sequence_parallel.on_mesh import on_mesh
from tilescan.ops.short_convolution import short_convolution

SPLITS = {"rows": ("data",), "heads": ("tensor",), "both": ("data", "tensor")}
KINDS = {"explicit": AxisType.Explicit, "auto": AxisType.Auto, "manual": None}
GRID = [
    (op, name, kind, split)
    for op, cases in CASES.items()
    for name in cases
    for kind in KINDS
    for split in SPLITS
]
# Types are checked when a program is traced, which is quick; some are compiled and run as well.
TYPES = [(op, next(iter(cases)), kind, "both") for op, cases in CASES.items() for kind in KINDS]
# The others are run inside a shard_map by test_shard_map.py.
MANUAL = ("decode_attention", "diagonal_state_space", "s4d_kernel", "chunked_log_probabilities")
# Their rules are those of gated_delta_rule, diagonal_state_space and s4d_kernel.
LIKE_OTHERS = ("delta_rule", "dplr_state_space", "s4_dplr_kernel", "dplr_kernel", "dplr_discretize")
LIKE_OTHERS += ("dense_kernel",)
QUICK_TYPES = [
    c
    for c in TYPES
    if (c[2] == "explicit" and c[0] not in LIKE_OTHERS) or (c[2] == "manual" and c[0] in MANUAL)
]
# Attention on explicit axes is also in test_attention_dropout.py.
QUICK = [
    ("linear_recurrence", "plain", "explicit", "both"),
    ("short_convolution", "plain", "explicit", "both"),
]


def mesh_of(kind):
    if kind is None:  # as it comes
        return jax.make_mesh((4, 2), ("data", "tensor"))
    return jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(kind,) * 2)


def spec_of(letters, shape, axes):
    sharded = [SHARDED.get(letter) for letter in letters]
    return P(*(a if a in axes and n > 1 else None for a, n in zip(sharded, shape, strict=True)))


@functools.cache
def expected(op, name):
    case = CASES[op][name]
    run = jax.jit(functools.partial(everything, case, case.call))
    return jax.tree.map(np.asarray, run(case.arrays))


def specs_of(case, results, axes):
    arrays = {n: spec_of(case.letters[n], x.shape, axes) for n, x in case.arrays.items()}
    return arrays, tuple(
        spec_of(letters, x.shape, axes) for letters, x in zip(case.results, results, strict=True)
    )


def agree(got, want):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * max(1.0, np.abs(b).max()), rtol=1e-5)


@functools.cache
def traced(op, name, kind, split):
    """(the traced program of values and gradients, its arrays, specs of the results)."""
    case, (results, _) = CASES[op][name], shapes_of(op, name)
    axes, mesh = SPLITS[split], mesh_of(KINDS[kind])
    if kind == "manual" and any("V" in letters for letters in case.letters.values()):
        # Devices can't sum over a vocabulary by themselves: here each has all of the head.
        axes = tuple(axis for axis in axes if axis == "data")
    specs, out_specs = specs_of(case, results, axes)
    call = case.call
    if kind == "manual":

        def part(arrays):
            out = case.call(arrays)
            summed = lambda x, of: x if of or "data" not in axes else jax.lax.psum(x, "data")
            return tuple(map(summed, out, case.results))

        call = jax.shard_map(part, mesh=mesh, in_specs=(specs,), out_specs=out_specs)
    arrays = {n: jax.device_put(x, NamedSharding(mesh, specs[n])) for n, x in case.arrays.items()}
    with jax.set_mesh(mesh):
        run = jax.jit(functools.partial(everything, case, call))
        return run.trace(arrays), arrays, out_specs


@functools.cache
def shapes_of(op, name):
    case = CASES[op][name]
    return jax.eval_shape(functools.partial(everything, case, case.call), case.arrays)


@pytest.mark.parametrize(
    ("op", "name", "kind", "split"),
    [c if c in QUICK_TYPES else pytest.param(*c, marks=pytest.mark.slow) for c in TYPES],
)
def test_types_say_how_results_and_gradients_are_cut(op, name, kind, split):
    program, arrays, out_specs = traced(op, name, kind, split)
    out, grads = program.out_info
    assert shapes_of(op, name) == jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (out, grads)
    )
    if kind == "explicit":
        for x, spec in zip(out, out_specs, strict=True):
            assert x.sharding.spec == P(*spec, *(None,) * (len(x.shape) - len(spec)))
        for n, x in grads.items():
            assert x.sharding.spec == jax.typeof(arrays[n]).sharding.spec


@pytest.mark.parametrize(
    ("op", "name", "kind", "split"),
    [c if c in QUICK else pytest.param(*c, marks=pytest.mark.slow) for c in GRID],
)
def test_values_and_gradients(op, name, kind, split):
    program, arrays, _ = traced(op, name, kind, split)
    compiled = program.lower().compile()
    agree(compiled(arrays), expected(op, name))
    if kind == "explicit" and "V" not in "".join(CASES[op][name].letters.values()):
        # Sharded dimensions stay sharded; gradients of replicated arrays are summed.
        assert "all-gather" not in compiled.as_text()


@pytest.mark.slow
def test_groups_that_devices_do_not_divide_are_repeated():
    """Two key-value heads on four devices, each with one query head and the one that it reads."""
    shapes = dict(q=(2, 6, 8, 4), k=(2, 6, 2, 4), v=(2, 6, 2, 4))
    arrays = {n: normal(n, *shape) for n, shape in shapes.items()}
    case = Case(lambda x: (attention(**x, mask=masks.Causal()),), arrays, {}, ("BTHP",))
    want = jax.jit(functools.partial(everything, case, case.call))(arrays)
    mesh = jax.make_mesh((2, 4), ("data", "tensor"))
    specs = dict(q=P("data", None, "tensor"), k=P("data"), v=P("data"))
    put = {n: jax.device_put(x, NamedSharding(mesh, specs[n])) for n, x in arrays.items()}
    # The mesh of the arrays is enough.
    got = jax.jit(functools.partial(everything, case, case.call))(put)
    agree(got, want)
    assert jax.typeof(got[0][0]).sharding.spec == P("data", None, "tensor", None)


def test_what_does_not_fit_is_said_in_the_shapes_of_the_call():
    mesh = jax.make_mesh((4, 2), ("data", "tensor"))
    rows = NamedSharding(mesh, P("data"))
    x = jax.device_put(normal("x", 4, 6, 8), rows)
    with pytest.raises(ValueError, match=r"weight must be \[W, E\] with x's E = 8.*\(3, 6\)"):
        short_convolution(x, normal("w", 3, 6))


def test_arrays_need_no_jit_and_no_mesh_in_use():
    mesh = jax.make_mesh((4, 2), ("data", "tensor"))
    x, w = normal("x", 4, 6, 8), normal("w", 3, 8)
    sharded = jax.device_put(x, NamedSharding(mesh, P("data", None, "tensor")))
    y, state = short_convolution(sharded, w)
    assert jax.typeof(y).sharding.spec == P("data", None, "tensor")
    agree((y, state), short_convolution(x, w))


@pytest.mark.slow
@pytest.mark.parametrize("rest", [AxisType.Explicit, AxisType.Auto])
def test_axes_that_a_checked_shard_map_leaves(rest):
    """Rows are manual; heads are left to the types, or to the compiler.

    Derivatives are taken inside: JAX has none of a shard_map that leaves Explicit axes.
    """
    case, (out, grads) = CASES["ssd"]["plain"], expected("ssd", "plain")
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(AxisType.Auto, rest))
    specs, out_specs = specs_of(case, out, ("data",))
    heads, _ = specs_of(case, out, ("tensor",))
    call = jax.shard_map(
        functools.partial(everything, case, case.call),
        in_specs=(specs,),
        out_specs=(out_specs, specs),
        axis_names={"data"},
    )
    with jax.set_mesh(mesh):
        arrays = {
            n: jax.device_put(x, NamedSharding(mesh, heads[n])) for n, x in case.arrays.items()
        }
        agree(jax.jit(call)(arrays), (out, grads))


@pytest.mark.slow
@pytest.mark.parametrize("time", ["sequence", None])
def test_time_that_an_explicit_axis_cuts_is_shared_like_that_of_an_auto_one(time):
    """By `partitioned`, `on_mesh` and `partitioned_cross_entropy`; results lie as arguments do."""
    mesh = jax.make_mesh((2, 2, 2), ("data", "sequence", "tensor"))
    sharded = P("data", time, "tensor")
    at = lambda x, spec=sharded: jax.device_put(x, NamedSharding(mesh, spec))
    q, k, v = (normal(n, 4, 8, 2, 4) for n in "qkv")
    a, b = np.abs(normal("a", 4, 8, 4)) / 4, normal("b", 4, 8, 4)
    hidden, head = normal("hidden", 4, 8, 6), normal("head", 6, 10)
    ids, weights = np.arange(32).reshape(4, 8) % 10, np.ones((4, 8), np.float32)

    def all_three(q, k, v, a, b, hidden, head, ids, weights):
        o = partitioned(attention, q, k, v, mask=masks.Causal(), sequence_parallel="ring")
        h, last = on_mesh(linear_recurrence, "chain", a, b)
        sums = partitioned_cross_entropy(hidden, head, ids, weights, chunk=3)
        return o, h, last, sums["loss"]

    def run(*arrays):
        real, rest = arrays[:-2], arrays[-2:]
        loss = lambda *real: (lambda out: (sum(map(jnp.sum, map(jnp.sin, out))), out))(
            all_three(*real, *rest)
        )
        return jax.grad(loss, range(len(real)), has_aux=True)(*real)

    arrays = q, k, v, a, b, hidden, head, ids, weights
    want = jax.jit(run)(*arrays)
    specs = *(sharded,) * 5, P("data", time), P(None, "tensor"), P("data", time), P("data", time)
    with jax.set_mesh(mesh):
        got = jax.jit(run)(*map(at, arrays, specs))
    agree(got, want)
    _, (o, h, last, _) = got
    assert jax.typeof(o).sharding.spec == P("data", time, "tensor", None)
    assert jax.typeof(h).sharding.spec == sharded
    assert jax.typeof(last).sharding.spec == P("data", "tensor")
