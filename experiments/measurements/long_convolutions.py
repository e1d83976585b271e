"""Time of a gated long convolution, by this project's op and by JAX's FFT, beside attention's."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from tilescan.experiments.measurements import timing
from tilescan.ops import masks
from tilescan.ops.attention import attention
from tilescan.ops.long_convolution import long_convolution


def compare_convolutions(settings: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """Times one layer's mixing, forward, interleaved; returns what `timing.compare` does.

    Settings: batch, length, channels, head_dim (attention has channels / head_dim heads), repeats.
    """
    B, T, E, D = (settings[k] for k in ("batch", "length", "channels", "head_dim"))
    x, q, gate = jax.random.normal(jax.random.key(seed), (3, B, T, E))
    kernel = jax.random.normal(jax.random.key(seed + 1), (T, E)) / T

    def fft(x, q, gate, kernel):
        n = 2 * T
        spectrum = jnp.fft.rfft(x * gate, n, axis=1) * jnp.fft.rfft(kernel, n, axis=0)[None]
        return q * jnp.fft.irfft(spectrum, n, axis=1)[:, :T]

    def fused(x, q, gate, kernel):
        return long_convolution(x, kernel, pre_gate=gate, post_gate=q)[0]

    def attend(x, q, gate, kernel):
        heads = [a.reshape(B, T, E // D, D) for a in (q, gate, x)]
        return attention(*heads, mask=masks.Causal()).reshape(x.shape)

    functions = {"long convolution": fused, "FFT of JAX": fft, "attention": attend}
    return timing.compare(functions, (x, q, gate, kernel), repeats=settings["repeats"])
