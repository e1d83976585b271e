"""Ring attention on TPUs whose transfers run inside the attention kernels.

One call of `pallas_kernels.tpu.flash_attention` is one round: it attends to all ranges of the
present keys while it sends them on. In the backward pass the dK/dV call sends the keys, and the dQ
call of the same round, which has nothing to wait for, the gradients of the keys; in the last round
these are sent to the keys' own device. Decided here: tiles that divide a device's ranges, the
position of each tile, which tiles are live, and what the kernels can't take.

Dimensions: B batch, T query time, S key time of one device, H heads, G key-value heads, D head dim,
P value dim, M batch or 1, I and J tiles of queries and keys.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from tilescan.ops import attention_tpu, masks
from tilescan.ops.attention_operands import backward_operands, forward_operands
from tilescan.ops.decode_attention import merge_partials
from tilescan.ops.mask_placed import Range
from tilescan.ops.sequence_parallel import shard_attention
from tilescan.pallas_kernels import tiles
from tilescan.pallas_kernels.tpu import flash_attention as kernels
from tilescan.pallas_kernels.tpu.ring_attention import Carry

# The first of the ids of barriers: two for each axis of a mesh, see `Transfers`.
COLLECTIVE_ID = 16


@dataclasses.dataclass(frozen=True)
class Transfers:
    """How the kernels of a ring send.

    Attributes:
      axis_name: of the mesh.
      cores: TensorCores of a device.
      collective_id: of the barrier with the next device; the next id is that of the barrier with
        the device to which gradients return. Rings along other axes have others.
      interpret: False, or `pltpu.InterpretParams` on CPUs.
    """

    axis_name: str
    cores: int
    collective_id: int
    interpret: object = False

    @classmethod
    def along(cls, axis_name: str, interpret: Any = False) -> "Transfers":
        """Returns the transfers along an axis of the mesh in use; inside `jax.shard_map`."""
        mesh = jax.sharding.get_abstract_mesh()
        device = mesh.abstract_device
        cores = (device.num_cores if device is not None else None) or 1
        ids = COLLECTIVE_ID + 2 * mesh.axis_names.index(axis_name)
        return cls(axis_name, cores, ids, interpret)

    def carry(self, arrays: Sequence[jax.Array], hops: int) -> Carry | None:
        """Returns what a kernel sends `hops` devices on; None if that is the device itself."""
        hops %= jax.lax.axis_size(self.axis_name)
        if hops == 0:
            return None
        return Carry(
            tuple(arrays), self.axis_name, hops, self.collective_id + (hops != 1), self.cores
        )


def unsupported(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S G D"],
    v: Float[Array, "B S G P"],
    bias: Float[Array, "..."] | None,
    mask: masks.Mask,
    ring: Any,
    queries: tuple[Range, ...],
    keys: tuple[Range, ...],
) -> str | None:
    """Returns why the kernels can't take these arguments and what would work; None if they can.

    Args:
      q, k, v, bias, mask: of `ring_attention`.
      ring: its `Ring`.
      queries, keys: the ranges of any device.
    """
    # What kernels that send don't have at all.
    if ring.size != jax.lax.axis_size(ring.axis_name):
        return "a ring of some of an axis's devices has no kernel; a ring of all of them has"
    if bias is not None:
        return "a bias has no kernel that sends; a mask has"
    if q.dtype not in attention_tpu.DTYPES:
        return f"q, k and v are {q.dtype}; bfloat16 and float32 have a kernel"
    for name, size in (("D", q.shape[3]), ("P", v.shape[3])):
        if not 16 <= size <= 256:
            return f"head dim {name}={size}; 16 to 256 have a kernel"
    if any(isinstance(m, masks.BlockSparse) for m in attention_tpu.leaves(mask)):
        return "BlockSparse has no kernel that sends; masks without it have"
    # Ranges in whole tiles.
    lengths = [s.length for s in (*queries, *keys)]
    if math.gcd(*lengths) % kernels.LANES:
        return (
            f"a device holds ranges of {', '.join(map(str, sorted(set(lengths))))} tokens; "
            f"multiples of {kernels.LANES} have a kernel: pad the sequence"
        )
    # Tables in scalar memory.
    M = 1 if masks.segments_of(mask) is None else q.shape[0]
    for kernel in ("forward", "dq", "dkv"):
        tile = _tile(kernel, q, v, mask, queries, keys)
        I, J = q.shape[1] // tile.queries, k.shape[1] // tile.keys
        size = 4 * (M * (I * J + 3 * (I + J)) + I + J)
        if size > attention_tpu.TABLE_LIMIT:
            return (
                f"the lists of live tiles may take {size} bytes of scalar memory, of which "
                f"{attention_tpu.TABLE_LIMIT} are free; fewer tokens of a device, or a lower batch "
                "of packed ones, have a kernel"
            )
    return None


def forward(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S G D"],
    v: Float[Array, "B S G P"],
    mask: masks.Mask,
    *,
    options: Any,
    transfers: Transfers,
) -> tuple[Float[Array, "B T H P"], Float32[Array, "B T H"]]:
    """Returns (o in q's dtype, lse) of the attention to all devices' keys.

    options: those of `ring_attention`, an `_Options`.
    """
    k, v = forward_operands(k, v, mask)
    ring = _Ring.of(q, k, v, mask, options, transfers, ("forward",))

    def attend(partial, r, keys, hops):
        call, sides = ring.call("forward", r, keys)
        o, lse, *next_keys = kernels.forward(*call, **sides, carry=transfers.carry(keys, hops))
        return merge_partials(*partial, o.astype(lse.dtype), lse[:, :, 0]), next_keys or keys

    def one_round(carry, r):
        return attend(carry[0], r, carry[1], 1), None

    B, T, H, _ = q.shape
    zeros = jnp.zeros((B, H, T, v.shape[3]), jnp.float32)
    partial = zeros, jnp.full((B, H, T), -jnp.inf, jnp.float32)
    last = options.rounds - 1
    (partial, keys), _ = jax.lax.scan(one_round, (partial, ring.keys), jnp.arange(last), unroll=2)
    (o, lse), _ = attend(partial, last, keys, 0)
    return o.astype(q.dtype).swapaxes(1, 2), lse.swapaxes(1, 2)


def backward(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S G D"],
    v: Float[Array, "B S G P"],
    mask: masks.Mask,
    o: Float[Array, "B T H P"],
    lse: Float[Array, "B T H"],
    do: Float[Array, "B T H P"],
    dlse: Float[Array, "B T H"],
    *,
    options: Any,
    transfers: Transfers,
) -> tuple[Float[Array, "B T H D"], Float[Array, "B S G D"], Float[Array, "B S G P"]]:
    """Returns (dq, dk, dv) in the dtypes of (q, k, v), from results and their cotangents."""
    # Rows of the kernels: dO, lse in units of log 2, and delta_i = sum_p dO_ip O_ip - dlse_i.
    q, k, v, o, lse, do, dlse = backward_operands(q, k, v, o, lse, do, dlse, mask)
    ring = _Ring.of(q, k, v, mask, options, transfers, ("dkv", "dq"))
    delta = jnp.sum(o.astype(jnp.float32) * do.astype(jnp.float32), axis=-1) - dlse
    lse = jnp.where(jnp.isneginf(lse), kernels.NO_KEYS, lse * kernels.LOG2E)
    rows = do.swapaxes(1, 2), *(x.swapaxes(1, 2)[:, :, None] for x in (lse, delta))

    def add(sums, r, hops, home_hops, dtype=jnp.float32):
        # The dK/dV kernel sends the keys, the dQ kernel the sums of their gradients.
        dq, dkeys, keys = sums
        call, sides = ring.call("dkv", r, keys, rows)
        (*new,) = kernels.backward_dkv(*call, **sides, carry=transfers.carry(keys, hops))
        dkeys = [(x + y.astype(x.dtype)).astype(dtype) for x, y in zip(dkeys, new, strict=False)]
        call, sides = ring.call("dq", r, keys, rows)
        carry = transfers.carry(dkeys, home_hops)
        new_dq, *arrived = kernels.backward_dq(*call, **sides, carry=carry)
        return dq + new_dq.astype(dq.dtype), arrived or dkeys, new[2:] or keys

    def one_round(sums, r):
        return add(sums, r, 1, 1), None

    zeros = lambda x: jnp.zeros(x.shape, jnp.float32)
    sums = zeros(ring.q), [zeros(x) for x in ring.keys[:2]], ring.keys
    last = options.rounds - 1
    sums, _ = jax.lax.scan(one_round, sums, jnp.arange(last), unroll=2)
    dq, dkeys, _ = add(sums, last, 0, -last, k.dtype)
    return tuple(
        x.astype(like.dtype).swapaxes(1, 2) for x, like in zip((dq, *dkeys), (q, k, v), strict=True)
    )


@dataclasses.dataclass(frozen=True)
class _Ring:
    """What all rounds of a device share; heads are before time, as in the kernels."""

    q: jax.Array
    keys: list[jax.Array]  # k, v and the segment ids of keys, if any: this device's own
    q_ids: jax.Array | None
    mask: masks.Mask
    options: object
    transfers: Transfers
    # Tables of the walks of all rounds, {kernel: {name: [rounds, ...]}}, computed at once. Where
    # segment ids travel there are none: each round has to wait for its ids.
    tables: dict | None = None

    @classmethod
    def of(cls, q, k, v, mask, options, transfers, names):
        """Returns what the rounds of the kernels `names` share."""
        q_ids, k_ids = shard_attention.segment_ids(mask, q.shape[1], k.shape[1])
        q, *keys = (x.swapaxes(1, 2) for x in (q, k, v))
        if k_ids is not None:
            q_ids, k_ids = q_ids.astype(jnp.int32), k_ids.astype(jnp.int32)
            keys.append(k_ids)
        ring = cls(q, keys, q_ids, mask, options, transfers)
        if k_ids is not None:
            return ring
        rounds = jnp.arange(options.rounds, dtype=jnp.int32)
        tables = {n: jax.vmap(lambda r, n=n: ring.walk(n, r)[0].tables)(rounds) for n in names}
        return dataclasses.replace(ring, tables=tables)

    def walk(self, kernel, r, ids=None):
        """Returns (schedule, tile) over keys that have made r hops."""
        options, here = self.options, self.options.ring.index()
        owner = (here - r) % options.ring.size
        k, v = self.keys[:2]
        queries, keys = options.queries(here, self.q.shape[2]), options.keys(owner, k.shape[2])
        tile = _tile(kernel, self.q, v, self.mask, queries, keys)
        return _schedule(kernel, tile, self.mask, ids, queries, keys), tile

    def call(self, kernel, r, keys, rows=()):
        """Returns arguments of a kernel for keys that have made r hops."""
        k, v, *k_ids = keys
        ids = None if self.q_ids is None else (self.q_ids, *k_ids)
        walk, tile = self.walk(kernel, r, ids)
        if self.tables is not None:
            now = {name: table[r] for name, table in self.tables[kernel].items()}
            walk = dataclasses.replace(walk, tables=now)
        scores = kernels.Scores(
            self.options.attention.scale, self.options.attention.logit_cap, k.shape[2],
            tiles.TileMask(self.mask.visible),
        )  # fmt: skip
        sides = dict(
            segments=ids,
            vmem_limit=attention_tpu.VMEM_LIMIT,
            interpret=self.transfers.interpret,
        )
        return (self.q, k, v, *rows, walk, tile, scores), sides


def _tile(kernel, q, v, mask, queries, keys):
    """Returns the tile of a kernel, whose sides divide all ranges."""
    lengths = (math.gcd(*(s.length for s in ranges)) for ranges in (queries, keys))
    return attention_tpu.tile_dividing(kernel, *lengths, max(q.shape[3], v.shape[3]), q.dtype, mask)


def _schedule(kernel, tile, mask, ids, queries, keys) -> tiles.Schedule:
    """Returns the walk of a kernel over a device's queries and keys, given the ranges of both.

    ids: segment ids of queries [B, T] and keys [B, S], or None.
    """
    # Every query sees every key: no tables.
    outer = "keys" if kernel == "dkv" else "queries"
    band = mask.band()
    if band is not None and band.left is band.right is band.limit is None:
        everything = tiles.TileMask(
            mask.visible, mask.tile_summary, band.key_bounds, band.query_bounds
        )
        axes = (
            tiles.Axis(sum(s.length for s in ranges), block)
            for ranges, block in ((queries, tile.queries), (keys, tile.keys))
        )
        return tiles.interval_schedule(everything, *axes, 0, outer=outer)

    # The kind of every tile, from the positions and segment ids of its first and last tokens.
    q_stride, k_stride = queries[0].stride, keys[0].stride
    q_at, k_at = _places(queries, tile.queries), _places(keys, tile.keys)
    tables, q_bounds, k_bounds = {"q_at": q_at, "k_at": k_at}, None, None
    if ids is not None:
        q_bounds = masks.segment_bounds(ids[0], tile.queries)
        k_bounds = masks.segment_bounds(ids[1], tile.keys)
        names = ("q_min", "q_max", "k_min", "k_max")
        tables |= {n: x.ravel() for n, x in zip(names, (*q_bounds, *k_bounds), strict=True)}
        q_bounds = tuple(x[:, :, None] for x in q_bounds)
        k_bounds = tuple(x[:, None, :] for x in k_bounds)
    q_lo, k_lo = q_at[None, :, None], k_at[None, None, :]
    q_hi, k_hi = q_lo + q_stride * (tile.queries - 1), k_lo + k_stride * (tile.keys - 1)
    seen, whole = mask.tile_summary(q_lo, q_hi, k_lo, k_hi, q_bounds, k_bounds)
    M, I, J = 1 if ids is None else len(ids[0]), len(q_at), len(k_at)
    kinds = seen.astype(jnp.int8) + (seen & whole).astype(jnp.int8)

    # The same inside a tile, for the kernel.
    def place(q_row, k_row, tables):
        i, j = tiles.divide(q_row, tile.queries), tiles.divide(k_row, tile.keys)
        return (
            tables["q_at"][i] + q_stride * (q_row - i * tile.queries),
            tables["k_at"][j] + k_stride * (k_row - j * tile.keys),
        )

    def sub_kind(batch, q_lo, q_hi, k_lo, k_hi, tables):
        segments = (None, None)
        if ids is not None:
            i, j = (
                batch * n + tiles.divide(row, block)
                for n, row, block in ((I, q_lo, tile.queries), (J, k_lo, tile.keys))
            )
            segments = (
                (tables["q_min"][i], tables["q_max"][i]), (tables["k_min"][j], tables["k_max"][j]),
            )  # fmt: skip
        q, k = place(q_lo, k_lo, tables)
        q_end, k_end = q + q_stride * (q_hi - q_lo), k + k_stride * (k_hi - k_lo)
        return mask.tile_summary(q, q_end, k, k_end, *segments)

    # Lists of live tiles, as long as the mask allows.
    sides = (queries, tile.queries), (keys, tile.keys)
    most = _most_live(mask, *(sides if outer == "queries" else sides[::-1]))
    schedule = tiles.list_schedule(jnp.broadcast_to(kinds, (M, I, J)), 0, outer=outer, most=most)
    return dataclasses.replace(
        schedule,
        tables=schedule.tables | tables,
        sub_kind=sub_kind,
        place=place,
        strides=(q_stride, k_stride),
    )


def _places(ranges, block: int):
    """Returns the position of each tile's first token, int32 [tiles]."""
    return jnp.concatenate(
        [
            jnp.asarray(s.start, jnp.int32)
            + s.stride * jnp.arange(0, s.length, block, dtype=jnp.int32)
            for s in ranges
        ]
    )


def _most_live(mask, along, across) -> int | None:
    """Returns a bound on the tiles of one side that a tile of the other sees; None without one.

    A tile sees at most `positions` consecutive ones of the other side, a few tiles of each range.
    """
    width = attention_tpu.span(mask)
    if width is None:
        return None
    (ranges, block), (others, step) = along, across
    positions = ranges[0].stride * (block - 1) + width
    return sum(min(s.length // step, (positions - 2) // (step * s.stride) + 2) for s in others)
