"""S4 (arXiv 2111.00396) and S4D (2206.11893): a linear state space per channel, then GELU and GLU.

In `OptimizerConfig.groups`, the parameters that S4 trains with a smaller rate and without decay
are "(log_dt|log_A_real|A_imag|/[PB]_(real|imag))$"; C and D are trained like other weights. A dense
matrix is "/[AB]$".

Dimensions: B batch, T time, E embedding (channels), G systems (n_ssm), N half of the state dim,
S state dim.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Complex, Float, Inexact, Integer

from tilescan.models.layers import exact_gelu, linear
from tilescan.models.module import Module
from tilescan.models.recurrent import (
    carried_segments,
    check_mixer_inputs,
    continued,
    exact_dtype,
    uniform_fan_in,
)
from tilescan.ops import s4, state_space
from tilescan.ops.long_convolution import long_convolution
from tilescan.ops.sequence_parallel.on_mesh import on_mesh

OUTPUTS = ("glu", "linear", "none")
# Real parts stay below it, so that no mode grows.
LARGEST_REAL = -1e-4


class S4State(NamedTuple):
    """What is carried over time: the modes' real and imaginary parts, the last token's segment."""

    ssm: Float[Array, "B E S"]
    segment: Integer[Array, " B"]


class _StateSpaceLayer(Module):
    """y = GELU(SSM(x) + D x), then a linear map with a gate. Subclasses say what the SSM is.

    Attributes:
      d_model: E.
      state_dim: S, even.
      n_ssm: G, how many channels have state matrices of their own; it divides E, and None is E.
      dt_min, dt_max: initial steps are log-uniform between them.
      rate: factor of the steps: 2 for inputs sampled half as often as in training.
      bidirectional: a second C looks backwards in time. Then there is no state.
      fft: whether whole sequences without segments are convolved by FFT. Otherwise, and in all
        other calls, chunks of matrix products do it, in which y_t is exactly independent of
        later inputs.
      output: "glu", W y * sigmoid(W' y); "linear", W y; or "none", y.
      dropout: rate after GELU, one mask for all of time; active where `apply` has a "dropout" key.
      use_bias: of W and W'.
      sequence_parallel: a name of SCAN_KINDS in `ops.sequence_parallel.kinds`.
      out_scale: multiplies the initial weights W.
    """

    d_model: int
    state_dim: int = 64
    n_ssm: int | None = None
    dt_min: float = 1e-3
    dt_max: float = 1e-1
    rate: float = 1.0
    bidirectional: bool = False
    fft: bool = True
    output: str = "glu"
    dropout: float = 0.0
    use_bias: bool = True
    out_scale: float = 1.0
    sequence_parallel: str = "all_scan"
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T E"],
        *,
        state: S4State | None = None,
        positions: Integer[Array, "B T"] | None = None,
        segment_ids: Integer[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T E"], S4State | None]:
        """Mixes T tokens, as `models.mixers` says; positions are not used.

        Raises:
          ValueError: also for a state of a bidirectional layer, attributes that don't fit, or time
            that the mesh in use can't shard.
        """
        check_mixer_inputs(x, positions=positions, segment_ids=segment_ids)
        self._check_attributes()
        if self.bidirectional and state is not None:
            raise ValueError("a bidirectional layer has no state: it reads from both ends")
        E, wide = self.d_model, jnp.promote_types(self.dtype, jnp.float32)
        state = continued(state, segment_ids)
        ids, last = carried_segments(segment_ids, None if state is None else state.segment)
        # Each channel's system, and what it makes of the sequence.
        log_dt = log_steps(self, E, self.dt_min, self.dt_max, wide) + math.log(self.rate)
        system = log_dt, *self._matrices(wide)
        u = x.astype(wide)
        initial = None if state is None else state.ssm
        y, ssm = self._ssm(u, (*system, self._output_matrix("C", wide)), initial, ids)
        # The same systems with another C, over the reversed sequence.
        if self.bidirectional:
            backward, _ = self._ssm(
                jnp.flip(u, 1),
                (*system, self._output_matrix("C_back", wide)),
                None,
                None if ids is None else jnp.flip(ids, 1),
            )
            y = y + jnp.flip(backward, 1)
        # GELU(SSM(x) + D x), dropout, and the output's map.
        D_init = nn.with_logical_partitioning(nn.initializers.normal(1.0), ("inner",))
        D = self.param("D", D_init, (E,), self.param_dtype)
        y = exact_gelu(y + D.astype(wide).reshape(1, 1, E) * u)
        y = y.astype(self.dtype)
        drop = nn.Dropout(self.dropout, broadcast_dims=(1,))
        y = drop(y, deterministic=not self.has_rng("dropout"))
        return self._mix(y), None if state is None else S4State(ssm, last)

    @nn.nowrap
    def init_state(self, batch: int, max_len: int) -> S4State:
        """Returns zeros, whose size does not depend on max_len.

        Raises:
          ValueError: if the layer is bidirectional.
        """
        if self.bidirectional:
            raise ValueError("a bidirectional layer has no state: it reads from both ends")
        shape = (batch, self.d_model, self.state_dim)
        return S4State(
            jnp.zeros(shape, jnp.promote_types(self.dtype, jnp.float32)),
            jnp.full((batch,), -1, jnp.int32),
        )

    def _ssm(self, u, system, initial_state, ids):
        if self.fft and initial_state is None and ids is None:
            kernel = self._kernel(system, u.shape[1])
            return on_mesh(long_convolution, self.sequence_parallel, u, kernel)[0], None
        op, options = self._chunks()
        options |= dict(initial_state=initial_state, segment_ids=ids)
        return on_mesh(op, self.sequence_parallel, u, *system, **options)

    def _mix(self, y):
        if self.output == "none":
            return y
        common = dict(use_bias=self.use_bias, dtype=self.dtype, param_dtype=self.param_dtype)
        axes, init = ("inner", "embed"), uniform_fan_in(self.out_scale)
        out = linear(self.d_model, axes, init=init, name="out", **common)(y)
        if self.output == "linear":
            return out
        gate = linear(self.d_model, axes, init=uniform_fan_in(), name="gate", **common)(y)
        return out * jax.nn.sigmoid(gate)

    def _output_matrix(self, name, wide):
        shape = self.d_model, self.state_dim // 2
        return output_matrix(self, name, shape, ("inner", "state"), wide)

    def _systems(self) -> int:
        return self.d_model if self.n_ssm is None else self.n_ssm

    def _per_system(self, x: Inexact[Array, "G *N"]) -> Inexact[Array, "E *N"]:
        """[G, ...] with a row for each channel."""
        return jnp.repeat(x, self.d_model // x.shape[0], axis=0)

    def _shape(self):
        """The shape [G, N] and the logical axes of the systems' parameters."""
        G = self._systems()
        return (G, self.state_dim // 2), ("inner" if G == self.d_model else None, "state")

    @nn.nowrap
    def _check_attributes(self) -> None:
        if self.state_dim < 2 or self.state_dim % 2:
            raise ValueError(f"state_dim={self.state_dim} must be even: states are pairs")
        if self._systems() < 1 or self.d_model % self._systems():
            raise ValueError(f"n_ssm={self.n_ssm} must divide d_model={self.d_model}")
        if self.output not in OUTPUTS:
            raise ValueError(
                f"output={self.output!r} is unknown; it can be {', '.join(map(repr, OUTPUTS))}"
            )


class S4D(_StateSpaceLayer):
    """S4 with a diagonal state matrix; B is 1, as C can take its place.

    Attributes, besides those of every state space layer:
      init_A: initial A: "lin", "inv" and "legs" as of `ops.s4.s4d_init`; "random", with standard
        normal frequencies and decays of 1/2.
      discretization: "zoh" or "bilinear".
    """

    init_A: str = "lin"
    discretization: str = "zoh"

    def _matrices(self, wide):
        A = None if self.init_A == "random" else s4.s4d_init(self.state_dim, self.init_A)
        A = self._per_system(poles(self, A, *self._shape(), wide))
        return A, jnp.ones_like(A)

    def _kernel(self, system, length):
        return s4.s4d_kernel(*system, length, self.discretization)

    def _chunks(self):
        return state_space.diagonal_state_space, dict(discretization=self.discretization)


class S4(_StateSpaceLayer):
    """A diagonal plus low-rank state matrix, Lambda - P P*, bilinear.

    Attributes, besides those of every state space layer:
      n_ssm: 1 by default: all channels share Lambda, P and B, and differ in C and the step.
      init_A: "legs", HiPPO-LegS; "random", normal P and B, and poles as S4D's "random".
      dense: whether A is any real matrix [S, S], as in the paper's ablation (section 4.4), from
        HiPPO-LegS itself or, "random", of normal numbers / S; B is real, too. Then there is no
        state, and there are no segments.
    """

    n_ssm: int | None = 1
    init_A: str = "legs"
    dense: bool = False

    def _matrices(self, wide):
        if self.init_A not in ("legs", "random"):
            raise ValueError(f'init_A must be "legs" or "random" for S4, got {self.init_A!r}')
        if self.dense:
            return self._dense_matrices(wide)
        Lambda = P = B = None
        if self.init_A == "legs":
            Lambda, P, B, _ = s4.hippo_legs_nplr(self.state_dim)
        A = poles(self, Lambda, *self._shape(), wide)
        P, B = (self._vector(*named, wide) for named in (("P", P), ("B", B)))
        return tuple(map(self._per_system, (A, P, B)))

    def _vector(self, name, values, wide):
        if values is None:
            inits = (nn.initializers.normal(math.sqrt(0.5)),) * 2
        else:
            inits = constant(values.real), constant(values.imag)
        return complex_param(self, name, inits, *self._shape(), exact_dtype(self.param_dtype), wide)

    def _dense_matrices(self, wide):
        S, (groups, _) = self.state_dim, self._shape()[1]
        inits = nn.initializers.normal(1 / S), nn.initializers.normal(1.0)
        if self.init_A == "legs":
            inits = tuple(map(constant, s4.hippo_legs(S)))
        dtype, G = exact_dtype(self.param_dtype), self._systems()
        named = (("A", (G, S, S), (groups, None, "state")), ("B", (G, S), (groups, "state")))
        return tuple(
            self._per_system(
                self.param(name, nn.with_logical_partitioning(init, axes), shape, dtype).astype(
                    wide
                )
            )
            for (name, shape, axes), init in zip(named, inits, strict=True)
        )

    def _kernel(self, system, length):
        if not self.dense:
            return state_space.dplr_kernel(*system, length)
        C = system[-1]
        return state_space.dense_kernel(
            *system[:-1], jnp.concatenate([C.real, C.imag], axis=-1), length
        )

    def _chunks(self):
        if self.dense:
            raise ValueError("dense=True has no state and no segments, and needs fft=True")
        return state_space.dplr_state_space, {}


def poles(
    module: nn.Module,
    Lambda: Complex[np.ndarray, " N"] | None,
    shape: tuple[int, int],
    axes: tuple[str | None, ...],
    wide: Any,
) -> Complex[Array, "G N"]:
    """Returns the parameters of a diagonal A [G, N], from its initial rows; Re A < 0.

    Args:
      module: whose parameters log_A_real and A_imag they become.
      Lambda: [N]; None samples normal frequencies, with decays of 1/2.
      shape, axes: (G, N) and their logical names.
      wide: dtype of the real parts of the result.
    """
    if Lambda is None:
        inits = nn.initializers.constant(math.log(0.5)), nn.initializers.normal(1.0)
    else:
        inits = constant(np.log(-Lambda.real)), constant(Lambda.imag)
    dtype = exact_dtype(module.param_dtype)
    named = [nn.with_logical_partitioning(init, axes) for init in inits]
    log_real = module.param("log_A_real", named[0], shape, dtype).astype(wide)
    imag = module.param("A_imag", named[1], shape, dtype).astype(wide)
    return jax.lax.complex(jnp.minimum(-jnp.exp(log_real), LARGEST_REAL), imag)


def output_matrix(
    module: nn.Module,
    name: str,
    shape: tuple[int, int],
    axes: tuple[str | None, ...],
    wide: Any,
) -> Complex[Array, "E N"]:
    """Returns a parameter C of normal numbers with variance 1, kept as two real ones."""
    inits = (nn.initializers.normal(math.sqrt(0.5)),) * 2
    return complex_param(module, name, inits, shape, axes, module.param_dtype, wide)


def complex_param(
    module: nn.Module,
    name: str,
    inits: tuple[Callable, Callable],
    shape: tuple[int, ...],
    axes: tuple[str | None, ...],
    dtype: Any,
    wide: Any,
) -> Complex[Array, "..."]:
    """Returns the parameters {name}_real and {name}_imag as one complex array.

    Args:
      module: whose parameters they are.
      name: of both, without ending.
      inits: initializers of the real and the imaginary part.
      shape, axes: of each, and their logical names.
      dtype: of the parameters.
      wide: dtype of the real parts of the result.
    """
    parts = []
    for part, init in zip(("real", "imag"), inits, strict=True):
        init = nn.with_logical_partitioning(init, axes)
        parts.append(module.param(f"{name}_{part}", init, shape, dtype).astype(wide))
    return jax.lax.complex(*parts)


def log_steps(
    module: nn.Module, features: int, low: float, high: float, wide: Any
) -> Float[Array, " features"]:
    """Returns the parameter log_dt [features], uniform in [log low, log high]."""

    def init(key, shape, dtype):
        return jax.random.uniform(key, shape, dtype, math.log(low), math.log(high))

    init = nn.with_logical_partitioning(init, ("inner",))
    dtype = exact_dtype(module.param_dtype)
    return module.param("log_dt", init, (features,), dtype).astype(wide)


def constant(row: Float[np.ndarray, "*N"]) -> Callable:
    """Returns an initializer of equal rows, or of equal matrices."""

    def init(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> Array:
        return jnp.broadcast_to(jnp.asarray(row, dtype), shape)

    return init
