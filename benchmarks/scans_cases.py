"""The cases and peers of benchmarks.scans; run as a program, one of them once, for its memory.

    python -m tilescan.benchmarks.scans_cases tilescan '{"op": "ssd", "T": 8192, ...}'

imports little else, so that the peak that it prints is the scan's own.

Dimensions: B batch, T time, H heads, D head dim or channels, N state dim, C chunk.
"""

import dataclasses
import functools
import importlib.util
import json
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from tilescan import ops
from tilescan.benchmarks.environment import peak_memory_mb


@dataclasses.dataclass(frozen=True)
class Case:
    """One shape of one op; decay is "weak" (of most steps, as of trained models) or "strong"."""

    op: str
    direction: str
    T: int
    B: int = 1
    H: int = 8
    D: int = 64
    N: int = 64
    decay: str = "weak"
    dtype: str = "float32"

    @property
    def name(self) -> str:
        """The case in words, as tables name it."""
        strong = " strong decays" if self.decay == "strong" else ""
        return f"{self.op}{strong} {self.direction} T={self.T}"


SIZES = {
    "linear_recurrence": dict(T=65536, H=1, D=256, N=1),
    "selective_scan": dict(T=4096, H=1, D=512, N=16),
    "ssd": dict(T=8192),
    "gated_linear_attention": dict(T=8192),
    "gated_delta_rule": dict(T=8192),
    "long_convolution": dict(T=16384, H=1, D=256, N=1),
}
CASES = [
    Case(op, direction, **shape) for op, shape in SIZES.items() for direction in ("fwd", "fwd+bwd")
]
CASES.insert(-4, Case("gated_linear_attention", "fwd+bwd", 8192, decay="strong"))
CROSSOVER = [
    Case("crossover", direction, T)
    for direction in ("fwd", "fwd+bwd")
    for T in (256, 512, 1024, 2048, 4096, 8192, 16384)
]


def inputs(case: Case) -> dict[str, Float[Array, "..."]]:
    """Returns a case's arrays by name; a cotangent "dy" of the output for a backward pass."""
    rng = np.random.default_rng(0)
    B, T, H, D, N = case.B, case.T, case.H, case.D, case.N
    strength = 0.0 if case.decay == "weak" else 5.0

    def normal(*shape):
        return rng.standard_normal(shape, np.float32)

    softplus = lambda x: np.logaddexp(x, 0.0, dtype=np.float32)
    heads = lambda n: normal(B, T, H, n)
    unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)
    rate = lambda *shape: -softplus(normal(*shape) + strength) / 16
    make = {
        "linear_recurrence": lambda: dict(
            a=1 - rng.random((B, T, D), np.float32) / 8, b=normal(B, T, D)
        ),
        "selective_scan": lambda: dict(
            x=normal(B, T, D), dt=softplus(normal(B, T, D) - 3),
            A=-np.tile(np.arange(1, N + 1, dtype=np.float32), (D, 1)),
            B=normal(B, T, N), C=normal(B, T, N),
        ),
        "ssd": lambda: dict(
            x=heads(D), dt=softplus(normal(B, T, H) - 2), A=-np.exp(normal(H)),
            B=heads(N) / 8, C=heads(N),
        ),
        "gated_linear_attention": lambda: dict(
            q=heads(N), k=heads(N) / 8, v=heads(D), log_decay=rate(B, T, H, N)
        ),
        "gated_delta_rule": lambda: dict(
            q=heads(N), k=unit(heads(N)), v=heads(D), beta=rng.random((B, T, H), np.float32),
            log_decay=rate(B, T, H),
        ),
        "long_convolution": lambda: dict(u=normal(B, T, D), kernel=normal(T, D) / 100),
        "crossover": lambda: dict(
            q=heads(N), k=heads(N) / 8, v=heads(D), dt=softplus(normal(B, T, H) - 2),
            A=-np.exp(normal(H)), log_decay=rate(B, T, H, N),
        ),
    }  # fmt: skip
    arrays = make[case.op]()
    if case.direction != "fwd":
        shape = (B, T, H, D) if "H" in LETTERS[case.op][0] else (B, T, D)
        arrays["dy"] = normal(*shape)
    wide = ("dt", "A", "log_decay", "beta")  # float32 in the ops, whatever the other inputs are
    dtype = lambda name: "float32" if name in wide else case.dtype
    return {name: jnp.asarray(x, dtype(name)) for name, x in arrays.items()}


