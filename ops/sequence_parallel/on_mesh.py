"""Recurrences and convolutions on a mesh: each device computes its rows, heads and stretch of time.

As in `ops.partitioned`, ops are called inside `jax.shard_map`, whatever implements them. Rows and
heads know nothing of each other; time is cut where the mesh has an axis for it, and the op is then
that of `ops.sequence_parallel`.

Letters: B batch, T time, H heads, G groups of heads, E channels; those of the ops otherwise.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
from jax.sharding import AxisType, PartitionSpec

from tilescan.ops.partitioned import BATCH_AXES, HEAD_AXIS, TIME_AXIS
from tilescan.ops.sequence_parallel import convolutions, scans, state_spaces
from tilescan.ops.sequence_parallel.kinds import kinds

__all__ = ["on_mesh", "sequence_parts"]


class _Cut(NamedTuple):
    """What the dimensions of an op's arrays are: arguments in their order, and its two results.

    Further dimensions stay whole, as do those of length 1. Arguments of more than one rank have
    letters for each.
    """

    parallel: Callable
    arguments: dict[str, str | tuple[str, ...]]
    results: tuple[str, str]


_ATTENDING = dict(q="BTHD", k="BTGD", v="BTGP")
_STATE = dict(initial_state="BHDP", segment_ids="BT")
_SYSTEM_STATE = dict(B="HN", C="HN", initial_state="BH", segment_ids="BT")
_TABLE = {
    "ssd": _Cut(
        scans.ssd,
        dict(
            x="BTHP", dt="BTH", A="H", B="BTGN", C="BTGN", D="H", dt_bias="H",
            initial_state="BHPN", segment_ids="BT",
        ),
        ("BTHP", "BHPN"),
    ),
    "gated_linear_attention": _Cut(
        scans.gated_linear_attention,
        _ATTENDING | dict(log_decay="BTHD") | _STATE,
        ("BTHP", "BHDP"),
    ),
    "delta_rule": _Cut(
        scans.delta_rule, _ATTENDING | dict(beta="BTH") | _STATE, ("BTHP", "BHDP")
    ),
    "gated_delta_rule": _Cut(
        scans.gated_delta_rule,
        _ATTENDING | dict(beta="BTH", log_decay="BTH") | _STATE,
        ("BTHP", "BHDP"),
    ),
    "selective_scan": _Cut(
        scans.selective_scan,
        dict(
            x="BTE", dt="BTE", A="EN", B=("BTN", "BTGN"), C=("BTN", "BTGN"), D="E", z="BTE",
            dt_bias="E", initial_state="BEN", segment_ids="BT",
        ),
        ("BTE", "BEN"),
    ),
    "linear_recurrence": _Cut(
        scans.linear_recurrence,
        dict(a="BTE", b="BTE", initial_state="BE", segment_ids="BT"),
        ("BTE", "BE"),
    ),
    "diagonal_state_space": _Cut(
        state_spaces.diagonal_state_space,
        dict(u="BTH", log_dt="H", A="HN") | _SYSTEM_STATE,
        ("BTH", "BH"),
    ),
    "dplr_state_space": _Cut(
        state_spaces.dplr_state_space,
        dict(u="BTH", log_dt="H", Lambda="HN", P="HN") | _SYSTEM_STATE,
        ("BTH", "BH"),
    ),
    "short_convolution": _Cut(
        convolutions.short_convolution,
        dict(x="BTE", weight="WE", bias="E", initial_state="BWE", segment_ids="BT"),
        ("BTE", "BWE"),
    ),
    "long_convolution": _Cut(
        convolutions.long_convolution,
        dict(u="BTE", kernel="KE", D="E", pre_gate="BTE", post_gate="BTE", initial_state="BKE"),
        ("BTE", "BKE"),
    ),
}  # fmt: skip


def on_mesh(op: Callable, setting: str, *arrays, **options):
    """op(*arrays, **options), cut for the mesh in use.

    The mesh is that of `jax.set_mesh`; without one, on a single device, and where all its axes are
    manual already, this is the call itself. Otherwise

      - the batch is cut over those of BATCH_AXES that divide it;
      - heads or channels over HEAD_AXIS, if it divides them and their groups (one group is whole
        on every device);
      - time over TIME_AXIS, but for a single step, and for a short convolution that reads more
        steps back than a device has.

    What is not cut is whole on every device. Where time is cut, a kernel of `long_convolution`
    that is longer than a device's time is cut over TIME_AXIS by channels, if it divides them.

    Args:
      op: a recurrence or convolution of `ops`.
      setting: of `ops.sequence_parallel.kinds`; its scan is used where time is cut.
      *arrays, **options: of `op`. Of the latter, arrays are what the op takes as such.

    Returns:
      What `op` returns: its output, and its last state.

    Raises:
      ValueError: time that TIME_AXIS does not divide, beside what `op` raises.
    """
    mesh = jax.sharding.get_abstract_mesh()
    free = _free(mesh)
    if not free or mesh.size == 1:
        return op(*arrays, **options)
    name, (parallel, letters, results) = op.__name__, _TABLE[op.__name__]
    given = dict(zip(letters, arrays, strict=False)) | {
        key: options.pop(key) for key in letters if key in options
    }
    arrays = {key: x for key, x in given.items() if x is not None}
    if name == "linear_recurrence" and arrays["a"].ndim == arrays["b"].ndim - 2:
        arrays["a"] = arrays["a"][None, None]
    letters = {key: _of_rank(letters[key], x.ndim) for key, x in arrays.items()}
    sizes = {}
    for key, x in arrays.items():
        if key != "segment_ids":
            for letter, n in zip(letters[key], x.shape, strict=False):
                sizes[letter] = max(n, sizes.get(letter, 1))

    axes = {"B": _batch_axes(sizes["B"], free), **_head_axes(sizes, free)}
    P = sequence_parts(sizes["T"])
    if name == "short_convolution" and sizes["T"] // P < sizes["W"] - 1:
        P = 1
    if P > 1:
        axes["T"], op = TIME_AXIS, parallel
        options["kind"], options["axis_name"] = kinds(setting).scan, TIME_AXIS
        _split_ids(arrays, letters, sizes["T"], options.get("reverse", False))

    def spec(letters, shape):
        pairs = zip(letters, shape, strict=False)
        return PartitionSpec(*(axes.get(letter) if n > 1 else None for letter, n in pairs))

    specs = {key: spec(letters[key], x.shape) for key, x in arrays.items()}
    if P > 1 and name == "long_convolution" and sizes["K"] > sizes["T"] // P + 1:
        inner = (axes["E"],) if axes.get("E") else ()
        parts = P * (free[HEAD_AXIS] if inner else 1)
        if sizes["E"] % parts == 0:
            specs["kernel"] = PartitionSpec(None, (*inner, TIME_AXIS))
    # Without check_vma as in `ops.partitioned`. Compiled, as custom derivatives with symbolic zeros
    # can't be called step by step under shard_map.
    return jax.jit(
        jax.shard_map(
            lambda arrays: op(**arrays, **options),
            in_specs=(specs,),
            out_specs=tuple(spec(r, [sizes.get(letter, 1) for letter in r]) for r in results),
            axis_names=set(free),
            check_vma=False,
        )
    )(arrays)


def sequence_parts(T: int) -> int:
    """Over how many devices `on_mesh` cuts T steps in the mesh in use; 1 for a single step.

    Raises:
      ValueError: a length that they don't divide.
    """
    P = _free(jax.sharding.get_abstract_mesh()).get(TIME_AXIS, 1)
    if T == 1:
        return 1
    if T % P:
        raise ValueError(
            f"a sequence of {T} steps can't be cut over mesh.{TIME_AXIS} = {P} devices: its length "
            f"must be a multiple of {P}"
        )
    return P


def _free(mesh) -> dict[str, int]:
    """The sizes of the axes that the compiler cuts over."""
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return {name: mesh.shape[name] for name, kind in kinds if kind == AxisType.Auto}


def _of_rank(letters, rank):
    if isinstance(letters, str):
        return letters
    return next((choice for choice in letters if len(choice) == rank), letters[0])


def _batch_axes(B, free):
    """Those of BATCH_AXES, the first ones first, whose product divides B."""
    axes, parts = (), 1
    for name in BATCH_AXES:
        if name in free and B % (parts * free[name]) == 0:
            axes, parts = (*axes, name), parts * free[name]
    return axes or None


def _head_axes(sizes, free):
    parts, letters = free.get(HEAD_AXIS, 1), [letter for letter in "HGE" if letter in sizes]
    whole = any(
        sizes[letter] % parts and not (letter == "G" and sizes["G"] == 1) for letter in letters
    )
    return {} if whole or parts == 1 else dict.fromkeys(letters, HEAD_AXIS)


def _split_ids(arrays, letters, T, reverse):
    """segment_ids [B, 1 + T] become segment_before [B] and [B, T], which can be cut."""
    ids = arrays.get("segment_ids")
    if ids is not None and ids.ndim == 2 and ids.shape[1] == T + 1:
        arrays["segment_before"], letters["segment_before"] = ids[:, -1 if reverse else 0], "B"
        arrays["segment_ids"] = ids[:, :-1] if reverse else ids[:, 1:]
