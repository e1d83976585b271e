"""Ops under meshes with Explicit axes, where types say how every array is sharded.

`jax.make_mesh` makes such axes unless told otherwise. Loops, slices and reshapes within an op would
each have to state the sharding of their results, and Pallas kernels can't be partitioned at all. So

  - an op whose rows and heads are independent is called inside `jax.shard_map`
    (`partitioned_by_dimensions`): each device computes the rows and heads that it holds, and
    nothing is sent but sums of gradients that devices share;
  - everything else, such as a loss over a sharded vocabulary, is left to the compiler
    (`partitioned_by_compiler`, `as_auto`): inside, the axes are Auto, and results get their types
    back.

Without Explicit axes both call what they wrap, as it is.

Dimensions: B batch, T query time, S key time, H heads, G groups of heads or key-value heads, E
channels. Other letters are dimensions that stay replicated.
"""

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from tilescan.ops.arrays import AnyArray
from tilescan.ops.dimensions import of_rank, repeated, repeats, spec_of

__all__ = [
    "Partitioning",
    "as_auto",
    "as_first",
    "auto_axes",
    "partitioned_by_compiler",
    "partitioned_by_dimensions",
    "explicit_devices",
    "explicit_mesh",
    "is_varying",
    "replicated",
    "spec",
    "specs_of",
]

ROWS, TIME, HEADS = "B", "T", "HGE"

F = TypeVar("F", bound=Callable)  # decorators keep the signature of an op


class Partitioning(NamedTuple):
    """The dimensions of an op's arrays and results, by which devices share them.

    Attributes:
      dimensions: {argument: letters of its leading dimensions}. Further dimensions stay
        replicated, as do those of length 1. Arguments of more than one rank have a string for each;
        those of a pytree are for each of its leaves.
      results: letters of the dimensions of each result, as in `partitioned_by_dimensions`.
      prepare: applied to the dict of arrays first, so that the letters hold.
    """

    dimensions: dict[str, str | tuple[str, ...]]
    results: str | tuple[str, ...]
    prepare: Callable[[dict], dict]

    def result_specs(self, given: dict[str, Any]) -> PartitionSpec | tuple[PartitionSpec, ...]:
        """Returns specs of results whose rows, time and heads are sharded as in the arguments."""
        names = self.dimensions
        arrays = {name: x for name, x in given.items() if name in names and x is not None}
        pairs = self.pairs(self.prepare(arrays))
        axes = {letter: _axes_of(pairs, letter, ()) for letter in ROWS + TIME}
        axes |= dict.fromkeys(HEADS, _axes_of(pairs, HEADS, axes[ROWS]))
        of = lambda letters: PartitionSpec(*(axes.get(letter) or None for letter in letters))
        return tuple(map(of, self.results)) if isinstance(self.results, tuple) else of(self.results)

    def pairs(self, arrays: dict[str, Any]) -> list[tuple[AnyArray, str]]:
        """Returns every array with the letters of its dimensions."""
        return [
            (x, of_rank(self.dimensions[name], x.ndim))
            for name, tree in arrays.items()
            for x in jax.tree.leaves(tree)
        ]


def partitioned_by_dimensions(
    results: str | tuple[str, ...],
    *,
    prepare: Callable[[dict], dict] = lambda x: x,
    **dimensions: str | tuple[str, ...],
) -> Callable[[F], F]:
    """Returns a decorator by which devices compute the rows and heads that Explicit axes give them.

    Rows and heads are sharded as the first argument that is sharded along them; other dimensions
    are gathered. Groups of heads that an axis does not divide are repeated, as few times as needed.
    Results are sharded like the arguments. In a `jax.shard_map` with check_vma that leaves Explicit
    axes, JAX can't differentiate a second one: there the compiler partitions the op.

    The decorated op has its `Partitioning` as the attribute `partitioning`.

    Args:
      results: letters of the dimensions of each result; one string if there is one result, or if
        all begin with the same dimensions.
      prepare: applied to the dict of arrays first, so that the letters hold.
      **dimensions: letters of the arguments that are arrays or pytrees of arrays.
    """

    def decorate(op):
        parameters = inspect.signature(op).parameters
        names = list(parameters)
        required = [n for n in dimensions if _is_required(parameters.get(n))]
        partitioning = Partitioning(dimensions, results, prepare)

        @functools.wraps(op)
        def call(*args, **kwargs):
            given = dict(zip(names, args, strict=False)) | kwargs
            arrays = {n: given[n] for n in dimensions if given.get(n) is not None}
            _check_arrays(op, {n: arrays[n] for n in required if n in arrays})
            mesh = explicit_mesh(arrays)
            if mesh is None or len(args) > len(names):
                return op(*args, **kwargs)
            rest = {n: x for n, x in given.items() if n not in arrays}
            return _partitioned_call(op, partitioning, mesh, arrays, rest)

        call.partitioning = partitioning
        return call

    return decorate