# Dimensions of the arrays, the output's first. One head or channel of all is checked in float64.
LETTERS = {
    "linear_recurrence": ("BTD", dict(a="BTD", b="BTD")),
    "selective_scan": ("BTD", dict(x="BTD", dt="BTD", A="DN", B="BTN", C="BTN")),
    "ssd": ("BTHD", dict(x="BTHD", dt="BTH", A="H", B="BTHN", C="BTHN")),
    "gated_linear_attention": ("BTHD", dict(q="BTHN", k="BTHN", v="BTHD", log_decay="BTHN")),
    "gated_delta_rule": ("BTHD", dict(q="BTHN", k="BTHN", v="BTHD", beta="BTH", log_decay="BTH")),
    "long_convolution": ("BTD", dict(u="BTD", kernel="TD")),
    "crossover": ("BTHD", {}),
}


def over_time(
    step: Callable, h: jax.Array, *xs: Float[Array, "B T ..."]
) -> Float[Array, "B T ..."]:
    """Returns the outputs of `step` by `jax.lax.scan` over time."""
    y = jax.lax.scan(step, h, tuple(jnp.moveaxis(x, 1, 0) for x in xs))[1]
    return jnp.moveaxis(y, 0, 1)


# Plain lax.scan, which in float64 also gives the exact results.


def recurrence_by_steps(
    a: Float[Array, "B T D"], b: Float[Array, "B T D"]
) -> Float[Array, "B T D"]:
    """Returns h_t = a_t h_{t-1} + b_t, a step at a time."""

    def step(h, x):
        h = x[0] * h + x[1]
        return h, h

    return over_time(step, jnp.zeros_like(b[:, 0]), a, b)


def selective_by_steps(
    x: Float[Array, "B T D"],
    dt: Float[Array, "B T D"],
    A: Float[Array, "D N"],
    B: Float[Array, "B T N"],
    C: Float[Array, "B T N"],
    *,
    checkpoint_every: int | None = None,
) -> Float[Array, "B T D"]:
    """Returns h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t and y_t = C_t h_t, a step at a time.

    Args:
      checkpoint_every: keep the state of every so many steps and compute the others again.
    """

    def step(h, inputs):
        x, dt, B, C = inputs
        h = jnp.exp(dt[..., None] * A[None]) * h + (dt * x)[..., None] * B[:, None]
        return h, jnp.einsum("ben,bn->be", h, C, precision="highest")

    h = jnp.zeros((x.shape[0], *A.shape), dt.dtype)
    if checkpoint_every is None:
        return over_time(step, h, x, dt, B, C)
    chunks = lambda v: v.reshape(v.shape[0], -1, checkpoint_every, *v.shape[2:])
    chunk = jax.checkpoint(
        lambda h, xs: jax.lax.scan(
            step, h, tuple(jnp.moveaxis(x, 1, 0) for x in xs), unroll=checkpoint_every
        )
    )
    y = over_time(chunk, h, *(chunks(v) for v in (x, dt, B, C)))  # [C, T / C, B, D]
    return jnp.moveaxis(y, (2, 1), (0, 1)).reshape(x.shape)


def ssd_by_steps(
    x: Float[Array, "B T H D"],
    dt: Float[Array, "B T H"],
    A: Float[Array, "H"],
    B: Float[Array, "B T H N"],
    C: Float[Array, "B T H N"],
) -> Float[Array, "B T H D"]:
    """Returns Mamba-2's scan, a step at a time: attention with decays exp(dt A) and values dt x."""
    return attention_by_steps(C, B, x * dt[..., None], (dt * A[None, None])[..., None], scale=1.0)


def attention_by_steps(
    q: Float[Array, "B T H N"],
    k: Float[Array, "B T H N"],
    v: Float[Array, "B T H D"],
    log_decay: Float[Array, "B T H #N"],
    scale: float | None = None,
) -> Float[Array, "B T H D"]:
    """Returns S_t = diag(a_t) S_{t-1} + k_t v_t^T and scale q_t S_t, a step at a time."""

    def step(S, x):
        q, k, v, a = x
        S = jnp.exp(a)[..., None] * S + k[..., None] * v[..., None, :]
        return S, jnp.einsum("bhnd,bhn->bhd", S, q, precision="highest")

    S = jnp.zeros((*q[:, 0].shape, v.shape[-1]), log_decay.dtype)
    return over_time(step, S, q, k, v, log_decay) * (
        q.shape[-1] ** -0.5 if scale is None else scale
    )


def delta_by_steps(
    q: Float[Array, "B T H N"],
    k: Float[Array, "B T H N"],
    v: Float[Array, "B T H D"],
    beta: Float[Array, "B T H"],
    log_decay: Float[Array, "B T H"],
) -> Float[Array, "B T H D"]:
    """Returns S_t = a_t S_{t-1} + beta_t k_t (v_t - a_t S_{t-1}^T k_t)^T, read by q_t, in steps."""

    def step(S, x):
        q, k, v, beta, a = x
        S = jnp.exp(a)[..., None, None] * S
        v = beta[..., None] * (v - jnp.einsum("bhnd,bhn->bhd", S, k, precision="highest"))
        S = S + k[..., None] * v[..., None, :]
        return S, jnp.einsum("bhnd,bhn->bhd", S, q, precision="highest")

    S = jnp.zeros((*q[:, 0].shape, v.shape[-1]), log_decay.dtype)
    return over_time(step, S, q, k, v, beta, log_decay) * q.shape[-1] ** -0.5


