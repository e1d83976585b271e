"""Ring attention: keys and values travel around the devices, queries stay (arXiv 2310.01889).

Every device attends to the keys that it has at the moment, merges the result by its log-sum-exp,
and sends the keys on. The backward pass is a second ring, in which the gradients of
the keys travel with them: a device never keeps another's keys, so its memory is linear in its own
tokens, whatever the number of devices. The transfer of the next keys starts before the present ones
are used, so that the compiler can hide it; or, on TPUs, the attention kernels themselves send
them (`ring_attention_tpu`).

Dimensions: B batch, T query time, S key time of one device, H heads, G key-value heads, D head dim,
P value dim, R devices of the ring.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32, PyTree

from tilescan.ops import masks
from tilescan.ops.decode_attention import merge_partials
from tilescan.ops.lowering import choose_when_lowered, note
from tilescan.ops.reverse_mode import written_vjp
from tilescan.ops.sequence_parallel import layouts, ring_attention_tpu, shard_attention


@dataclasses.dataclass(frozen=True)
class Ring:
    """The devices of a mesh axis in one or more rings of equal size.

    Attributes:
      axis_name: of the mesh.
      rings: rings[i] are the axis indices of ring i, in their order; each device is in one.
    """

    axis_name: str
    rings: tuple[tuple[int, ...], ...]

    @property
    def size(self) -> int:
        """The number of devices of a ring."""
        return len(self.rings[0])

    @classmethod
    def whole(cls, axis_name: str) -> "Ring":
        """Returns one ring of all devices of an axis."""
        return cls(axis_name, (tuple(range(jax.lax.axis_size(axis_name))),))

    def index(self) -> Int32[Array, ""]:
        """Returns this device's index in its ring."""
        if len(self.rings) == 1:
            return jax.lax.axis_index(self.axis_name)
        places = {device: i for ring in self.rings for i, device in enumerate(ring)}
        table = jnp.asarray([places[d] for d in range(len(places))], jnp.int32)
        return table[jax.lax.axis_index(self.axis_name)]

    def send(self, tree: PyTree, hops: int = 1) -> PyTree:
        """Sends a tree `hops` devices on; returns that of the device `hops` before this one."""
        n = self.size
        if hops % n == 0:
            return tree
        pairs = [(ring[i], ring[(i + hops) % n]) for ring in self.rings for i in range(n)]
        return jax.tree.map(lambda x: jax.lax.ppermute(x, self.axis_name, pairs), tree)


def ring_attention(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S G D"],
    v: Float[Array, "B S G P"],
    *,
    mask: masks.Mask = masks.Full(),  # noqa: B008 (frozen)
    bias: shard_attention.Bias | None = None,
    scale: float | None = None,
    logit_cap: float | None = None,
    return_lse: bool = False,
    implementation: str | None = None,
    axis_name: str = "sequence",
    balance: shard_attention.Balances = "contiguous",
    ring: Ring | None = None,
    transfers: str | ring_attention_tpu.Transfers | None = None,
) -> Float[Array, "B T H P"] | tuple[Float[Array, "B T H P"], Float[Array, "B T H"]]:
    """Computes `ops.attention` of a sequence sharded over a mesh axis, inside `jax.shard_map`.

    Args:
      q, k, v: this device's tokens, in the order of `balance`.
      mask: any mask of `ops.masks`, about positions of the whole sequence; its Segments hold the
        ids of this device's tokens [B, T] (and [B, S]).
      bias: of this device's queries (or 1) and the keys of all devices (or 1), in the devices'
        order.
      scale, logit_cap, return_lse, implementation: as in `ops.attention`.
      axis_name: the mesh axis that shards time.
      balance: which tokens a device holds, see `ops.sequence_parallel.layouts`; a pair of queries'
        and keys' where they differ.
      ring: some of the axis's devices, for several rings side by side; default: all.
      transfers: "xla" (or None), collectives between calls of attention, or "kernel", for TPUs:
        remote copies within the attention kernels, one call of which is a round; what these support
        is in `ring_attention_tpu.unsupported`.

    Returns:
      o [B, T, H, P] in q's dtype; with return_lse also lse [B, T, H].

    Rounds in which no device sees any of the keys are skipped: the rounds of a window are
    proportional to its length. Each round sends S (D + P) G elements (and their gradients in the
    backward pass).

    Raises:
      ValueError: as `ops.attention`; T that differs from S in one order; lengths that do not
        fit `balance`; transfers="kernel" for arguments without such a kernel, or, when the program
        is lowered, for another platform than TPUs.
    """
    # What is static: the rounds, the pairs of ranges that see each other, and the transfers.
    ring = Ring.whole(axis_name) if ring is None else ring
    shard_attention.check(q, k, v, mask, bias, ring.size, balance)
    options = _Options(
        shard_attention.options(q, scale, logit_cap, implementation),
        ring,
        balance,
        rounds(mask, ring.size, q.shape[1], balance, k.shape[1]),
        shard_attention.pairs(mask, ring.size, q.shape[1], balance, k.shape[1]),
    )
    if bias is not None:
        bias = bias.reshape((1,) * (4 - bias.ndim) + bias.shape)
    options = dataclasses.replace(
        options, transfers=_transfers(transfers, q, k, v, bias, mask, options)
    )
    o, lse = _ring(q, k, v, bias, mask, options)
    return (o, lse) if return_lse else o