def partitioned_by_compiler(results: Callable[..., Any]) -> Callable[[Callable], Callable]:
    """Returns a decorator that leaves the partitioning of a function to the compiler.

    Args:
      results: from the function's (args, kwargs), and what it returned, to the specs of what it
        returned.
    """

    def decorate(function):
        @functools.wraps(function)
        def call(*args, **kwargs):
            return as_auto(function, args, kwargs, results)

        return call

    return decorate


def as_auto(
    function: Callable, args: Sequence[Any], kwargs: dict[str, Any], results: Callable[..., Any]
) -> PyTree:
    """Returns function(*args, **kwargs), computed with Auto axes in the place of Explicit ones.

    Arrays may be anywhere in args and kwargs, but not in what `function` closes over. `results` is
    that of `partitioned_by_compiler`.
    """
    mesh = explicit_mesh((args, kwargs))
    if mesh is None:
        return function(*args, **kwargs)
    leaves, tree = jax.tree.flatten((args, kwargs))
    places = [i for i, x in enumerate(leaves) if _is_array(x)]
    explicit = _names(mesh, AxisType.Explicit)
    auto = mesh.update_axis_types(dict.fromkeys(explicit, AxisType.Auto))
    with jax.sharding.use_abstract_mesh(auto):
        for i in places:
            leaves[i] = jax.sharding.reshard(leaves[i], PartitionSpec())
        new_args, new_kwargs = tree.unflatten(leaves)
        out = function(*new_args, **new_kwargs)
    specs = jax.tree.broadcast(results(args, kwargs, out), out)
    return jax.tree.map(
        lambda x, s: jax.sharding.reshard(x, NamedSharding(mesh, s)) if _is_array(x) else x,
        out,
        specs,
    )


def explicit_mesh(tree: Any) -> AbstractMesh | None:
    """Returns the mesh in use, or else that of the tree's arrays, if it has Explicit axes."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        meshes = (jax.typeof(x).sharding.mesh for x in jax.tree.leaves(tree) if _is_array(x))
        mesh = next((m for m in meshes if not m.empty), mesh)
    return mesh if not mesh.empty and _names(mesh, AxisType.Explicit) else None


def explicit_devices(axis: str, tree: Any = ()) -> int:
    """Returns the devices along an Explicit axis of `explicit_mesh(tree)`; 1 if it has none."""
    mesh = explicit_mesh(tree)
    return mesh.shape[axis] if mesh is not None and axis in _names(mesh, AxisType.Explicit) else 1


def auto_axes(mesh: AbstractMesh | Mesh) -> dict[str, int]:
    """Returns the sizes of the axes over which the compiler partitions."""
    return {name: mesh.shape[name] for name in _names(mesh, AxisType.Auto)}


def is_varying(tree: Any) -> bool:
    """Returns whether types of arrays have manual axes: in a `jax.shard_map` with check_vma."""
    arrays = filter(_is_array, jax.tree.leaves(tree))
    return any(jax.typeof(x).manual_axis_type.varying for x in arrays)


def spec(x: Any, ndim: int | None = None) -> PartitionSpec:
    """Returns the Explicit axes that shard an array's first `ndim` (default: all) dimensions."""
    ndim = np.ndim(x) if ndim is None else ndim
    entries = tuple(jax.typeof(x).sharding.spec)[:ndim]
    return PartitionSpec(*entries, *(None,) * (ndim - len(entries)))


def specs_of(tree: Any) -> PyTree:
    """Returns the Explicit axes of every array of a tree, as `spec` does."""
    return jax.tree.map(spec, tree)


