"""A choice between implementations that is made when a program is lowered.

`jax.lax.platform_dependent` makes the same choice, but traces all alternatives first. Kernels take
long to trace, so here only the one that is lowered is ever traced, or even imported; and the
choice itself may raise, in words, for a platform that has none. What was chosen, and why no kernel
was, is told to whoever asks by `choices`.
"""

import contextlib
import contextvars
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive, jaxpr_as_fun
from jax.interpreters import ad, batching, mlir
from jaxtyping import PyTree

from tilescan.ops.reverse_mode import NO_SECOND_DERIVATIVE

_choice = Primitive("choose_when_lowered")
_choice.multiple_results = True
NO_KERNEL = "no platform has a kernel"
_noted: contextvars.ContextVar[dict | None] = contextvars.ContextVar("noted", default=None)


@contextlib.contextmanager
def choices() -> Iterator[dict[str, dict[str, str | None]]]:
    """Yields what ops choose while programs are lowered: {op: {implementation: why no kernel}}.

    Implementations are "pallas", whose reason is None, and "xla". An op that was asked for one is
    not there.
    """
    found: dict[str, dict[str, str | None]] = {}
    token = _noted.set(found)
    try:
        yield found
    finally:
        _noted.reset(token)


def note(op: str, why: str | None) -> None:
    """Notes an op's choice: the kernel, or XLA where `why` says why there is no kernel for it."""
    found = _noted.get()
    if found is not None:
        found.setdefault(op, {})["xla" if why else "pallas"] = why


def other_platform(kernels: str, platform: str) -> str:
    """Returns why a platform has no kernel; kernels: what there are kernels for."""
    return f"kernels are for {kernels}, not for {platform}"


def choose_when_lowered(
    pick: Callable[[str], Callable | None], like: Callable, *arguments: PyTree
) -> PyTree:
    """Computes like(*arguments) by `pick(platform)` of the platform the program is lowered for.

    Args:
      pick: from "cpu", "tpu", "cuda" or "rocm" to a function of `arguments`, whose results have
        `like`'s shapes and dtypes; None stands for `like` itself. What it raises is raised by the
        lowering.
      like: is always traced, and gives the results' structure.
      *arguments: pytrees of arrays.
    """
    flat, tree = jax.tree.flatten(jax.tree.map(jnp.asarray, arguments))  # NumPy's have no device
    jaxpr, shapes = jax.make_jaxpr(like, return_shape=True)(*arguments)
    if any(0 in x.shape for x in flat):
        # An empty batch, which kernels don't take, and for which there is nothing to choose.
        return jax.tree.unflatten(jax.tree.structure(shapes), jaxpr_as_fun(jaxpr)(*flat))

    def pick_flat(platform):
        function = pick(platform)
        if function is None:
            return None
        return lambda *flat: jax.tree.leaves(function(*tree.unflatten(flat)))

    out = _choice.bind(*flat, pick=pick_flat, like=jaxpr)
    return jax.tree.unflatten(jax.tree.structure(shapes), out)


@_choice.def_abstract_eval
def _abstract_eval(*_, pick, like):
    return like.out_avals


def _function(pick, like, platform):
    return pick(platform) or jaxpr_as_fun(like)


@_choice.def_impl
def _run(*flat, pick, like):
    platform = next(iter(flat[0].devices())).platform
    return jax.jit(_function(pick, like, {"gpu": "cuda"}.get(platform, platform)))(*flat)


def _lower(context, *flat, pick, like):
    platforms = context.module_context.platforms
    if len(platforms) == 1:
        function = _function(pick, like, platforms[0])
    else:
        branches = {p: _function(pick, like, p) for p in platforms}
        function = lambda *flat: jax.lax.platform_dependent(*flat, **branches)
    return mlir.lower_fun(function, multiple_results=True)(context, *flat)


def _batch(flat, axes, *, pick, like):
    def batched(function):
        return jax.vmap(function, in_axes=tuple(axes), out_axes=0)

    def pick_batched(platform):
        function = pick(platform)
        return None if function is None else batched(function)

    out = choose_when_lowered(pick_batched, batched(jaxpr_as_fun(like)), *flat)
    return out, [0] * len(out)


def _jvp(primals, tangents, *, pick, like):
    """Refuses: kernels have no derivatives but those that are written."""
    raise TypeError(NO_SECOND_DERIVATIVE)


mlir.register_lowering(_choice, _lower)
ad.primitive_jvps[_choice] = _jvp
batching.primitive_batchers[_choice] = _batch
