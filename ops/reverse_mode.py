"""First derivatives in reverse mode that are written, and words for all others.

Kernels and chunked programs have the backward pass that their module writes, so jax.grad, jax.vjp
and jax.value_and_grad work. What JAX would derive from a written derivative is refused where it is
asked for: forward mode here, a second derivative in `ops.lowering`.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

_WORKS = (
    "this op has a written backward pass: jax.grad, jax.vjp and jax.value_and_grad work, under "
    "jit, vmap, scan and shard_map too. For {} use its definition (tilescan.ops.reference, for "
    "attention also implementation='reference', or plain jax.numpy), which JAX differentiates in "
    "both modes and to any order, at small sizes"
)
NO_FORWARD_MODE = _WORKS.format("jax.jvp, jax.jacfwd, jax.linearize or jax.hessian")
NO_SECOND_DERIVATIVE = _WORKS.format("a derivative of its gradient")


def written_vjp(function: Callable, nondiff_argnums: Sequence[int] = ()) -> Callable:
    """Returns `jax.custom_vjp(function)`, with its `defvjp`, refusing forward mode in words.

    Args:
      function: of positional arguments, which are pytrees.
      nondiff_argnums: as those of jax.custom_vjp.

    Raises:
      TypeError: when a tangent is computed, or a program that computes one is lowered.
    """
    inner = jax.custom_vjp(function, nondiff_argnums=tuple(nondiff_argnums))

    @functools.wraps(function)
    def call(*arguments):
        static = set(nondiff_argnums)
        return inner(*(a if i in static else _watched(a) for i, a in enumerate(arguments)))

    call.defvjp = inner.defvjp
    return call


def _watched(tree):
    """Returns `tree`; the tangents of its floating arrays can be transposed, but not computed."""
    is_floating = lambda x: isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jnp.inexact)
    return jax.tree.map(lambda x: _watch.bind(x) if is_floating(x) else x, tree)


# The identity, whose derivative `_tangent` is the identity too, but for that nobody may compute it.
# Reverse mode traces it and transposes it, and so never does.
_watch = Primitive("written_vjp_input")
_watch.def_impl(lambda x: x)
_watch.def_abstract_eval(lambda x: x)
mlir.register_lowering(_watch, lambda context, x: [x])
batching.defvectorized(_watch)

_tangent = Primitive("written_vjp_tangent")
_tangent.def_abstract_eval(lambda x: x)
batching.defvectorized(_tangent)
ad.deflinear2(_tangent, lambda cotangent, _: [cotangent])


def _watch_jvp(primals, tangents):
    (x,), (tangent,) = primals, tangents
    return _watch.bind(x), tangent if type(tangent) is ad.Zero else _tangent.bind(tangent)


def _refuse(*_):
    raise TypeError(NO_FORWARD_MODE)


ad.primitive_jvps[_watch] = _watch_jvp
_tangent.def_impl(_refuse)
mlir.register_lowering(_tangent, _refuse)