def replicated(args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> PyTree:
    """Returns specs of replicated results, for `partitioned_by_compiler`."""
    return jax.tree.map(lambda x: PartitionSpec(), out)


def as_first(ndim: int) -> Callable[..., Any]:
    """Returns specs of results whose first `ndim` dimensions are sharded like the first argument's.

    For `partitioned_by_compiler`.
    """
    return lambda args, kwargs, out: jax.tree.map(lambda x: spec(args[0], min(ndim, x.ndim)), out)


def _is_required(parameter: inspect.Parameter | None) -> bool:
    """Returns whether an argument is positional and has no default."""
    kind, none = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.empty
    return parameter is not None and parameter.kind == kind and parameter.default is none


def _check_arrays(op, arrays: dict[str, Any]) -> None:
    """Raises TypeError for an argument that holds something else than arrays."""
    for name, tree in arrays.items():
        if not all(hasattr(x, "dtype") and hasattr(x, "shape") for x in jax.tree.leaves(tree)):
            raise TypeError(
                f"{op.__name__} takes arrays, and {name} is of type {type(tree).__name__}: "
                f"give jnp.asarray({name})"
            )


def _partitioned_call(op, partitioning, mesh, arrays, rest):
    """Returns op(**arrays, **rest), each device computing its rows and heads."""
    arrays = partitioning.prepare(jax.tree.map(jnp.asarray, arrays))
    pairs, dimensions = partitioning.pairs(arrays), partitioning.dimensions
    sizes = _sizes(pairs)
    if sizes is None:
        return op(**arrays, **rest)  # whose error says what does not fit
    axes = _axes(pairs, sizes, mesh)
    # Groups that the devices don't divide are repeated.
    devices = _devices(mesh, axes["G"])
    if sizes["G"] > 1 and sizes["G"] % devices:
        times = repeats(max(sizes["H"], sizes["E"]), sizes["G"], devices)
        arrays = {n: _with_groups(x, dimensions[n], sizes["G"], times) for n, x in arrays.items()}

    def in_spec(name):
        return lambda x: spec_of(of_rank(dimensions[name], x.ndim), x.shape, axes)

    def out_spec(letters):
        return spec_of(letters, [sizes.get(letter, 1) for letter in letters], axes)

    specs = {name: jax.tree.map(in_spec(name), tree) for name, tree in arrays.items()}
    results = partitioning.results
    out_specs = tuple(map(out_spec, results)) if isinstance(results, tuple) else out_spec(results)
    put = lambda arrays: jax.tree.map(
        lambda x, s: jax.sharding.reshard(x, NamedSharding(mesh, s)), arrays, specs
    )
    run = lambda arrays: op(**arrays, **rest)

    if is_varying(arrays):
        return as_auto(run, (put(arrays),), {}, lambda *_: out_specs)
    # Without check_vma: loops in Mosaic GPU don't carry the types of manual axes. Compiled, as
    # custom derivatives with symbolic zeros can't be called step by step under shard_map.
    mapped = jax.shard_map(
        run,
        mesh=mesh,
        in_specs=(specs,),
        out_specs=out_specs,
        axis_names=set(_names(mesh, AxisType.Explicit)),
        check_vma=False,
    )
    return jax.jit(lambda arrays: mapped(put(arrays)))(arrays)


def _sizes(pairs) -> dict[str, int] | None:
    """Returns the sizes of rows and heads, 1 for absent ones; None if arrays disagree on one."""
    sizes = dict.fromkeys(ROWS + HEADS, 1)
    for x, letters in pairs:
        for letter, n in zip(letters, x.shape, strict=False):
            if letter in sizes and n != 1:
                if sizes[letter] not in (1, n):
                    return None
                sizes[letter] = n
    return sizes


def _axes(pairs, sizes, mesh) -> dict[str, tuple[str, ...]]:
    """Returns the axes that shard rows, and those that shard heads if they divide them."""
    rows = _axes_of(pairs, ROWS, ())
    heads = _axes_of(pairs, HEADS, rows)
    devices = _devices(mesh, heads)
    if any(sizes[letter] > 1 and sizes[letter] % devices for letter in "HE"):
        heads = ()
    return {ROWS: rows, **dict.fromkeys(HEADS, heads)}


def _axes_of(pairs, letters, taken) -> tuple[str, ...]:
    """Returns the axes of the first array sharded along one of `letters`, without those taken."""
    for x, of_x in pairs:
        for letter, entry in zip(of_x, spec(x), strict=False):
            axes = entry if isinstance(entry, tuple) else () if entry is None else (entry,)
            axes = tuple(axis for axis in axes if axis not in taken)
            if letter in letters and axes:
                return axes
    return ()


def _devices(mesh, axes) -> int:
    return int(np.prod([mesh.shape[axis] for axis in axes], dtype=int))


def _with_groups(tree, dimensions, groups, times):
    """Returns a tree of arrays whose groups of heads, where there are `groups`, are repeated."""

    def one(x):
        axis = of_rank(dimensions, x.ndim).find("G")
        return repeated(x, axis, times) if axis >= 0 and x.shape[axis] == groups else x

    return jax.tree.map(one, tree)


def _names(mesh, kind) -> list[str]:
    return [n for n, k in zip(mesh.axis_names, mesh.axis_types, strict=True) if k == kind]


def _is_array(x) -> bool:
    return isinstance(x, (jax.Array, np.ndarray))
