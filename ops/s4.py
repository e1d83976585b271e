"""State space kernels: S4 (arXiv 2111.00396) by Cauchy products, S4D (2206.11893) by Vandermonde.

A system x' = A x + B u, y = C x, with a step dt of its own per channel, is a convolution with
K_l = C Abar^l Bbar or the recurrence x_t = Abar x_(t-1) + Bbar u_t, y_t = C x_t. States come in
conjugate pairs and half of each is stored: N here counts the half, and every output is twice a
real part. A is diagonal (S4D), or Lambda - P P* over the whole of the pairs (S4, "DPLR").

Dimensions: B batch, L kernel length, H channels, N half of the state dim.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Complex, Complex128, Float, Float64

from tilescan.ops.arrays import AnyArray
from tilescan.ops.explicit_axes import partitioned_by_dimensions
from tilescan.ops.sizes import check_sizes

__all__ = [
    "dplr_discretize",
    "dplr_truncate",
    "hippo_legs",
    "hippo_legs_nplr",
    "s4_dplr_kernel",
    "s4_dplr_step",
    "s4d_discretize",
    "s4d_init",
    "s4d_kernel",
    "s4d_step",
]

DISCRETIZATIONS = ("zoh", "bilinear")
_HIGHEST = jax.lax.Precision.HIGHEST
# Nodes of the Cauchy product that are computed at a time, in [H, N, nodes] memory.
_NODES = 256


@partitioned_by_dimensions("LH", log_dt="H", A="HN", B="HN", C="HN")
def s4d_kernel(
    log_dt: Float[AnyArray, " H"],
    A: Complex[AnyArray, "#H N"],
    B: Complex[AnyArray, "#H N"],
    C: Complex[AnyArray, "#H N"],
    length: int,
    discretization: str = "zoh",
) -> Float[Array, "{length} H"]:
    """Computes K_l = 2 Re sum_n C_n Bbar_n Abar_n^l for l < length, a Vandermonde product.

    Powers are factored, l = i c + j: two real matmuls of [L/c, N] and [N, c] tables per channel,
    c about the root of L, so that memory is O(H N sqrt(L)) besides the kernel.

    Args:
      log_dt: log of each channel's step [H].
      A, B, C: diagonal systems [H, N] or [1, N], complex, Re A < 0.
      length: L.
      discretization: "zoh" or "bilinear".

    Returns:
      [L, H], float32 (float64 for complex128): `long_convolution`'s kernel.

    Raises:
      ValueError: shapes, length or discretization that do not fit.
      TypeError: A, B or C that are not complex, a log_dt that is not floating.
    """
    # Weights of the powers.
    _validate(log_dt, A=A, B=B, C=C)
    _validate_length(length)
    H, N = log_dt.shape[0], A.shape[1]
    log_decay, angle, Abar, Bbar = _discretize(log_dt, A, B, discretization)
    weight = jnp.broadcast_to(C * Bbar, (H, N))
    c = 2 ** math.ceil(math.log2(length) / 2)

    def power(l):
        # Abar^l as Abar exp((l - 1) log Abar), for the derivative where Abar is 0, and 1 for l = 0.
        # A decayed power's angle is rounded, but not its size.
        first = jnp.asarray(l == 0).reshape(1, 1, -1)
        l = jnp.asarray(np.maximum(l - 1, 0), log_decay.dtype).reshape(1, 1, -1)
        rest = _polar(jnp.exp(log_decay[..., None] * l), angle[..., None] * l)
        return jnp.where(first, 1, Abar[..., None] * rest)

    # K_(i c + j) = 2 Re sum_n (C Bbar Abar^(i c))_n (Abar^j)_n.
    far = power(c * np.arange(-(-length // c))) * weight[..., None]
    far = jnp.stack([far.real, -far.imag])
    near = power(np.arange(c))
    near = jnp.stack([near.real, near.imag])
    kernel = 2 * jnp.einsum("phni,phnj->ijh", far, near, precision=_HIGHEST)
    return kernel.reshape(-1, H)[:length]


@partitioned_by_dimensions(("HN", "HN"), log_dt="H", A="HN", B="HN")
def s4d_discretize(
    log_dt: Float[AnyArray, " H"],
    A: Complex[AnyArray, "#H N"],
    B: Complex[AnyArray, "#H N"],
    discretization: str = "zoh",
) -> tuple[Complex[Array, "H N"], Complex[Array, "H N"]]:
    """Returns Abar and Bbar of x_t = Abar x_(t-1) + Bbar u_t.

    Arguments and errors as of `s4d_kernel`.
    """
    _validate(log_dt, A=A, B=B)
    return _discretize(log_dt, A, B, discretization)[2:]


@partitioned_by_dimensions(("BHN", "BH"), state="BHN", u="BH", Abar="HN", Bbar="HN", C="HN")
def s4d_step(
    state: Complex[AnyArray, "B H N"],
    u: Float[AnyArray, "B H"],
    Abar: Complex[AnyArray, "#H N"],
    Bbar: Complex[AnyArray, "#H N"],
    C: Complex[AnyArray, "#H N"],
) -> tuple[Complex[Array, "B H N"], Float[Array, "B H"]]:
    """Computes one step of the recurrence: the new state [B, H, N], and y [B, H].

    Args:
      state: [B, H, N], complex; zeros at the start.
      u: inputs [B, H], real.
      Abar, Bbar: of `s4d_discretize`; C [H, N].
    """
    check_sizes(state=(state, "B, H, N"))
    state = Abar[None] * state + Bbar[None] * u[..., None]
    return state, 2 * (C[None] * state).sum(-1).real


@partitioned_by_dimensions("LH", log_dt="H", Lambda="HN", P="HN", B="HN", C="HN")
def s4_dplr_kernel(
    log_dt: Float[AnyArray, " H"],
    Lambda: Complex[AnyArray, "#H N"],
    P: Complex[AnyArray, "#H N"],
    B: Complex[AnyArray, "#H N"],
    C: Complex[AnyArray, "#H N"],
    length: int,
    *,
    truncated: bool = False,
) -> Float[Array, "{length} H"]:
    """Computes K_l = C Abar^l Bbar of A = Lambda - P P*, bilinear, by Cauchy products.

    They are taken at the roots of unity.

    The paper's K(omega) = 2 / (1 + omega) (k_CB - k_CP k_PB / (1 + k_PP)) has a pole of its
    parametrisation at omega = -1. With omega = exp(-i theta), c = cos(theta / 2) and
    s = sin(theta / 2), multiplied out, it has none:

      K = exp(i theta / 2) (q_CB - c q_CP q_PB / (1 + c q_PP)),
      q_vw = sum_n v_n w_n / (2 i s / dt - c Lambda_n) over both of each pair.

    It needs modes that decay over L steps: where some |Abar|^L is near 1 (dt A below 1e-3 / L, or
    dt A in the thousands, where Abar is near -1) C (I - Abar^L) cancels, and in float32 the kernel
    loses digits, in the end all. `state_space.dplr_kernel` has no such limit.

    Args:
      log_dt: log of each channel's step [H].
      Lambda, P, B, C: [H, N] or [1, N], complex, Re Lambda < 0.
      length: L.
      truncated: whether C is already C (I - Abar^L) of this length, as where that is the
        parameter; otherwise `dplr_truncate` computes it, which takes powers of dense matrices.

    Returns:
      [L, H], float32 (float64 for complex128). Memory is O(H (N nodes + L)), not O(H N L), also
      in the backward pass.

    Raises:
      ValueError, TypeError: as `s4d_kernel`.
    """
    _validate(log_dt, Lambda=Lambda, P=P, B=B, C=C)
    _validate_length(length)
    if not truncated:
        C = dplr_truncate(log_dt, Lambda, P, C, length)
    shape = (log_dt.shape[0], Lambda.shape[1])
    dtype = log_dt.dtype
    pairs = jnp.stack(
        [jnp.broadcast_to(v * w, shape) for v in (C, P.conj()) for w in (B, P)]
    )  # [4, H, N]: CB, CP, P*B, P*P
    # Nodes theta / 2 by tiles.
    rate = 2 * jnp.exp(-log_dt)[:, None, None]
    nodes = length // 2 + 1
    half = np.pi * np.arange(nodes) / length  # theta / 2
    # The last node of an even length has a cosine of exactly 0.
    cosine = np.where(2 * np.arange(nodes) == length, 0.0, np.cos(half))
    chunk = min(_NODES, nodes)
    extra = -nodes % chunk
    tiled = lambda x: jnp.asarray(np.pad(x, (0, extra), "edge").reshape(-1, chunk), dtype)

    @jax.checkpoint
    def at_nodes(nodes):
        c, s = nodes
        Lc = Lambda[..., None] * c.reshape(1, 1, -1)
        pole = 1j * rate * s.reshape(1, 1, -1)
        one = jnp.einsum("phn,hnl->phl", pairs, 1 / (pole - Lc), precision=_HIGHEST)
        other = jnp.einsum("phn,hnl->phl", pairs.conj(), 1 / (pole - Lc.conj()), precision=_HIGHEST)
        CB, CP, PB, PP = one + other
        c = c.reshape(1, -1)
        return (CB - c * CP * PB / (1 + c * PP)) * (c + 1j * s.reshape(1, -1))

    spectrum = jax.lax.map(at_nodes, (tiled(cosine), tiled(np.sin(half))))
    spectrum = jnp.moveaxis(spectrum, 0, 1).reshape(shape[0], -1)[:, :nodes]
    return jnp.fft.irfft(spectrum, length).T


@partitioned_by_dimensions(("HNN", "HN"), log_dt="H", Lambda="HN", P="HN", B="HN")
def dplr_discretize(
    log_dt: Float[AnyArray, " H"],
    Lambda: Complex[AnyArray, "#H N"],
    P: Complex[AnyArray, "#H N"],
    B: Complex[AnyArray, "#H N"],
) -> tuple[Complex[Array, "H 2*N 2*N"], Complex[Array, "H 2*N"]]:
    """Returns Abar and Bbar, dense and bilinear, over both halves of the pairs.

    States are [x, conj x]. For powers and tests; `s4_dplr_step` steps in O(N).
    """
    _validate(log_dt, Lambda=Lambda, P=P, B=B)
    shape = (log_dt.shape[0], Lambda.shape[1])
    both = lambda x: (
        jnp.concatenate([jnp.broadcast_to(x, shape)] * 2, -1)
        .at[:, shape[1] :]
        .set(jnp.broadcast_to(x, shape).conj())
    )
    Lambda, P, B = both(Lambda), both(P), both(B)
    eye = jnp.eye(2 * shape[1], dtype=Lambda.dtype)[None]
    A = Lambda[..., None] * eye - P[:, :, None] * P[:, None, :].conj()
    dt = jnp.exp(log_dt)[:, None, None]
    right = jnp.concatenate([eye + dt / 2 * A, dt * B[..., None]], axis=-1)
    solved = jnp.linalg.solve(eye - dt / 2 * A, right)
    return solved[..., :-1], solved[..., -1]


@partitioned_by_dimensions("HN", log_dt="H", Lambda="HN", P="HN", C="HN")
def dplr_truncate(
    log_dt: Float[AnyArray, " H"],
    Lambda: Complex[AnyArray, "#H N"],
    P: Complex[AnyArray, "#H N"],
    C: Complex[AnyArray, "#H N"],
    length: int,
) -> Complex[Array, "H N"]:
    """Returns C (I - Abar^length) in O(N^3 log length) per channel: once, not every step."""
    _validate(log_dt, Lambda=Lambda, P=P, C=C)
    _validate_length(length)
    shape = (log_dt.shape[0], Lambda.shape[1])
    with jax.default_matmul_precision("highest"):
        Abar, _ = dplr_discretize(log_dt, Lambda, P, C)
        C = jnp.broadcast_to(C, shape)
        row = jnp.concatenate([C, C.conj()], axis=-1)
        tail = jnp.einsum("hn,hnm->hm", row, jnp.linalg.matrix_power(Abar, length))
    return C - tail[:, : shape[1]]


@partitioned_by_dimensions(
    ("BHN", "BH"), state="BHN", u="BH", log_dt="H", Lambda="HN", P="HN", B="HN", C="HN"
)
def s4_dplr_step(
    state: Complex[AnyArray, "B H N"],
    u: Float[AnyArray, "B H"],
    log_dt: Float[AnyArray, " H"],
    Lambda: Complex[AnyArray, "#H N"],
    P: Complex[AnyArray, "#H N"],
    B: Complex[AnyArray, "#H N"],
    C: Complex[AnyArray, "#H N"],
) -> tuple[Complex[Array, "B H N"], Float[Array, "B H"]]:
    """Computes one bilinear step of A = Lambda - P P* by Woodbury: the new state, and y.

    (2/dt - A) x' = (2/dt + A) x + 2 B u, in O(N). C is the system's own, not a truncated one.
    """
    _validate(log_dt, Lambda=Lambda, P=P, B=B, C=C)
    rate = 2 * jnp.exp(-log_dt)[:, None]
    both = lambda x: 2 * x.sum(-1, keepdims=True).real  # over both of each pair
    right = (rate + Lambda)[None] * state - P[None] * both(P.conj()[None] * state)
    right = right + 2 * B[None] * u[..., None]
    inverse = 1 / (rate - Lambda)
    solved = inverse[None] * right
    low_rank = both(P.conj()[None] * solved) / (1 + both(P.conj() * inverse * P))[None]
    state = solved - (inverse * P)[None] * low_rank
    return state, 2 * (C[None] * state).sum(-1).real


def hippo_legs(N: int) -> tuple[Float64[np.ndarray, "{N} {N}"], Float64[np.ndarray, " {N}"]]:
    """Returns A and B of HiPPO-LegS (arXiv 2008.07669)."""
    n = np.arange(N, dtype=np.float64)
    root = np.sqrt(2 * n + 1)
    return -np.tril(root[:, None] * root[None, :], -1) - np.diag(n + 1), root


def hippo_legs_nplr(
    N: int,
) -> tuple[
    Complex128[np.ndarray, " n"],
    Complex128[np.ndarray, " n"],
    Complex128[np.ndarray, " n"],
    Complex128[np.ndarray, "2*n n"],
]:
    """Returns HiPPO-LegS as normal plus low rank: A = V (diag Lambda - P P*) V* over pairs.

    A + p p^T = -1/2 + a skew matrix, p_n = sqrt(n + 1/2): a Hermitian eigenproblem, whereas A's own
    eigenvectors are exponentially ill-conditioned (2111.00396, section 3 and appendix C).

    Args:
      N: the whole state dim, even.

    Returns:
      Lambda, P, B [N/2] and V [N, N/2], NumPy complex128, of the halves with Im Lambda > 0 in
      ascending order; B = V* B_n.

    Raises:
      ValueError: N that is odd or not positive.
    """
    if N < 2 or N % 2:
        raise ValueError(f"N must be even and positive (states come in conjugate pairs), got {N}")
    A, B = hippo_legs(N)
    p = np.sqrt(np.arange(N) + 0.5)
    skew = A + np.outer(p, p) + 0.5 * np.eye(N)
    frequencies, V = np.linalg.eigh(-1j * skew)
    V = V[:, N // 2 :]
    return -0.5 + 1j * frequencies[N // 2 :], V.conj().T @ p, V.conj().T @ B, V


def s4d_init(N: int, kind: str = "lin") -> Complex128[np.ndarray, " n"]:
    """Returns A of S4D (2206.11893, section 4): the halves of N states, [N/2].

    Args:
      N: the whole state dim, even.
      kind: "lin", -1/2 + i pi n; "inv", -1/2 + i (N / pi) (N / (2n + 1) - 1); "legs", Lambda of
        `hippo_legs_nplr`.

    Raises:
      ValueError: N that is odd or not positive, or an unknown kind.
    """
    if N < 2 or N % 2:
        raise ValueError(f"N must be even and positive (states come in conjugate pairs), got {N}")
    n = np.arange(N // 2)
    if kind == "lin":
        return -0.5 + 1j * np.pi * n
    if kind == "inv":
        return -0.5 + 1j * N / np.pi * (N / (2 * n + 1) - 1)
    if kind == "legs":
        return hippo_legs_nplr(N)[0]
    raise ValueError(f'kind must be "lin", "inv" or "legs", got {kind!r}')


# Largest |Re z|, |Im z| at which (exp(z) - 1) / z is summed as a series, and its terms for float64.
_SERIES, _TERMS = 0.5, 15


def _discretize(log_dt, A, B, discretization):
    """Returns log |Abar| and arg Abar [H, N], real, and Abar and Bbar [H, N], complex.

    Values and gradients hold for any step: near 0, at the bilinear pole dt A = -2, where Abar is 0,
    and for dt |A| so large that exp(-dt A) overflows.
    """
    if discretization == "zoh":
        return _zero_order_hold(log_dt, A, B)
    if discretization == "bilinear":
        return _bilinear(log_dt, A, B)
    raise ValueError(f'discretization must be "zoh" or "bilinear", got {discretization!r}')


def _zero_order_hold(log_dt, A, B):
    """Discretizes by Abar = exp(z) and Bbar = (exp(z) - 1) / A B, z = dt A."""
    dt = jnp.exp(log_dt)[:, None]
    z = dt * A
    near = jnp.maximum(jnp.abs(z.real), jnp.abs(z.imag)) < _SERIES

    # Near 0 Bbar = dt B (1 + z/2 (1 + z/3 (...))): the quotient's derivative would cancel there.
    small, series = jnp.where(near, z, 0), 1.0
    for n in range(_TERMS, 1, -1):
        series = 1 + small / n * series

    # Elsewhere exp(z) - 1 in real parts, so that for Re z <= 0 nothing cancels in it or in its
    # derivative: that by a large Im z vanishes with exp(Re z).
    far_z, far_A = jnp.where(near, -1, z), jnp.where(near, -1, A)
    x, y = far_z.real, far_z.imag
    slow = jnp.expm1(x) * jnp.cos(y) - 2 * jnp.sin(y / 2) ** 2
    real = jnp.where(x > -1, slow, jnp.exp(x) * jnp.cos(y) - 1)
    quotient = jax.lax.complex(real, jnp.exp(x) * jnp.sin(y)) / far_A

    Bbar = jnp.where(near, dt * series, quotient) * B
    return z.real, z.imag, _polar(jnp.exp(z.real), z.imag), Bbar


def _bilinear(log_dt, A, B):
    """Discretizes by Abar = (2/dt + A) / (2/dt - A) and Bbar = 2 B / (2/dt - A)."""
    # In units of the larger one, rate and A are at most 1, and their squares at most 1 as well.
    rate = 2 * jnp.exp(-log_dt)[:, None]
    largest = jnp.maximum(jnp.abs(A.real), jnp.abs(A.imag))
    unit = jax.lax.stop_gradient(jnp.maximum(rate, largest))
    rate, A = rate / unit, A / unit
    inverse = 1 / (rate - A)

    # (2/dt + A) / (2/dt - A) near 1 and near -1: derivatives of the quotient would cancel.
    Abar = jnp.where(rate > largest / unit, 1 + 2 * A * inverse, 2 * rate * inverse - 1)

    # |Abar|^2 = 1 + r, r = 4 Re A (2/dt) / |2/dt - A|^2: the logarithm of 1 + r keeps its digits
    # where r is small, that of |2/dt + A|^2 where r is near -1. At the pole itself Abar is 0.
    above, below, b = rate + A.real, rate - A.real, jnp.broadcast_to(A.imag, inverse.shape)
    pole = above**2 + b**2 == 0
    above, b = jnp.where(pole, 1, above), jnp.where(pole, 0, b)
    squared = below**2 + b**2
    r = 4 * A.real * rate / squared
    small = jnp.log1p(jnp.maximum(r, -0.5))
    log_decay = 0.5 * jnp.where(r > -0.5, small, jnp.log((above**2 + b**2) / squared))
    log_decay = jnp.where(pole, math.log(jnp.finfo(log_dt.dtype).tiny), log_decay)
    angle = jnp.arctan2(b, above) + jnp.arctan2(b, below)
    return log_decay, angle, Abar, 2 * inverse / unit * B


def _polar(size, angle):
    return jax.lax.complex(size * jnp.cos(angle), size * jnp.sin(angle))


def _validate(log_dt, **systems):
    if not jnp.issubdtype(log_dt.dtype, jnp.floating):
        raise TypeError(f"log_dt must be floating, got {log_dt.dtype}")
    if log_dt.ndim != 1:
        raise ValueError(f"log_dt must be [H], got shape {log_dt.shape}")
    H, N = log_dt.shape[0], next(iter(systems.values())).shape[-1]
    check_sizes(log_dt=(log_dt, "H"), **{name: (x, "H, N") for name, x in systems.items()})
    for name, x in systems.items():
        if not jnp.issubdtype(x.dtype, jnp.complexfloating):
            raise TypeError(
                f"{name} must be complex, half of each conjugate pair of states, got {x.dtype}"
            )
        if x.ndim != 2 or x.shape not in ((H, N), (1, N)):
            raise ValueError(
                f"{name} must be [H, N] or [1, N] with H = {H}, N = {N}, got shape {x.shape}"
            )


def _validate_length(length):
    if not isinstance(length, (int, np.integer)) or length < 1:
        raise ValueError(f"length must be a positive integer, got {length!r}")