def fft_convolution(u: Float[Array, "B T D"], kernel: Float[Array, "T D"]) -> Float[Array, "B T D"]:
    """Returns the causal convolution by FFTs along axis 1."""
    T = u.shape[1]
    spectrum = jnp.fft.rfft(u, 2 * T, axis=1) * jnp.fft.rfft(kernel, 2 * T, axis=0)[None]
    return jnp.fft.irfft(spectrum, 2 * T, axis=1)[:, :T]


def fft_convolution_last_axis(
    u: Float[Array, "B T D"], kernel: Float[Array, "T D"]
) -> Float[Array, "B T D"]:
    """Returns the causal convolution, transposed so that FFTs run along the last axis."""
    T = u.shape[1]
    spectrum = jnp.fft.rfft(jnp.swapaxes(u, 1, 2), 2 * T) * jnp.fft.rfft(kernel.T, 2 * T)[None]
    return jnp.swapaxes(jnp.fft.irfft(spectrum, 2 * T)[..., :T], 1, 2)


def recurrence_associative(
    a: Float[Array, "B T D"], b: Float[Array, "B T D"]
) -> Float[Array, "B T D"]:
    """Returns h_t = a_t h_{t-1} + b_t by `jax.lax.associative_scan`."""
    join = lambda x, y: (y[0] * x[0], y[0] * x[1] + y[1])
    return jax.lax.associative_scan(join, (a, b), axis=1)[1]


def ssd_formula(
    x: Float[Array, "B T H D"],
    dt: Float[Array, "B T H"],
    A: Float[Array, "H"],
    B: Float[Array, "B T H N"],
    C: Float[Array, "B T H N"],
    *,
    chunk: int,
) -> Float[Array, "B T H D"]:
    """Returns Mamba-2's SSD (arXiv 2405.21060, section 6), all chunks in one batched product."""
    chunks = lambda v: jnp.moveaxis(v.reshape(v.shape[0], -1, chunk, *v.shape[2:]), 3, 2)
    v, k, q = (chunks(y) for y in (x * dt[..., None], B, C))  # [B, T / C, H, C, ...]
    a = jnp.cumsum(chunks(dt * A[None, None]), -1)
    ratios = jnp.exp(
        jnp.where(jnp.tri(chunk, dtype=bool), a[..., :, None] - a[..., None, :], -jnp.inf)
    )
    # Inside the chunks; then each chunk's own state, the states at the starts, their outputs.
    y = jnp.einsum("bchin,bchjn,bchij,bchjp->bchip", q, k, ratios, v)
    own = jnp.einsum("bchjn,bchj,bchjp->bchnp", k, jnp.exp(a[..., -1:] - a), v)
    step = lambda S, x: (x[0][..., None, None] * S + x[1], S)
    starts = over_time(step, jnp.zeros_like(own[:, 0]), jnp.exp(a[..., -1]), own)
    y = y + jnp.einsum("bchin,bchi,bchnp->bchip", q, jnp.exp(a), starts)
    return jnp.moveaxis(y, 2, 3).reshape(x.shape)


def jla(kind: str, *arguments: jax.Array, chunk: int, **gates: Any) -> Float[Array, "B T H D"]:
    """Returns what the package jax-linear-attention gives, by its chunked code in plain JAX."""
    from jla.ops import linear_attention

    return linear_attention(kind, *arguments, impl="chunked", chunk_size=chunk, **gates)[0]


def jla_ssd(
    x: Float[Array, "B T H D"],
    dt: Float[Array, "B T H"],
    A: Float[Array, "H"],
    B: Float[Array, "B T H N"],
    C: Float[Array, "B T H N"],
    *,
    chunk: int,
) -> Float[Array, "B T H D"]:
    """Returns jax-linear-attention's simple_gla of Mamba-2's inputs."""
    v, g = (x * dt[..., None]).astype(x.dtype), dt * A[None, None]
    return jla("simple_gla", C, B, v, g=g, scale=1.0, chunk=chunk)


def jla_attention(
    q: Float[Array, "B T H N"],
    k: Float[Array, "B T H N"],
    v: Float[Array, "B T H D"],
    log_decay: Float[Array, "B T H N"],
    *,
    chunk: int,
) -> Float[Array, "B T H D"]:
    """Returns jax-linear-attention's gla."""
    return jla("gla", q, k, v, g=log_decay, chunk=chunk)


