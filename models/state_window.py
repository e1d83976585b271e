"""Mamba-2's state without what is older than a window, by the difference of two states.

A state is a sum over the past, so that of the last r steps alone is exact (arXiv 2410.07145,
section 4.2, "sliding window by state difference"):

    h_t - exp(a_{t-r+1} + ... + a_t) h_{t-r},    a_i = dt_i A

A second scan, which reads r steps behind the first, gives C_t h_{t-r}; the window's log-decays are
summed, not their product formed.

Dimensions: B batch, T time, H heads, G groups, P head dim, N state dim, r window.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Integer

from tilescan.ops.ssd import ssd


class StateWindow(NamedTuple):
    """What the scan of tokens beyond the window needs: the last r inputs, and its own state.

    segment holds the ids of the last 1 + r tokens.
    """

    x: Float[Array, "B r H P"]
    dt: Float[Array, "B r H"]
    B: Float[Array, "B r G N"]
    segment: Integer[Array, "B 1+r"]
    ssm: Float[Array, "B H P N"]

    @classmethod
    def create(
        cls, batch: int, r: int, heads: int, head_dim: int, groups: int, state_dim: int, dtype: Any
    ) -> "StateWindow":
        """Returns the one before the first token: zeros."""
        wide = jnp.promote_types(dtype, jnp.float32)
        return cls(
            jnp.zeros((batch, r, heads, head_dim), dtype),
            jnp.zeros((batch, r, heads), wide),
            jnp.zeros((batch, r, groups, state_dim), dtype),
            jnp.full((batch, 1 + r), -1, jnp.int32),
            jnp.zeros((batch, heads, head_dim, state_dim), wide),
        )


def beyond_window(
    x: Float[Array, "B T H P"],
    dt: Float[Array, "B T H"],
    A: Float[Array, " H"],
    B: Float[Array, "B T G N"],
    C: Float[Array, "B T G N"],
    state: StateWindow,
    *,
    segment_ids: Integer[Array, "B T"] | None = None,
    **options: Any,
) -> tuple[Float[Array, "B T H P"], StateWindow]:
    """Computes what the steps before the last r add to y_t, and the new state.

    Args:
      x, dt, A, B, C: of `ops.ssd`, dt as it is used (after its bias and softplus).
      state: of the tokens before; `StateWindow.create` for none.
      segment_ids: as in the scan itself, [B, T].
      **options: of `ops.ssd`.
    """
    # The second scan's inputs: those of r tokens ago.
    T, r = x.shape[1], state.x.shape[1]
    if segment_ids is None:
        segment_ids = jnp.zeros(x.shape[:2], jnp.int32)
    join = lambda old, new: jnp.concatenate([old, new.astype(old.dtype)], axis=1)
    x, dt, B = join(state.x, x), join(state.dt, dt), join(state.B, B)
    segments = join(state.segment, segment_ids)
    y, ssm = ssd(
        x[:, :T],
        dt[:, :T],
        A,
        B[:, :T],
        C,
        initial_state=state.ssm,
        segment_ids=segments[:, : 1 + T],
        **options,
    )
    # What is left of its output after r more steps; nothing across a segment's border.
    starts = segments[:, 1:] != segments[:, :-1]
    log_decay = jnp.where(starts[..., None], -jnp.inf, dt * A.astype(dt.dtype)[None, None])
    y = y * jnp.exp(window_sums(log_decay[:, 1:], r))[..., None]
    new = StateWindow(x[:, T:], dt[:, T:], B[:, T:], segments[:, T:], ssm)
    return y, new


def window_sums(a: Float[Array, "B L H"], r: int) -> Float[Array, "B L-{r}+1 H"]:
    """Returns a_i + ... + a_{i+r-1} for each i, in O(L log r) without differences of long sums.

    Sums of 1, 2, 4 ... neighbors are made of two of half as many; those of r's binary digits,
    laid end to end, are the sums of r.
    """
    length, done, total, size, part = a.shape[1], 0, None, 1, a
    while True:
        if r & size:
            if total is None:
                total = part
            else:
                count = length - (done + size) + 1
                total = total[:, :count] + part[:, done : done + count]
            done += size
        if done == r:
            return total
        part = part[:, :-size] + part[:, size:]
        size *= 2
