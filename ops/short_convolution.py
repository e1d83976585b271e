"""Depthwise causal convolution with a short kernel, and the few inputs that are its state.

Dimensions: B batch, T time, E embedding (channels), W kernel width.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tilescan.ops import diagonal_scan
from tilescan.ops.arrays import AnyArray
from tilescan.ops.attention_xla import varying
from tilescan.ops.explicit_axes import partitioned_by_dimensions
from tilescan.ops.lowering import choose_when_lowered
from tilescan.ops.recurrence_arguments import (
    SegmentIds,
    check_floating,
    check_implementation,
    check_shape,
    check_time,
)
from tilescan.ops.reverse_mode import written_vjp
from tilescan.ops.sizes import check_sizes

__all__ = ["short_convolution"]

# Measured on two CPU cores: taps that XLA fuses well by itself; elements of a block's outputs that
# stay in a core's cache with their inputs; taps of one iteration of the loop over them.
FEW_TAPS, BLOCK, UNROLL = 8, 2**15, 4


@partitioned_by_dimensions(
    ("BTE", "BWE"), x="BTE", weight="WE", bias="E", initial_state="BWE", segment_ids="BT"
)
def short_convolution(
    x: Float[AnyArray, "B T E"],
    weight: Float[AnyArray, "W E"],
    *,
    bias: Float[AnyArray, " E"] | None = None,
    activation: str | None = None,
    initial_state: Float[AnyArray, "B W-1 E"] | None = None,
    segment_ids: SegmentIds | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T E"], Float[Array, "B W-1 E"]]:
    """Computes y_t = activation(bias + sum_j weight_j x_(t - (W-1) + j)) in each channel.

    The last row of `weight` multiplies the present input, as in PyTorch's padded Conv1d. T may be
    shorter than W - 1: the final state then has the older inputs of the initial one.

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
      in x's dtype, the last W - 1 inputs, with zeros for inputs of earlier segments.

    Raises:
      ValueError: shapes, activation or implementation that do not fit.
      TypeError: dtypes that are not floating, segment_ids that are not integers.
    """
    _validate(x, weight, bias, activation, initial_state, implementation)
    # Inputs, the state's first, and the number of each one's segment.
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

    # Outputs, and the last W - 1 inputs of their segment.
    shift = jnp.zeros((E,), weight.dtype) if bias is None else bias
    arrays = (inputs, weight, shift)
    y = _convolve(*varying(arrays, arrays), runs, activation)
    # The slice takes part of the initial state when T < W - 1.
    final_state = inputs[:, inputs.shape[1] - (W - 1) :]
    if runs is not None:
        same = runs[:, runs.shape[1] - (W - 1) :] == runs[:, -1:]
        final_state = jnp.where(same[..., None], final_state, 0)
    return y, final_state


@functools.partial(written_vjp, nondiff_argnums=(4,))
def _convolve(inputs, weight, bias, runs, activation):
    y = _sums(inputs, weight, bias, runs)
    return (jax.nn.silu(y) if activation == "silu" else y).astype(inputs.dtype)


def _convolve_forward(inputs, weight, bias, runs, activation):
    y = _convolve(inputs, weight, bias, runs, activation)
    return y, (inputs, weight, bias, runs)


def _convolve_backward(activation, residuals, dy):
    """Recomputes the sums: kept, they would double the memory of a layer's backward pass."""
    inputs, weight, bias, runs = residuals
    W = weight.shape[0]
    dtype = jnp.promote_types(inputs.dtype, jnp.float32)
    dy = dy.astype(dtype)
    if activation == "silu":
        y = _sums(inputs, weight, bias, runs)
        sigmoid = jax.nn.sigmoid(y)
        dy = dy * sigmoid * (1 + y * (1 - sigmoid))
    # dw_j = sum_t dy_t x_(t-(W-1)+j) and dx_t = sum_j w_j dy_(t+(W-1)-j) read dy: compute it once.
    dy = jax.lax.optimization_barrier(dy)
    dweight = _chosen(_products_blocked, _products, dy, inputs, runs, W)
    padded = jnp.pad(dy, ((0, 0), (W - 1, W - 1), (0, 0)))
    if runs is not None:  # of no segment: what is before the first output and after the last
        around = jnp.pad(runs[:, W - 1 :], ((0, 0), (W - 1, W - 1)), constant_values=-1)
        runs = around, runs
    dinputs = _correlated(padded, weight[::-1], runs)
    dbias = jnp.sum(dy, axis=(0, 1))
    return (
        dinputs.astype(inputs.dtype),
        dweight.astype(weight.dtype),
        dbias.astype(bias.dtype),
        None,
    )


_convolve.defvjp(_convolve_forward, _convolve_backward)


def _sums(inputs, weight, bias, runs):
    """Returns bias + sum_j weight_j x_(t - (W-1) + j), in float32 at least."""
    if runs is not None:
        runs = runs, runs[:, weight.shape[0] - 1 :]
    y = _correlated(inputs, weight, runs)
    return y + bias.astype(y.dtype)[None, None]


def _correlated(x, weight, runs):
    """Returns sum_j weight_j x_(l + j), [B, L, E] of x [B, L + W-1, E], in float32 at least.

    runs: None, or the segments of x, [B, L + W-1], and of the sums, [B, L]; inputs of another
    segment are 0.
    """
    weight = weight.astype(jnp.promote_types(x.dtype, jnp.float32))
    return _chosen(_sums_blocked, _sums_whole, x, weight, runs, weight.shape[0])


