"""Depthwise causal convolution with a short kernel, and the few inputs that it must remember.

Letters: B batch, T time, E embedding (channels), W kernel width.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ops import diagonal_scan
from ops.attention_xla import varying
from ops.recurrence_arguments import (
    check_floating,
    check_implementation,
    check_shape,
    check_time,
)

__all__ = ["short_convolution"]


def short_convolution(
    x: Float[Array, "B T E"],
    weight: Float[Array, "W E"],
    *,
    bias: Float[Array, " E"] | None = None,
    activation: str | None = None,
    initial_state: Float[Array, "B W-1 E"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    implementation: str | None = None,
):
    """y_t = activation(bias + sum_j weight_j x_(t - (W-1) + j)), each channel by itself.

    The last row of `weight` meets the present input, as in torch's padded Conv1d. Any T >= 1 is
    right, shorter than W - 1 too: state and gradients then keep the older inputs of the state.

    Args:
      x: inputs [B, T, E].
      weight: kernel [W, E].
      bias: [E], added before the activation.
      activation: None or "silu".
      initial_state: the W - 1 inputs before x, oldest first, [B, W - 1, E]; zeros when None.
      segment_ids: integers [B, T], or [B, 1 + T] with the segment of initial_state first. Where
        neighbours differ a segment starts, which sees no input before it. By [B, T] ids the first
        step goes on with initial_state's segment.
      implementation: "xla" or None, which is the same.

    Returns:
      y [B, T, E] in x's dtype, summed in float32 (float64 for float64); final_state [B, W - 1, E]
      in x's dtype, the last W - 1 inputs, with zeros for those of segments before the last.

    Raises:
      ValueError: shapes, activation or implementation that do not fit.
      TypeError: dtypes that are not floating, segment_ids that are not integers.
    """
    _validate(x, weight, bias, activation, initial_state, implementation)
    B, T, E = x.shape
    W = weight.shape[0]
    if initial_state is None:
        initial_state = jnp.zeros((B, W - 1, E), x.dtype)
    inputs = jnp.concatenate([initial_state.astype(x.dtype), x], axis=1)
    runs = None
    if segment_ids is not None:
        starts = diagonal_scan.resets(segment_ids, B, T)
        runs = jnp.cumsum(starts, axis=1, dtype=jnp.int32)
        runs = jnp.pad(runs, ((0, 0), (W - 1, 0)))
    shift = jnp.zeros((E,), weight.dtype) if bias is None else bias
    arrays = (inputs, weight, shift)
    y = _convolve(*varying(arrays, arrays), runs, activation)
    # The slice takes part of the initial state when T < W - 1.
    final_state = inputs[:, inputs.shape[1] - (W - 1) :]
    if runs is not None:
        same = runs[:, runs.shape[1] - (W - 1) :] == runs[:, -1:]
        final_state = jnp.where(same[..., None], final_state, 0)
    return y, final_state


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _convolve(inputs, weight, bias, runs, activation):
    y = _sums(inputs, weight, bias, runs)
    return (jax.nn.silu(y) if activation == "silu" else y).astype(inputs.dtype)


def _convolve_forward(inputs, weight, bias, runs, activation):
    y = _convolve(inputs, weight, bias, runs, activation)
    return y, (inputs, weight, bias, runs)


def _convolve_backward(activation, residuals, dy):
    """The sums are computed again: kept, they would double what a layer's backward pass holds."""
    inputs, weight, bias, runs = residuals
    W = weight.shape[0]
    dtype = jnp.promote_types(inputs.dtype, jnp.float32)
    dy = dy.astype(dtype)
    if activation == "silu":
        y = _sums(inputs, weight, bias, runs)
        sigmoid = jax.nn.sigmoid(y)
        dy = dy * sigmoid * (1 + y * (1 - sigmoid))
    # W reductions and W shifted sums read dy: compute it once.
    dy = jax.lax.optimization_barrier(dy)
    dweight = [jnp.sum(dy * x, axis=(0, 1)) for x in _shifted(inputs, W, runs, dtype)]
    ends = ((0, 0), (W - 1, W - 1), (0, 0))
    padded = jnp.pad(dy, ends)
    dinputs = 0.0
    for j in range(W):
        if runs is not None:
            padded = jnp.pad(jnp.where(_same(runs, j, W)[..., None], dy, 0), ends)
        seen = padded[:, W - 1 - j : W - 1 - j + inputs.shape[1]]
        dinputs = dinputs + seen * weight[j].astype(dtype)[None, None]
    dbias = jnp.sum(dy, axis=(0, 1))
    return (
        dinputs.astype(inputs.dtype),
        jnp.stack(dweight).astype(weight.dtype),
        dbias.astype(bias.dtype),
        None,
    )


_convolve.defvjp(_convolve_forward, _convolve_backward)


def _sums(inputs, weight, bias, runs):
    """bias + sum_j weight_j x_(t - (W-1) + j), in float32 at least."""
    dtype = jnp.promote_types(inputs.dtype, jnp.float32)
    y = bias.astype(dtype)[None, None]
    for j, x in enumerate(_shifted(inputs, weight.shape[0], runs, dtype)):
        y = y + x * weight[j].astype(dtype)[None, None]
    return y


def _shifted(inputs, W, runs, dtype):
    """The inputs that row 0, 1, ... of the kernel meets, 0 where they are of another segment."""
    T = inputs.shape[1] - (W - 1)
    for j in range(W):
        x = inputs[:, j : j + T].astype(dtype)
        yield x if runs is None else jnp.where(_same(runs, j, W)[..., None], x, 0)


def _same(runs, j, W):
    """Whether row j of the kernel meets the output's own segment, [B, T]."""
    return runs[:, j : j + runs.shape[1] - (W - 1)] == runs[:, W - 1 :]


def _validate(x, weight, bias, activation, initial_state, implementation):
    check_implementation("short_convolution", implementation)
    if activation not in ("silu", None):
        raise ValueError(f'activation must be "silu" or None, got {activation!r}')
    check_floating(x=x, weight=weight, bias=bias, initial_state=initial_state)
    if x.ndim != 3 or 0 in x.shape:
        raise ValueError(f"x must be [B, T, E], none of them 0, got shape {x.shape}")
    B, T, E = x.shape
    check_time(x=x)
    if weight.ndim != 2 or weight.shape[0] == 0 or weight.shape[1] != E:
        raise ValueError(f"weight must be [W, E] with x's E = {E}, got shape {weight.shape}")
    W = weight.shape[0]
    check_shape("bias", bias, "E", (E,))
    check_shape("initial_state", initial_state, "B, W - 1, E", (B, W - 1, E))
