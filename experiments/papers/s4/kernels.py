"""S4's kernels: how exact they are, and what they cost against powers of a dense matrix.

Dimensions: H systems, L kernel length, N state dim (the whole of it).
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from tilescan.experiments.measurements import timing
from tilescan.models import s4 as mixers
from tilescan.ops import s4, state_space

DENSE, CAUCHY, POWERS, VANDERMONDE = "dense powers", "Cauchy", "powers in blocks", "S4D"
MIXERS = {"s4": mixers.S4, "s4d": mixers.S4D}


def exactness(settings: Mapping[str, Any], seed: int) -> dict:
    """Returns errors of the kernels against powers of the HiPPO matrix, and against recurrences.

    Settings: length, channels, state_dim, batch.

    Returns:
      {"kernel": {"Cauchy, float64", ...: error}, "mixer": {"s4", "s4d": error}}; errors are the
      largest difference over the largest value. The kernels' is to powers of the dense real
      HiPPO-LegS matrix, in NumPy's float64: nothing is shared but the definition. The mixers' is
      between a whole sequence at once and one token at a time, both in float32, outputs before
      the gate.
    """
    L, H, N = (settings[k] for k in ("length", "channels", "state_dim"))
    x = np.random.default_rng(seed).normal(size=(settings["batch"], L, H)).astype(np.float32)
    mixer = {name: _recurrence_error(mixer, N, x, seed) for name, mixer in MIXERS.items()}
    return {"kernel": kernel_errors(L, H, N, seed), "mixer": mixer}


def kernel_errors(L: int, H: int, N: int, seed: int) -> dict[str, float]:
    """Returns the {"Cauchy, float64", ...: error} of `exactness`."""
    rng = np.random.default_rng(seed)
    log_dt = rng.uniform(np.log(1e-3), np.log(1e-1), H)
    C = rng.normal(size=(H, N))
    truth = hippo_kernel(log_dt, C, L)
    Lambda, P, B, V = s4.hippo_legs_nplr(N)
    # Real states are V x + conj: y = C (V x) + its conjugate.
    system = (log_dt, Lambda[None], P[None], B[None], C @ V)
    found = {}
    for name, kernel in {CAUCHY: s4.s4_dplr_kernel, POWERS: state_space.dplr_kernel}.items():
        kernel = jax.jit(functools.partial(kernel, length=L))
        with jax.enable_x64(True):
            found[f"{name}, float64"] = _error(kernel(*map(jnp.asarray, system)), truth)
        found[f"{name}, float32"] = _error(kernel(*_single(system)), truth)
    return found


def hippo_kernel(log_dt: np.ndarray, C: np.ndarray, length: int) -> np.ndarray:
    """Returns K_l = C Abar^l Bbar [L, H] of HiPPO-LegS, bilinear, step by step in float64."""
    A, B = s4.hippo_legs(C.shape[1])
    kernel = np.empty((length, len(C)))
    for h, dt in enumerate(np.exp(log_dt)):
        left = np.eye(len(A)) - dt / 2 * A
        Abar = np.linalg.solve(left, np.eye(len(A)) + dt / 2 * A)
        x = np.linalg.solve(left, dt * B)
        for l in range(length):
            kernel[l, h] = C[h] @ x
            x = Abar @ x
    return kernel


def _recurrence_error(mixer: type[nn.Module], state_dim: int, x, seed: int) -> float:
    layer = mixer(x.shape[2], state_dim=state_dim, output="none")
    params = nn.unbox(jax.jit(layer.init)(jax.random.key(seed), x))

    @jax.jit
    def one_by_one(params, x):
        def step(state, now):
            y, state = layer.apply(params, now[:, None], state=state)
            return state, y[:, 0]

        _, y = jax.lax.scan(step, layer.init_state(len(x), x.shape[1]), x.swapaxes(0, 1))
        return y.swapaxes(0, 1)

    at_once = jax.jit(lambda params, x: layer.apply(params, x)[0])
    return _error(one_by_one(params, x), np.asarray(at_once(params, x), np.float64))


def _error(found, truth: np.ndarray) -> float:
    found = np.asarray(found, np.float64)
    return float(np.max(np.abs(found - truth)) / np.max(np.abs(truth)))


def _single(arrays) -> list:
    return [jnp.asarray(x, jnp.complex64 if np.iscomplexobj(x) else jnp.float32) for x in arrays]


def dense_kernel(log_dt, A, B, C, length: int):
    """Returns C Abar^l Bbar [L, H] by powers of a dense matrix, as table 2 has the LSSL.

    The states Abar^l Bbar of all times are made by doubling: O(N^2 L) work and O(N L) memory per
    system, in matrix products.

    Args:
      log_dt: [H]; A: [N, N]; B: [N]; C: [H, N], all real.
      length: L.
    """
    high = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
    A, B = A[None], jnp.broadcast_to(B[None, :, None], (*C.shape, 1))
    eye = jnp.eye(A.shape[1], dtype=A.dtype)[None]
    dt = jnp.exp(log_dt)[:, None, None]
    solved = jnp.linalg.solve(eye - dt / 2 * A, jnp.concatenate([eye + dt / 2 * A, dt * B], axis=2))
    power, states = solved[..., :-1], solved[..., -1:]  # [H, N, N], [H, N, 1]
    while states.shape[2] < length:
        states = jnp.concatenate([states, high(power, states)], 2)
        power = high(power, power)
    return jnp.einsum("hn,hnl->lh", C, states[..., :length], precision="highest")


def cost(settings: Mapping[str, Any], seed: int) -> dict:
    """Times a kernel and its gradient by all parameters: what `timing.compare` returns, by way.

    Settings: state_dim, length, channels, repeats, ways (of `ways`). "temp_bytes" is XLA's.
    """
    H, N, L = (settings[k] for k in ("channels", "state_dim", "length"))
    rng = np.random.default_rng(seed)
    weight = jnp.asarray(rng.normal(size=(L, H)), jnp.float32)
    A, b = s4.hippo_legs(N)
    Lambda, P, B, V = s4.hippo_legs_nplr(N)
    C = rng.normal(size=(H, N))
    log_dt = rng.uniform(np.log(1e-3), np.log(1e-1), H)
    system = _single((log_dt, A, b, C, Lambda[None], P[None], B[None], C @ V))

    def with_gradient(kernel):
        # The sum's weights stand for the gradient that comes from the convolution.
        return jax.value_and_grad(lambda system, weight: (kernel(*system) * weight).sum())

    known = ways(L)
    functions = {name: with_gradient(known[name]) for name in settings["ways"]}
    return timing.compare(functions, (system, weight), repeats=settings["repeats"])


def ways(length: int) -> dict[str, Callable]:
    """Returns functions (log_dt, A, b, C, Lambda, P, B, C in Lambda's basis) -> kernel [L, H]."""
    cauchy = functools.partial(s4.s4_dplr_kernel, length=length, truncated=True)
    powers = functools.partial(state_space.dplr_kernel, length=length)
    return {
        DENSE: lambda log_dt, A, b, C, *modes: dense_kernel(log_dt, A, b, C, length),
        CAUCHY: lambda log_dt, A, b, C, *modes: cauchy(log_dt, *modes),
        POWERS: lambda log_dt, A, b, C, *modes: powers(log_dt, *modes),
        VANDERMONDE: lambda log_dt, A, b, C, L, P, B, modes: s4.s4d_kernel(
            log_dt, L, B, modes, length
        ),
    }
