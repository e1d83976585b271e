"""Kernels of state spaces: how exact they are, what they cost against powers of a dense matrix.

Dimensions: H systems, L kernel length, N state dim (the whole of it).
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Float

from tilescan.experiments.measurements import timing
from tilescan.models import s4 as mixers
from tilescan.ops import reference, s4, state_space

DENSE, CAUCHY, POWERS, VANDERMONDE = "dense powers", "Cauchy", "powers in blocks", "S4D"
MIXERS = {"s4": mixers.S4, "s4d": mixers.S4D}


def exactness(settings: Mapping[str, Any], seed: int) -> dict[str, Any]:
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
    dense, modes = systems(rng.normal(size=(H, N)))
    truth = reference.state_space_kernel(log_dt, *dense, L)
    found = {}
    for name, kernel in {CAUCHY: s4.s4_dplr_kernel, POWERS: state_space.dplr_kernel}.items():
        kernel = jax.jit(functools.partial(kernel, length=L))
        with jax.enable_x64(True):
            found[f"{name}, float64"] = error(kernel(*map(jnp.asarray, (log_dt, *modes))), truth)
        found[f"{name}, float32"] = error(kernel(*single(log_dt, *modes)), truth)
    return found


def systems(C: Float[np.ndarray, "H N"]) -> tuple[tuple[np.ndarray, ...], tuple[np.ndarray, ...]]:
    """Returns HiPPO-LegS's (A, B, C), dense and real, and its (Lambda, P, B, C) of modes.

    Real states are V x + conj: y = C (V x) + its conjugate.
    """
    Lambda, P, B, V = s4.hippo_legs_nplr(C.shape[1])
    return (*s4.hippo_legs(C.shape[1]), C), (Lambda[None], P[None], B[None], C @ V)


def single(*arrays: np.ndarray) -> list[jax.Array]:
    """Returns arrays in single precision, complex or not."""
    return [jnp.asarray(x, jnp.complex64 if np.iscomplexobj(x) else jnp.float32) for x in arrays]


def _recurrence_error(mixer: type[nn.Module], state_dim: int, x: np.ndarray, seed: int) -> float:
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
    return error(one_by_one(params, x), np.asarray(at_once(params, x), np.float64))


def error(found: jax.Array, truth: np.ndarray) -> float:
    """Returns the largest difference over the largest value."""
    found = np.asarray(found, np.float64)
    return float(np.max(np.abs(found - truth)) / np.max(np.abs(truth)))


def cost(settings: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """Times a kernel and its gradient by all parameters: what `timing.compare` returns, by method.

    Settings: state_dim, length, channels, repeats, ways (of `kernels`). "temp_bytes" is XLA's.
    """
    H, N, L = (settings[k] for k in ("channels", "state_dim", "length"))
    rng = np.random.default_rng(seed)
    weight = jnp.asarray(rng.normal(size=(L, H)), jnp.float32)
    dense, modes = systems(rng.normal(size=(H, N)))
    log_dt = rng.uniform(np.log(1e-3), np.log(1e-1), H)
    system = tuple(single(log_dt, *dense, *modes))

    def with_gradient(kernel: Callable) -> Callable:
        # The sum's weights stand for the gradient that comes from the convolution.
        return jax.value_and_grad(lambda system, weight: (kernel(*system) * weight).sum())

    known = kernels(L)
    functions = {name: with_gradient(known[name]) for name in settings["ways"]}
    return timing.compare(functions, (system, weight), repeats=settings["repeats"])


def kernels(length: int) -> dict[str, Callable]:
    """Returns functions (log_dt, A, b, C, Lambda, P, B, C in Lambda's basis) -> kernel [L, H]."""
    cauchy = functools.partial(s4.s4_dplr_kernel, length=length, truncated=True)
    powers = functools.partial(state_space.dplr_kernel, length=length)
    dense = functools.partial(reference.state_space_kernel_by_powers, length=length)
    return {
        DENSE: lambda *system: dense(*system[:4]),
        CAUCHY: lambda log_dt, A, b, C, *modes: cauchy(log_dt, *modes),
        POWERS: lambda log_dt, A, b, C, *modes: powers(log_dt, *modes),
        VANDERMONDE: lambda log_dt, A, b, C, L, P, B, D: s4.s4d_kernel(log_dt, L, B, D, length),
    }