def _chosen(blocked, whole, a, b, runs, W):
    """Computes `blocked` for many taps on a CPU, else `whole`.

    XLA would store dozens of arrays as long as the sequence there. A few taps, and programs for
    other platforms, become one loop over the sequence.
    """
    if W <= FEW_TAPS:
        return whole(a, b, runs)
    return choose_when_lowered(lambda p: blocked if p == "cpu" else None, whole, a, b, runs)


def _sums_whole(x, weight, runs):
    W = weight.shape[0]
    terms = (v * weight[j][None, None] for j, v in enumerate(_shifted(x, W, runs, weight.dtype)))
    return functools.reduce(jnp.add, terms)


def _products(dy, inputs, runs):
    """Returns the kernel's gradient, sum_t dy_t x_(t - (W-1) + j), [W, E]."""
    W = inputs.shape[1] - dy.shape[1] + 1
    if runs is not None:
        runs = runs, runs[:, W - 1 :]
    return jnp.stack([jnp.sum(dy * x, axis=(0, 1)) for x in _shifted(inputs, W, runs, dy.dtype)])


def _shifted(x, W, runs, dtype):
    """Yields the inputs of row 0, 1, ... of the kernel, 0 for another segment's, [B, L, E]."""
    L = x.shape[1] - (W - 1)
    for j in range(W):
        seen = x[:, j : j + L].astype(dtype)
        if runs is not None:
            seen = jnp.where((runs[0][:, j : j + L] == runs[1])[..., None], seen, 0)
        yield seen


def _sums_blocked(x, weight, runs):
    B, W, E = x.shape[0], *weight.shape
    L = x.shape[1] - (W - 1)
    blocks = _Blocks.of(x, runs, W)

    def block(k):
        seen = blocks.window(k, weight.dtype)
        zeros = varying(jnp.zeros((blocks.size, E), weight.dtype), (x, weight, runs))
        step = lambda j, y: y + seen(j) * weight[j][None]
        return jax.lax.fori_loop(0, W, step, zeros, unroll=UNROLL)

    y = jax.lax.map(block, jnp.arange(B * blocks.count))
    return y.reshape(B, blocks.count * blocks.size, E)[:, :L]


def _products_blocked(dy, inputs, runs):
    B, T, E = dy.shape
    W = inputs.shape[1] - T + 1
    if runs is not None:
        runs = runs, runs[:, W - 1 :]
    blocks = _Blocks.of(inputs, runs, W)
    dy = jnp.pad(dy, ((0, 0), (0, blocks.count * blocks.size - T), (0, 0)))

    def block(dweight, k):
        seen = blocks.window(k, dy.dtype)
        dy_k = blocks.slice(dy, k, blocks.size)
        step = lambda j, dweight: dweight.at[j].add(jnp.sum(dy_k * seen(j), axis=0))
        return jax.lax.fori_loop(0, W, step, dweight, unroll=UNROLL), None

    zeros = varying(jnp.zeros((W, E), dy.dtype), (dy, inputs, runs))
    return jax.lax.scan(block, zeros, jnp.arange(B * blocks.count))[0]


@dataclasses.dataclass(frozen=True)
class _Blocks:
    """`count` blocks of `size` outputs in each row, with the W - 1 inputs before them."""

    x: jax.Array
    runs: tuple[jax.Array, jax.Array] | None
    W: int
    size: int
    count: int

    @classmethod
    def of(cls, x, runs, W):
        L, E = x.shape[1] - (W - 1), x.shape[2]
        size = min(L, max(16, BLOCK // E))
        count = -(-L // size)
        longer = lambda a: jnp.pad(a, ((0, 0), (0, count * size - L)) + ((0, 0),) * (a.ndim - 2))
        return cls(longer(x), jax.tree.map(longer, runs), W, size, count)

    def slice(self, a, k, length):
        """Returns `length` steps of block k of all rows' blocks."""
        start = (k // self.count, k % self.count * self.size) + (0,) * (a.ndim - 2)
        return jax.lax.dynamic_slice(a, start, (1, length, *a.shape[2:]))[0]

    def window(self, k, dtype):
        """Returns j -> inputs of row j of the kernel in block k, [size, E]."""
        x = self.slice(self.x, k, self.size + self.W - 1).astype(dtype)
        at = lambda a, j: jax.lax.dynamic_slice_in_dim(a, j, self.size)
        if self.runs is None:
            return lambda j: at(x, j)
        others = self.slice(self.runs[0], k, self.size + self.W - 1)
        own = self.slice(self.runs[1], k, self.size)
        return lambda j: jnp.where((at(others, j) == own)[:, None], at(x, j), 0)


def _validate(x, weight, bias, activation, initial_state, implementation):
    check_implementation("short_convolution", implementation)
    if activation not in ("silu", None):
        raise ValueError(f'activation must be "silu" or None, got {activation!r}')
    check_floating(x=x, weight=weight, bias=bias, initial_state=initial_state)
    if x.ndim != 3:
        raise ValueError(f"x must be [B, T, E], got shape {x.shape}")
    B, T, E = x.shape
    check_sizes(x=(x, "B, T, E"), weight=(weight, "W, E"))
    check_time(x=x)
    if weight.ndim != 2 or weight.shape[1] != E:
        raise ValueError(f"weight must be [W, E] with x's E = {E}, got shape {weight.shape}")
    W = weight.shape[0]
    check_shape("bias", bias, "E", (E,))
    check_shape("initial_state", initial_state, "B, W - 1, E", (B, W - 1, E))
