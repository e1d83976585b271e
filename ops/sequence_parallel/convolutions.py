"""Causal convolutions over time that is sharded over devices, inside `jax.shard_map`.

A short kernel reads the last W - 1 inputs of the device before: a halo. A long one that is not
longer than a device's shard of time reaches one device further, to which its sums there are sent
(overlap-add). Longer kernels need all of time: devices exchange time for channels (all-to-all),
convolve whole sequences of E / P channels each, and exchange back.

Arguments and results are those of the op of the same name, with the differences that
`ops.sequence_parallel.scans` names. Dimensions are those of `ops`, p of P devices.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Integer

from tilescan.ops import diagonal_scan
from tilescan.ops.long_convolution import long_convolution as _long
from tilescan.ops.recurrence_arguments import state_dtype
from tilescan.ops.sequence_parallel.affine_scan import from_last_device
from tilescan.ops.sequence_parallel.scans import with_neighbour
from tilescan.ops.short_convolution import short_convolution as _short

__all__ = ["long_convolution", "short_convolution"]


def short_convolution(
    x: Float[Array, "B T E"],
    weight: Float[Array, "W E"],
    *,
    bias: Float[Array, " E"] | None = None,
    activation: str | None = None,
    initial_state: Float[Array, "B W-1 E"] | None = None,
    segment_ids: Integer[Array, "B T"] | None = None,
    segment_before: Integer[Array, " B"] | None = None,
    implementation: str | None = None,
    axis_name: str = "sequence",
    kind: str | None = None,
) -> tuple[Float[Array, "B T E"], Float[Array, "B W-1 E"]]:
    """Computes `ops.short_convolution`: y of this device, the last inputs of all.

    `kind` is not used: there is one message, to the next device.

    Raises:
      ValueError: a device with fewer steps than the kernel looks back, besides the op's own errors.
    """
    del kind
    (B, T, E), halo = x.shape, weight.shape[0] - 1
    P, p = jax.lax.axis_size(axis_name), jax.lax.axis_index(axis_name)
    if P > 1 and halo > T:
        raise ValueError(
            f"a kernel of width {halo + 1} reads {halo} inputs before a device's first, but the "
            f"device before has only {T} steps: use at most {P * T // halo} devices along "
            f"{axis_name!r}, or sequences of at least {P * halo} steps"
        )
    # The inputs before the device's first: the initial state's, or the device before's.
    ids = with_neighbour(segment_ids, segment_before, axis_name)
    before = initial_state
    if before is None:
        before = jnp.zeros((B, halo, E), x.dtype)
    if P > 1 and halo:
        tail = x[:, T - halo :]
        if ids is not None:
            # Only the last segment continues on the next device.
            starts = diagonal_scan.resets(ids, B, T)[:, T - halo :]
            later = jnp.cumsum(starts[:, ::-1], 1, dtype=jnp.int32)[:, ::-1]
            later = jnp.pad(later[:, 1:], ((0, 0), (0, 1)))
            tail = jnp.where(later[..., None] == 0, tail, 0)
        tail = jax.lax.ppermute(tail, axis_name, _to_next(P))
        before = jnp.where(p == 0, before.astype(x.dtype), tail)
    y, state = _short(
        x, weight, bias=bias, activation=activation, initial_state=before, segment_ids=ids,
        implementation=implementation,
    )  # fmt: skip
    return y, from_last_device(state, axis_name)


def reads_one_device_back(sizes: dict[str, int], P: int) -> bool:
    """Returns whether a short kernel reads no further than the device before."""
    return sizes["T"] // P >= sizes["W"] - 1


def long_kernel_by_channels(sizes: dict[str, int], P: int) -> dict[str, str]:
    """Returns {"kernel": "E"}, to shard its channels, if it is longer than a device's time."""
    return {"kernel": "E"} if sizes["K"] > sizes["T"] // P + 1 else {}


