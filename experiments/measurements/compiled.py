"""What a program would need, from compiling it: nothing is allocated and nothing runs."""

from collections.abc import Callable
from typing import Any

import jax

from tilescan.planning.compiled import memory as program_memory

# Buffers and collectives are XLA's, planned before LLVM sees a program: programs that nobody runs
# need no optimized machine code. TPUs have no LLVM.
NOT_RUN = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def compiled(function: Callable, *arguments: Any) -> jax.stages.Compiled:
    """Returns the program of a function, compiled and not to be run.

    Args:
      function: to be jitted.
      *arguments: pytrees of arrays or of `jax.ShapeDtypeStruct`, and None.
    """
    options = {} if jax.default_backend() == "tpu" else NOT_RUN
    return jax.jit(function).lower(*arguments).compile(options)


def memory(program: jax.stages.Compiled) -> dict[str, int]:
    """Returns a device's bytes: arguments, results that are not arguments, temporary, total.

    Raises:
      ValueError: the backend does not tell.
    """
    needs = program_memory(program)
    if needs is None:
        raise ValueError(f"{jax.default_backend()} tells no memory of compiled programs")
    return {
        "arguments": needs.arguments,
        "results": needs.results,
        "temporary": needs.temporaries,
        "total": needs.total,
    }


def largest_within(
    need: Callable[[int], float], budget: float, start: int, step: int = 1, tolerance: float = 0.0
) -> tuple[int, dict[int, float]]:
    """Returns the largest multiple of `step` whose need is within the budget, by few calls.

    Needs grow with the size, about linearly: each size to try is where the line through the two
    nearest needs meets the budget, or the middle where lines keep ending on one side of it.

    Args:
      need: bytes, say, of a size: a length or a batch, a positive multiple of step.
      budget: the most that is allowed.
      start: the first size to try.
      step: sizes are multiples of it.
      tolerance: stop where the next size to try would be larger by that share and a step at most.

    Returns:
      (size, {size: need} of all that were tried); the size is 0 if not even one step fits.
    """
    known: dict[int, float] = {}  # by multiples of step, as all numbers below
    n, fitting, failing, sides = max(1, start // step), 0, None, []
    while True:
        known[n] = need(n * step)
        sides.append(known[n] <= budget)
        fitting, failing = (n, failing) if sides[-1] else (fitting, n)
        gap = 1 + int(tolerance * fitting)
        if failing is not None and failing - fitting <= gap:
            return fitting * step, {m * step: bytes_ for m, bytes_ in known.items()}

        # Every new size takes at least the gap from what is left.
        if failing is None:
            n = min(max(_on_line(known, budget), fitting + gap), 4 * fitting)
        else:
            stuck = fitting and len(sides) > 3 and len(set(sides[-3:])) == 1
            n = (fitting + failing) // 2 if stuck else _on_line(known, budget)
            n = min(max(n, fitting + gap), max(failing - gap, fitting + 1))


def _on_line(known: dict[int, float], budget: float) -> int:
    """Returns where the line through the two needs nearest to the budget meets it.

    With one need alone, the line is that through 0.
    """
    nearest = sorted(known, key=lambda n: abs(known[n] - budget))[:2]
    a, b = sorted(nearest if len(nearest) == 2 else [0, *nearest])
    low = known.get(a, 0.0)
    return a + int((budget - low) / max(known[b] - low, 1) * (b - a))