def jla_delta(
    q: Float[Array, "B T H N"],
    k: Float[Array, "B T H N"],
    v: Float[Array, "B T H D"],
    beta: Float[Array, "B T H"],
    log_decay: Float[Array, "B T H"],
    *,
    chunk: int,
) -> Float[Array, "B T H D"]:
    """Returns jax-linear-attention's gated_deltanet."""
    return jla("gated_deltanet", q, k, v, g=log_decay, beta=beta, chunk=chunk)


def first(op: Callable, **options: Any) -> Callable[..., jax.Array]:
    """Returns `op` without its final state."""
    return lambda *arrays: op(*arrays, **options)[0]


def chunked(name: str, f: Callable) -> dict[str, Callable]:
    """Returns a peer in chunks of 64 and of 128 steps."""
    return {f"{name}, chunk {c}": functools.partial(f, chunk=c) for c in (64, 128)}


# By op: peers that take its arrays in order, ours first, and plain steps.
PEERS = {
    "linear_recurrence": {
        "tilescan": first(ops.linear_recurrence),
        "lax.scan": recurrence_by_steps,
        "lax.associative_scan": recurrence_associative,
    },
    "selective_scan": {
        "tilescan": first(ops.selective_scan),
        "lax.scan": selective_by_steps,
        "lax.scan, 8-step checkpoints": functools.partial(selective_by_steps, checkpoint_every=8),
    },
    "ssd": {
        "tilescan": first(ops.ssd),
        **chunked("jax-linear-attention", jla_ssd),
        **chunked("paper's formula, jnp", ssd_formula),
    },
    "gated_linear_attention": {
        "tilescan": first(ops.gated_linear_attention),
        **chunked("jax-linear-attention", jla_attention),
    },
    "gated_delta_rule": {
        "tilescan": first(ops.gated_delta_rule),
        **chunked("jax-linear-attention", jla_delta),
    },
    "long_convolution": {
        "tilescan": first(ops.long_convolution),
        "jnp.fft along time": fft_convolution,
        "jnp.fft along the last axis": fft_convolution_last_axis,
    },
    "crossover": {
        "attention": lambda q, k, v, dt, A, a: ops.attention(q, k, v, mask=ops.masks.Causal()),
        "ssd": lambda q, k, v, dt, A, a: ops.ssd(v, dt, A, k, q)[0],
        "gated_linear_attention": lambda q, k, v, dt, A, a: ops.gated_linear_attention(
            q, k, v, a
        )[0],
    },
}  # fmt: skip
BY_STEPS = {
    "linear_recurrence": recurrence_by_steps,
    "selective_scan": selective_by_steps,
    "ssd": ssd_by_steps,
    "gated_linear_attention": attention_by_steps,
    "gated_delta_rule": delta_by_steps,
    "long_convolution": fft_convolution_last_axis,
}
# Peers of benchmarks.torch_worker: its function, and what it reads of a case.
TORCH_PEERS = {
    "long_convolution": {
        "torch.fft along time": ("fft_convolution", {}),
        "torch.fft along the last axis": ("fft_convolution_last_axis", {}),
    },
    "ssd": {"paper's formula, torch, chunk 128": ("ssd", {"chunk": 128})},
}


def peers_of(case: Case) -> list[str]:
    """Returns the names of a case's JAX peers that are installed, ours first."""
    installed = importlib.util.find_spec("jla") is not None
    return [name for name in PEERS[case.op] if installed or not name.startswith("jax-linear")]


def jitted(peer: str, case: Case) -> Callable[..., tuple]:
    """Returns a peer's jitted function of a case's arrays."""
    return jax.jit(with_gradients(PEERS[case.op][peer], case))


def with_gradients(f: Callable, case: Case) -> Callable[..., tuple]:
    """Returns a function to (y,) of f's arguments; or, if the case has a backward pass, to
    (y, *gradients) of them and dy.
    """
    if case.direction == "fwd":
        return lambda *arrays: (f(*arrays),)

    def value_and_gradients(*arrays):
        *arrays, dy = arrays
        y, pullback = jax.vjp(f, *arrays)
        return y, *pullback(dy.astype(y.dtype))

    return value_and_gradients


def main() -> None:
    """Runs one case of one peer once, and prints the process's peak memory as JSON."""
    peer, case = sys.argv[1:]
    case = Case(**json.loads(case))
    arrays = inputs(case).values()
    compiled = jitted(peer, case).lower(*arrays).compile()
    jax.block_until_ready(compiled(*arrays))
    print(json.dumps({"peak_mb": round(peak_memory_mb(), 1)}))


if __name__ == "__main__":
    main()
