"""How far tiled attention is from the definition in float64: outputs and gradients.

Dimensions: B batch, T time, H heads, G key-value heads, D head dim.
"""

import functools
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from tilescan.experiments.harness.claims import Verdict
from tilescan.experiments.harness.groups import first
from tilescan.experiments.harness.records import Record, Records
from tilescan.experiments.harness.tables import MEASURED, Column, Table, columns, table
from tilescan.experiments.measurements.exactness import difference, values_and_gradients
from tilescan.ops import attention_tpu, attention_xla, masks, reference
from tilescan.ops.attention import attention

STANDARD, XLA, KERNELS = "standard", "tiled (XLA)", "tiled (Pallas TPU, interpreted)"
CHOSEN = "as chosen"  # tiles that the op takes by itself
OUTPUTS = ("o", "dq", "dk", "dv")
FLOAT32_BOUND = 2e-6  # relative to the largest value
BFLOAT16_BOUND = 2.0  # times the error of standard attention in bfloat16
Results = tuple[Float[Array, "B T H D"], tuple[Float[Array, "B T G D"], ...]]


def make_mask(name: str, length: int) -> masks.Mask:
    """Returns one of the masks of the table, for self-attention of this length.

    Raises:
      ValueError: unknown name.
    """
    if name == "full":
        return masks.Full()
    if name in ("causal", "grouped heads"):
        return masks.Causal()
    if name == "window":
        return masks.SlidingWindow(length // 4, length // 8)
    if name == "butterfly":
        block = max(1, length // 8)
        return masks.BlockSparse(masks.butterfly(-(-length // block), 2), block)
    if name == "segments":
        ids = jnp.asarray(np.arange(length)[None, :] * 3 // length, jnp.int32) + 1
        return masks.Causal() & masks.Segments(ids)
    raise ValueError(f"mask={name!r} is unknown")


def errors(settings: Mapping[str, Any], seed: int) -> dict[str, dict[str, float]]:
    """Computes the largest error of each output over its largest value, per implementation.

    Settings: length, heads, head_dim, mask (a name of `make_mask`; "grouped heads" is causal with
    half as many key-value heads), dtype, tiles and kernel_tiles (sizes such as "64x128", queries x
    keys, for the XLA implementation and for the Pallas kernels, which are interpreted).

    Returns:
      {"implementation, tile": {"o", "dq", "dk", "dv"}}; "standard, none" is
      jax.nn.dot_product_attention in the same dtype. All are measured against `ops.reference` in
      float64, of the rounded inputs.
    """
    length, heads, dtype = settings["length"], settings["heads"], settings["dtype"]
    mask = make_mask(settings["mask"], length)
    # Random (q, k, v, do), rounded to the dtype.
    groups = heads // 2 if settings["mask"] == "grouped heads" else heads
    shapes = [(1, length, n, settings["head_dim"]) for n in (heads, groups, groups, heads)]
    rng = np.random.default_rng(seed)
    q, k, v, do = (jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes)
    arrays = (do, q, k, v)
    truth = in_float64(*arrays, mask=mask)
    # The dense op, ours with tiles of its own choice, and ours with given tiles.
    visible = jnp.asarray(masks.as_array(mask, length, length)).reshape(1, 1, length, length)
    standard = functools.partial(jax.nn.dot_product_attention, mask=visible)
    chosen = functools.partial(attention, mask=mask, implementation="xla")
    found = {
        f"{STANDARD}, none": values_and_gradients(standard)(*arrays),
        f"{XLA}, {CHOSEN}": values_and_gradients(chosen)(*arrays),
    }
    for tile in settings["tiles"]:
        run = jax.jit(functools.partial(in_tiles, attention_xla, mask, sides(tile)))
        found[f"{XLA}, {tile}"] = run(*arrays)
    for tile in settings["kernel_tiles"]:
        run = functools.partial(in_tiles, attention_tpu, mask, sides(tile), interpret=True)
        found[f"{KERNELS}, {tile}"] = run(*arrays)
    outputs = lambda result: (result[0], *result[1])
    return {
        name: {
            output: difference(got, want)
            for output, got, want in zip(OUTPUTS, outputs(result), outputs(truth), strict=True)
        }
        for name, result in found.items()
    }


def in_float64(*arrays: Float[Array, "B T _ D"], mask: masks.Mask) -> Results:
    """Computes the definition and its gradients in float64, of (do, q, k, v)."""
    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(x, np.float64)) for x in arrays]
        return values_and_gradients(functools.partial(reference.attention, mask=mask))(*wide)


def in_tiles(
    implementation: ModuleType,
    mask: masks.Mask,
    tile: tuple[int, int],
    do: Float[Array, "B T H D"],
    q: Float[Array, "B T H D"],
    k: Float[Array, "B T G D"],
    v: Float[Array, "B T G D"],
    **options: Any,
) -> Results:
    """Computes attention and its gradients in tiles of one size, of `attention_xla` or _tpu."""
    options |= {"scale": q.shape[3] ** -0.5, "logit_cap": None, "tile": tile}
    problem = (q, k, v, None, mask, 0)
    o, lse = implementation.forward(*problem, **options)
    gradients = implementation.backward(*problem, o, lse, do, jnp.zeros_like(lse), **options)
    return o, gradients[:3]


def sides(tile: str) -> tuple[int, int]:
    """Returns (queries, keys) of a tile such as "64x128".

    Raises:
      ValueError: it is not two positive numbers with an x between them.
    """
    queries, _, keys = tile.partition("x")
    if not (queries.isdecimal() and keys.isdecimal() and int(queries) and int(keys)):
        raise ValueError(f"tile={tile!r} must be queries x keys, e.g. '64x128'")
    return int(queries), int(keys)


def by_implementation(record: Record) -> dict[str, dict[str, Mapping[str, float]]]:
    """Returns {implementation: {tile: errors}} of a record of `errors`."""
    found = {}
    for name, error in record.result.items():
        implementation, _, tile = name.rpartition(", ")
        found.setdefault(implementation, {})[tile] = error
    return found


def exactness_table(found: Records) -> Table:
    """Returns errors by mask, dtype and implementation, the worst over its tiles."""
    ranked = sorted(found, key=lambda r: r.settings["dtype"], reverse=True)
    worst = {o: lambda row, o=o: max(e[o] for e in row[2].values()) for o in OUTPUTS}
    return table(
        "exactness",
        "Exactness of outputs and gradients",
        [(r, *tiled) for r in ranked for tiled in by_implementation(r).items()],
        [
            Column("dtype", of=lambda row: row[0].settings["dtype"]),
            Column("mask", of=lambda row: row[0].settings["mask"]),
            Column("attention", of=lambda row: row[1]),
            Column("tiles", of=lambda row: ", ".join(row[2])),
            *columns(MEASURED, worst, digits=2),
        ],
        first(found, "{length} queries and keys, {heads} heads of {head_dim}. ")
        + "Largest error over largest value, against dense attention in float64, of the worst "
        "tile. Tiles are queries x keys; by itself the op takes one for so short a sequence.",
    )


def exact(found: Records) -> Verdict:
    """Returns whether errors of tiled attention are those of rounding."""
    single, half = (_worst(found.select(dtype=dtype)) for dtype in ("float32", "bfloat16"))
    known = bool(single and half)
    return Verdict(
        f"outputs and gradients, every mask and tile: float32 within {FLOAT32_BOUND:g} of float64, "
        f"bfloat16 within {BFLOAT16_BOUND:g} times the error of standard attention",
        single[0] <= FLOAT32_BOUND and half[1] <= BFLOAT16_BOUND if known else None,
        f"float32 {single[0]:.2g}, bfloat16 {half[1]:.2f} times" if known else "",
    )


def _worst(found: Records) -> tuple[float, float] | None:
    """Returns the largest error of one dtype, and the largest ratio to the standard one."""
    pairs = [
        (error[output], record.result[f"{STANDARD}, none"][output])
        for record in found
        for name, tiles in by_implementation(record).items()
        if name != STANDARD
        for error in tiles.values()
        for output in OUTPUTS
    ]
    return (max(a for a, _ in pairs), max(a / b for a, b in pairs)) if pairs else None