@dataclasses.dataclass(frozen=True)
class _Options:
    attention: shard_attention.Options
    ring: Ring
    balance: layouts.Balance | tuple[layouts.Balance, layouts.Balance]
    rounds: int
    seen: tuple[tuple[tuple[int, ...], ...], ...]
    transfers: ring_attention_tpu.Transfers | None = None

    def by_collectives(self):
        return dataclasses.replace(self, transfers=None)

    def queries(self, p, T):
        of_queries, _ = layouts.of_queries_and_keys(self.balance)
        return layouts.ranges(p, self.ring.size, T, of_queries)

    def keys(self, p, S):
        _, of_keys = layouts.of_queries_and_keys(self.balance)
        return layouts.ranges(p, self.ring.size, S, of_keys)


def _transfers(transfers, q, k, v, bias, mask, options):
    """Returns how the kernels send, or None for collectives."""
    if transfers in ("xla", None):
        return None
    if transfers == "kernel":
        transfers = ring_attention_tpu.Transfers.along(options.ring.axis_name)
    if not isinstance(transfers, ring_attention_tpu.Transfers):
        raise ValueError(f"transfers={transfers!r} is unknown; it must be 'xla', 'kernel' or None")
    reason = ring_attention_tpu.unsupported(
        q, k, v, bias, mask, options.ring,
        options.queries(0, q.shape[1]), options.keys(0, k.shape[1]),
    )  # fmt: skip
    if options.attention.implementation == "xla":
        reason = 'implementation="xla" has no kernels; "pallas" or None has'
    if reason is not None:
        raise ValueError(
            f'transfers="kernel": {reason}; or use transfers="xla", which is '
            'attention_sequence_parallel="ring" of a model'
        )
    return transfers


def _by_kernels(direction, like, options, *arrays):
    """Computes direction(*arrays) of `ring_attention_tpu` on TPUs; `like` does by collectives."""
    call = functools.partial(direction, options=options, transfers=options.transfers)
    if options.transfers.interpret:
        return call(*arrays)

    def pick(platform):
        if platform != "tpu":
            raise ValueError(
                'transfers="kernel" has kernels for TPUs, and this program is lowered for '
                f'{platform}; transfers="xla" or None, which is '
                'attention_sequence_parallel="ring" of a model, runs anywhere'
            )
        note("ring_attention", None)
        return call

    return choose_when_lowered(pick, functools.partial(like, options.by_collectives()), *arrays)


@functools.partial(written_vjp, nondiff_argnums=(5,))
def _ring(q, k, v, bias, mask, options):
    return _forward(q, k, v, bias, mask, options)


def _ring_fwd(q, k, v, bias, mask, options):
    o, lse = _forward(q, k, v, bias, mask, options)
    return (o, lse), (q, k, v, bias, mask, o, lse)