def long_convolution(
    u: Float[Array, "B T E"],
    kernel: Float[Array, "K _"],
    *,
    D: Float[Array, " E"] | None = None,
    pre_gate: Float[Array, "B T E"] | None = None,
    post_gate: Float[Array, "B T E"] | None = None,
    initial_state: Float[Array, "B K-1 E"] | None = None,
    method: str | None = None,
    implementation: str | None = None,
    axis_name: str = "sequence",
    kind: str | None = None,
) -> tuple[Float[Array, "B T E"], Float[Array, "B K-1 E"]]:
    """Computes `ops.long_convolution`: y of this device, and final_state of all.

    Args:
      u, D, pre_gate, post_gate, initial_state, method, implementation: as of the op.
      kernel: [K, E], the same on all devices. Where K > T + 1 and P divides E it may also be
        [K, E / P], the columns of this device's channels, from E / P p on: then no device holds an
        array as large as the sequence, nor sums a gradient as large over devices.
      axis_name: of the mesh, in the order of time.
      kind: not used.

    Up to K = T + 1, K - 1 sums per channel go to the next device. Longer kernels send (P - 1) / P
    of u and of y once, and E is padded to a multiple of P.

    Raises:
      ValueError: a kernel of neither shape, besides the op's own errors.
    """
    del kind
    options = dict(method=method, implementation=implementation)
    P, dtype = jax.lax.axis_size(axis_name), state_dtype(u)
    wide = lambda x: None if x is None else x.astype(dtype)
    x = u if pre_gate is None else wide(u) * wide(pre_gate)
    convolve = _overlap_add if kernel.shape[0] - 1 <= u.shape[1] else _exchanged
    y, final = convolve(x, wide(kernel), wide(initial_state), dtype, axis_name, P, options)
    if D is not None:
        y = y + wide(x) * wide(D).reshape(1, 1, -1)
    if post_gate is not None:
        y = y * wide(post_gate)
    return y.astype(u.dtype), final


def _overlap_add(x, kernel, state, dtype, axis_name, P, options):
    """Returns y without skip and gates, and the final state: K - 1 sums go to the next device."""
    y, tail = _long(x.astype(dtype), kernel, **options)
    n = tail.shape[1]
    if n and P > 1:
        before = jax.lax.ppermute(tail, axis_name, _to_next(P))
        if state is not None:
            before = before + jnp.where(jax.lax.axis_index(axis_name) == 0, state, 0)
        y = y.at[:, :n].add(before)
    elif n and state is not None:
        y = y.at[:, :n].add(state)
    return y, from_last_device(tail, axis_name)


def _exchanged(x, kernel, state, dtype, axis_name, P, options):
    """Returns the same as `_overlap_add`, by whole sequences of a P-th of the channels."""
    E = x.shape[2]
    own = -(-E // P)
    pad = lambda v: jnp.pad(v, [(0, 0)] * (v.ndim - 1) + [(0, own * P - E)])
    start = jax.lax.axis_index(axis_name) * own
    mine = lambda v: jax.lax.dynamic_slice_in_dim(pad(v), start, own, v.ndim - 1)
    if kernel.shape[1] == E:
        kernel = mine(kernel)
    elif kernel.shape[1] * P != E:
        raise ValueError(
            f"kernel must be [K, E] or a device's own [K, E / P] with u's E = {E} and P = {P} "
            f"devices along {axis_name!r}, got shape {kernel.shape}"
        )
    x = jax.lax.all_to_all(pad(x), axis_name, 2, 1, tiled=True)
    state = None if state is None else mine(state)
    y, final = _long(x.astype(dtype), kernel, initial_state=state, **options)
    y = jax.lax.all_to_all(y, axis_name, 1, 2, tiled=True)[..., :E]
    return y, _joined(final, axis_name, start, own * P)[..., :E]


def _joined(x, axis_name, start, E):
    """Returns [..., E] on all devices, from each one's channels, the first of which is `start`."""
    whole = jnp.zeros((*x.shape[:-1], E), x.dtype)
    whole = jax.lax.dynamic_update_slice_in_dim(whole, x, start, x.ndim - 1)
    return jax.lax.psum(whole, axis_name)


def _to_next(P):
    return [(i, i + 1) for i in range(P - 1)]
