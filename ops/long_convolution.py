"""Causal convolution with a kernel as long as the sequence, in O(T log T) time and O(T) memory.

A linear convolution needs 2M points of a cyclic one, M >= (T + K - 1) / 2. All inputs are real, so
M complex points are enough: with the weights w^t, w = exp(i pi / 2M), the cyclic convolution of
length M multiplies what wraps around by w^M = i, and the real part of the unweighted result is its
first half, the imaginary part its second (the "right-angle" convolution). No array is padded with
zeros to twice its length, and the tail that the next call needs is there for free.

The transform is XLA's FFT, or two matmuls with a factored DFT matrix (FlashConv's Monarch form,
arXiv 2212.14052, section 4; FlashFFTConv, 2311.05908), for machines that multiply matrices fast and
transform slowly. Channels are computed a block at a time, so that a block's spectra stay in cache.

Dimensions: B batch, T time, K kernel length, E embedding (channels).
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from tilescan.ops.arrays import AnyArray
from tilescan.ops.attention_xla import varying
from tilescan.ops.explicit_axes import partitioned_by_dimensions
from tilescan.ops.lowering import NO_KERNEL, choose_when_lowered, note
from tilescan.ops.recurrence_arguments import (
    check_floating,
    check_implementation,
    check_shape,
    check_time,
)
from tilescan.ops.reverse_mode import written_vjp
from tilescan.ops.sizes import check_sizes

__all__ = ["long_convolution"]

METHODS = ("fft", "matmul", "direct", None)
# With so few taps or inputs, as in decoding, adding shifted products costs less than transforms.
_DIRECT = 16
# Complex values of a block of channels. On CPUs a block's spectra should stay in the cache.
_CPU_BLOCK, _BLOCK = 2**18, 2**25


@partitioned_by_dimensions(
    ("BTE", "BKE"),
    u="BTE",
    kernel="KE",
    D="E",
    pre_gate="BTE",
    post_gate="BTE",
    initial_state="BKE",
)
def long_convolution(
    u: Float[AnyArray, "B T E"],
    kernel: Float[AnyArray, "K E"],
    *,
    D: Float[AnyArray, " E"] | None = None,
    pre_gate: Float[AnyArray, "B T E"] | None = None,
    post_gate: Float[AnyArray, "B T E"] | None = None,
    initial_state: Float[AnyArray, "B K-1 E"] | None = None,
    method: str | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T E"], Float[Array, "B K-1 E"]]:
    """Computes y_t = post_gate_t (sum_(s <= t) kernel_(t-s) x_s + D x_t), x = pre_gate u.

    Args:
      u: inputs [B, T, E].
      kernel: [K, E], of any length K >= 1; kernel_0 multiplies the present input.
      D: skip weights [E], none when None.
      pre_gate, post_gate: factors [B, T, E] of the inputs and of the outputs (H3's gates).
      initial_state: what inputs before u add to the sums of the next K - 1 steps, before D and
        post_gate: [B, K - 1, E], a former call's final_state with the same kernel. Zeros when
        None. It is exact, however the sequence is split (overlap-add).
      method: "fft"; "matmul", a DFT by matrix products; "direct", a loop over the fewer of inputs
        and taps; or None: "direct" where one of them is short, otherwise "matmul" when lowered
        for a TPU and "fft" elsewhere.
      implementation: "xla" or None, which is the same.

    Returns:
      y [B, T, E] in u's dtype, and final_state [B, K - 1, E] in the dtype of the computation,
      float32 (float64 for float64) whatever the inputs are: of bfloat16 ones, its error on CPUs
      is below 1e-5 of its largest entry.

    The backward pass transforms the inputs again, so that no spectrum is kept for it: its memory
    is the inputs' and one block of channels. Differentiable once, in reverse mode.

    Raises:
      ValueError: shapes, method or implementation that do not fit.
      TypeError: dtypes that are not floating.
    """
    _validate(u, kernel, D, pre_gate, post_gate, initial_state, method, implementation)
    # The gated inputs, in float32 at least.
    T, E, K = *u.shape[1:], kernel.shape[0]
    dtype = jnp.promote_types(u.dtype, jnp.float32)
    x = u.astype(dtype)
    if pre_gate is not None:
        x = x * pre_gate.astype(dtype)

    # All T + K - 1 outputs: T are y, the others the state, to which the initial one is added.
    if method is None and min(T, K) <= _DIRECT:
        method = "direct"
    if method == "direct":
        y = jax.checkpoint(_direct)(x, kernel.astype(dtype))
        y, final_state = y[:, :T], y[:, T:]
    else:
        arrays = x, kernel.astype(dtype)
        y, final_state = _convolve(*varying(arrays, arrays), method)
    if initial_state is not None:
        state = initial_state.astype(dtype)
        n = min(T, K - 1)
        y = y.at[:, :n].add(state[:, :n])
        final_state = final_state.at[:, : K - 1 - n].add(state[:, n:])

    # Skip and gate.
    if D is not None:
        y = y + x * D.astype(dtype).reshape(1, 1, E)
    if post_gate is not None:
        y = y * post_gate.astype(dtype)
    return y.astype(u.dtype), final_state


def _direct(x, kernel):
    """Returns all T + K - 1 outputs, as a sum over the shorter of the two."""
    T, K = x.shape[1], kernel.shape[0]
    kernel = kernel[None]
    short, long = (x, kernel) if T < K else (kernel, x)
    n = short.shape[1]
    long = jnp.pad(long, ((0, 0), (n - 1, n - 1), (0, 0)))
    return sum(short[:, j : j + 1] * long[:, n - 1 - j : n - 1 - j + T + K - 1] for j in range(n))


@functools.partial(written_vjp, nondiff_argnums=(2,))
def _convolve(x, kernel, method):
    """Returns the first T of all T + K - 1 outputs, and the others; x [B, T, E], kernel [K, E]."""
    return _dispatch(_forward, method, x, kernel)


def _convolve_fwd(x, kernel, method):
    return _convolve(x.value, kernel.value, method), (x.value, kernel.value)


def _convolve_bwd(method, residuals, cotangents):
    x, kernel = residuals
    dy, dtail = cotangents
    if isinstance(dy, jax.custom_derivatives.SymbolicZero):
        dy = jnp.zeros(dy.shape, dy.dtype)
    if not isinstance(dtail, jax.custom_derivatives.SymbolicZero):
        dy = jnp.concatenate([dy, dtail], axis=1)
    return tuple(_dispatch(_backward, method, x, kernel, dy))


_convolve.defvjp(_convolve_fwd, _convolve_bwd, symbolic_zeros=True)


def _dispatch(direction, method, *arrays):
    def call(method, block):
        return functools.partial(direction, method=method, block=block)

    def pick(platform):
        note("long_convolution", NO_KERNEL)
        if platform == "cpu":
            return call(method or "fft", _CPU_BLOCK)
        return call(method or ("matmul" if platform == "tpu" else "fft"), _BLOCK)

    return choose_when_lowered(pick, call(method or "fft", _CPU_BLOCK), *arrays)


def _forward(x, kernel, *, method, block):
    T, K = x.shape[1], kernel.shape[0]
    transform = _transform(method, T + K - 1, x.dtype)

    def one(x, kernel):
        y = transform.inverse(_multiply(transform(x), transform(kernel[None])), T + K - 1)
        return y[:, :T], y[:, T:]

    return _by_channels(one, block // max(x.shape[0] * transform.M, 1), x, kernel)


def _backward(x, kernel, dy, *, method, block):
    """Returns correlations with kernel and inputs; the transform is unitary up to 1/M."""
    T, K = x.shape[1], kernel.shape[0]
    transform = _transform(method, T + K - 1, x.dtype)

    def one(x, kernel, dy):
        g = transform(dy)
        dx = transform.inverse(_multiply(g, _conjugate(transform(kernel[None]))), T)
        dk = _multiply(g, _conjugate(transform(x)))
        dk = jax.tree.map(lambda z: z.sum(0, keepdims=True), dk)
        return dx, transform.inverse(dk, K)[0]

    return _by_channels(one, block // max(x.shape[0] * transform.M, 1), x, kernel, dy)


def _by_channels(function, e, *arrays):
    """Returns function(*arrays), in a loop over blocks of about `e` of the last axis."""
    E = arrays[0].shape[-1]
    blocks = -(-E // max(e, 8))
    if blocks == 1:
        return function(*arrays)
    e = -(-E // blocks)
    blocks = -(-E // e)
    pad = lambda a: jnp.pad(a, [(0, 0)] * (a.ndim - 1) + [(0, blocks * e - E)])
    arrays = [pad(a) for a in arrays]

    def step(out, i):
        take = lambda a: jax.lax.dynamic_slice_in_dim(a, i * e, e, a.ndim - 1)
        put = lambda a, b: jax.lax.dynamic_update_slice_in_dim(a, b, i * e, a.ndim - 1)
        return jax.tree.map(put, out, function(*map(take, arrays))), None

    shapes = jax.eval_shape(lambda *a: function(*(x[..., :e] for x in a)), *arrays)
    out = jax.tree.map(lambda s: jnp.zeros((*s.shape[:-1], blocks * e), s.dtype), shapes)
    out = jax.lax.scan(step, out, jnp.arange(blocks))[0]
    return jax.tree.map(lambda a: a[..., :E], out)


def _transform(method, length, dtype):
    points = -(-length // 2)
    return (_Matmul if method == "matmul" else _FFT)(points, dtype)


def _fold(x, M):
    """Returns x_t + i x_(t+M) as real and imaginary part [B, M, E]; None for the latter if 0."""
    pad = lambda a: jnp.pad(a, ((0, 0), (0, M - a.shape[1]), (0, 0)))
    return pad(x[:, :M]), pad(x[:, M:]) if x.shape[1] > M else None


def _unfold(re, im, length):
    M = re.shape[1]
    return re[:, :length] if length <= M else jnp.concatenate([re, im[:, : length - M]], axis=1)


class _FFT:
    """Spectra as complex arrays [B, E, M]: FFTs want the last axis."""

    def __init__(self, points, dtype):
        self.M = _smooth(points)
        w = np.exp(0.5j * np.pi / self.M * np.arange(self.M)).reshape(1, 1, -1)
        self.cos, self.sin = jnp.asarray(w.real, dtype), jnp.asarray(w.imag, dtype)

    def __call__(self, x):
        re, im = (a if a is None else _unfused(jnp.swapaxes(a, 1, 2)) for a in _fold(x, self.M))
        if im is None:
            return jnp.fft.fft(jax.lax.complex(re * self.cos, re * self.sin))
        weights = jax.lax.complex(self.cos, self.sin)
        return jnp.fft.fft(jax.lax.complex(re, im) * weights)

    def inverse(self, z, length):
        z = jnp.fft.ifft(z)
        re = z.real * self.cos + z.imag * self.sin
        im = z.imag * self.cos - z.real * self.sin
        return _unfold(*(jnp.swapaxes(_unfused(a), 1, 2) for a in (re, im)), length)


def _unfused(x):
    """Returns x, not fused with its users: on CPUs a transpose is slow inside another loop."""
    return jax.lax.optimization_barrier(x)


class _Matmul:
    """Spectra as pairs of real arrays [B, N1, N2, E], M = N1 N2, in the order the matmuls leave.

    With t = n1 N2 + n2 and frequency k1 + N1 k2, a DFT is one over n1, a factor, and one over n2.
    The weights w^t = w^(n1 N2) w^n2 are in the first matrix and in the factor. Products of spectra
    don't depend on the order, so it is never undone.
    """

    def __init__(self, points, dtype):
        N1 = 2 ** round(math.log2(points) / 2)
        N2 = -(-points // N1)
        self.M = M = N1 * N2
        n1, n2 = np.arange(N1), np.arange(N2)
        turn = lambda x: np.exp(2j * np.pi * (x % 1.0))
        first = turn(-np.outer(n1, n1) / N1) * turn(n1 / (4 * N1))  # [k1, n1]
        factor = turn(-np.outer(n1, n2) / M) * turn(n2 / (4 * M))  # [k1, n2]
        second = turn(-np.outer(n2, n2) / N2)  # [k2, n2]
        pair = lambda z: (jnp.asarray(z.real, dtype), jnp.asarray(z.imag, dtype))
        self.first, self.second = pair(first), pair(second)
        self.factor = pair(factor[None, :, :, None])

    def _apply(self, equation, matrix, z):
        dot = functools.partial(jnp.einsum, equation, precision=jax.lax.Precision.HIGHEST)
        (a, b), (re, im) = matrix, z
        if im is None:
            return dot(a, re), dot(b, re)
        return dot(a, re) - dot(b, im), dot(a, im) + dot(b, re)

    def __call__(self, x):
        N1 = len(self.first[0])
        split = lambda a: a if a is None else a.reshape(a.shape[0], N1, self.M // N1, a.shape[2])
        z = tuple(split(a) for a in _fold(x, self.M))
        z = self._apply("kn,bnme->bkme", self.first, z)
        z = _multiply(z, self.factor)
        return self._apply("lm,bkme->bkle", self.second, z)

    def inverse(self, z, length):
        z = self._apply("lm,bkle->bkme", _conjugate(self.second), z)
        z = _multiply(z, _conjugate(self.factor))
        z = self._apply("kn,bkme->bnme", _conjugate(self.first), z)
        re, im = (a.reshape(a.shape[0], self.M, a.shape[3]) / self.M for a in z)
        return _unfold(re, im, length)


def _multiply(x, y):
    if not isinstance(x, tuple):
        return x * y
    return x[0] * y[0] - x[1] * y[1], x[0] * y[1] + x[1] * y[0]


def _conjugate(x):
    return (x[0], -x[1]) if isinstance(x, tuple) else x.conj()


def _smooth(n):
    """Returns the least 2^a 3^b 5^c >= n with at most one 3 and one 5, for which FFTs are fast."""
    return min(odd * 2 ** max(0, math.ceil(math.log2(n / odd))) for odd in (1, 3, 5, 15))


def _validate(u, kernel, D, pre_gate, post_gate, initial_state, method, implementation):
    check_implementation("long_convolution", implementation)
    if method not in METHODS:
        raise ValueError(
            f"method={method!r} is unknown; it must be one of " + ", ".join(map(repr, METHODS))
        )
    named = dict(u=u, kernel=kernel, D=D, initial_state=initial_state)
    named |= dict(pre_gate=pre_gate, post_gate=post_gate)
    check_floating(**named)
    if u.ndim != 3:
        raise ValueError(f"u must be [B, T, E], got shape {u.shape}")
    B, T, E = u.shape
    check_sizes(u=(u, "B, T, E"), kernel=(kernel, "K, E"))
    if kernel.ndim != 2 or kernel.shape[1] != E:
        raise ValueError(f"kernel must be [K, E] with u's E = {E}, got shape {kernel.shape}")
    K = kernel.shape[0]
    shapes = dict(D=(E,), initial_state=(B, K - 1, E), pre_gate=u.shape, post_gate=u.shape)
    letters = dict(D="E", initial_state="B, K - 1, E")
    for name, shape in shapes.items():
        check_shape(name, named[name], letters.get(name, "B, T, E"), shape)
    # What is computed has all T + K - 1 outputs.
    check_time(u=u, outputs=jax.ShapeDtypeStruct((B, T + K - 1, E), u.dtype))