def _forward(q, k, v, bias, mask, options):
    if options.transfers is not None:
        like = lambda options, q, k, v, mask: _forward(q, k, v, None, mask, options)
        return _by_kernels(ring_attention_tpu.forward, like, options, q, k, v, mask)
    T, S, P = q.shape[1], k.shape[1], options.ring.size
    here = options.ring.index()
    q_ids, kv_ids = shard_attention.segment_ids(mask, T, S)

    # After r hops a device has the keys of device here - r: (o, lse) of all rounds are merged.
    def attend(partial, r, keys):
        """Returns (o, lse) merged with the attention to the keys that have made r hops."""
        k, v, kv_ids = keys
        owner = (here - r) % P
        new = shard_attention.forward(
            q, k, v, shard_attention.columns(bias, owner, S), mask, (q_ids, kv_ids),
            options.queries(here, T), options.keys(owner, S), options.attention,
            seen=options.seen,
        )  # fmt: skip
        return merge_partials(*partial, *new)

    def one_round(carry, r):
        partial, keys = carry
        next_keys = options.ring.send(keys)
        return (attend(partial, r, keys), next_keys), None

    dtype = jnp.promote_types(q.dtype, jnp.float32)
    B, _, H, _ = q.shape
    partial = jnp.zeros((B, T, H, v.shape[3]), dtype), jnp.full((B, T, H), -jnp.inf, dtype)
    keys = k, v, kv_ids
    last = options.rounds - 1
    (partial, keys), _ = jax.lax.scan(one_round, (partial, keys), jnp.arange(last))
    # The last round sends nothing.
    o, lse = attend(partial, last, keys)
    return o.astype(q.dtype), lse


def _ring_bwd(options, residuals, cotangents):
    # By the kernels, which have no bias.
    q, k, v, bias, mask, o, lse = residuals
    do, dlse = cotangents
    if options.transfers is not None:

        def like(options, q, k, v, mask, o, lse, do, dlse):
            return _ring_bwd(options, (q, k, v, None, mask, o, lse), (do, dlse))[:3]

        arrays = q, k, v, mask, o, lse, do, dlse
        return *_by_kernels(ring_attention_tpu.backward, like, options, *arrays), None, None
    T, S, P = q.shape[1], k.shape[1], options.ring.size
    here = options.ring.index()
    q_ids, kv_ids = shard_attention.segment_ids(mask, T, S)

    # dQ and dbias stay; dK and dV travel with their keys, and each device adds its own.
    def add(sums, dkeys, r, keys):
        k, v, kv_ids = keys
        owner = (here - r) % P
        dq, dk, dv, dbias = shard_attention.backward(
            q, k, v, shard_attention.columns(bias, owner, S), mask, (q_ids, kv_ids),
            options.queries(here, T), options.keys(owner, S), options.attention,
            o, lse, do, dlse, seen=options.seen,
        )  # fmt: skip
        sums = sums[0] + dq, shard_attention.add_columns(sums[1], dbias, owner, S)
        return sums, (dkeys[0] + dk, dkeys[1] + dv)

    def one_round(carry, r):
        sums, dkeys, keys = carry
        next_keys = options.ring.send(keys)
        sums, dkeys = add(sums, dkeys, r, keys)
        return (sums, options.ring.send(dkeys), next_keys), None

    # All rounds but the last send keys and gradients on.
    zeros = lambda x: None if x is None else jnp.zeros(x.shape, lse.dtype)
    carry = (zeros(q), zeros(bias)), (zeros(k), zeros(v)), (k, v, kv_ids)
    last = options.rounds - 1
    (sums, dkeys, keys), _ = jax.lax.scan(one_round, carry, jnp.arange(last))
    (dq, dbias), dkeys = add(sums, dkeys, last, keys)
    dk, dv = options.ring.send(dkeys, -last)  # to the keys' own device, in one message
    cast = lambda x, like: None if like is None else x.astype(like.dtype)
    return cast(dq, q), cast(dk, k), cast(dv, v), cast(dbias, bias), None


_ring.defvjp(_ring_fwd, _ring_bwd)


def rounds(
    mask: masks.Mask, P: int, T: int, balance: shard_attention.Balances, S: int | None = None
) -> int:
    """Returns the rounds after which all devices have seen all keys that they see.

    That is 1 + the hops to the farthest of them.
    """
    found = shard_attention.sees(mask, P, T, balance, S).any(axis=(1, 3))
    device = np.arange(P)
    hops = (device[:, None] - device[None]) % P
    return 1 + int(hops[found].max(initial=0))
