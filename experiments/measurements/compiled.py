"""What a program would need, from compiling it: nothing is allocated and nothing runs."""

import time
from collections.abc import Callable
from typing import Any

import jax


def compiled_memory(function: Callable, *arguments: Any) -> dict[str, float]:
    """Bytes of a function as XLA plans them.

    Args:
      function: to be jitted.
      *arguments: pytrees of arrays or of `jax.ShapeDtypeStruct`, and None.

    Returns:
      {"temp_bytes": what it holds while it runs, "argument_bytes", "output_bytes",
      "donated_bytes", "compile_s"}.

    Raises:
      ValueError: the backend does not tell.
    """
    lowered = jax.jit(function).lower(*arguments)
    # On CPUs machine code is most of the compiling, and buffers are planned before it.
    options = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else {}
    start = time.perf_counter()
    memory = lowered.compile(compiler_options=options).memory_analysis()
    if memory is None:
        raise ValueError(f"{jax.default_backend()} tells no memory of compiled programs")
    return {
        "temp_bytes": memory.temp_size_in_bytes,
        "argument_bytes": memory.argument_size_in_bytes,
        "output_bytes": memory.output_size_in_bytes,
        "donated_bytes": memory.alias_size_in_bytes,
        "compile_s": time.perf_counter() - start,
    }


def longest_within(
    need: Callable[[int], float], budget: float, start: int, step: int, tolerance: float = 0.02
) -> tuple[int, dict[int, float]]:
    """The greatest multiple of `step` whose need is within the budget, and all needs asked for.

    Needs are taken to grow with the length, about linearly: each length to try is where the line
    through the two nearest ones meets the budget, between one that fits and one that does not.

    Args:
      need: of a length, a positive multiple of step.
      budget: the most that is allowed.
      start: the first length to try.
      step: lengths are multiples of it.
      tolerance: stop where the two ends are nearer than that share of the length.

    Returns:
      (length, {length: need}); the length is 0 if not even one step fits.
    """
    known: dict[int, float] = {}
    length = max(step, start // step * step)
    while True:
        known[length] = need(length)
        fits = max((n for n, bytes_ in known.items() if bytes_ <= budget), default=0)
        fails = min((n for n, bytes_ in known.items() if bytes_ > budget), default=None)
        gap = max(step, int(tolerance * fits) // step * step)
        if fails is not None and fails - fits <= gap:
            return fits, known
        length = _guess(known, budget, step)
        length = max(length, fits + gap)
        if fails is not None:
            length = min(length, fails - gap)
        length = max(step, length, fits + step)


def _guess(known: dict[int, float], budget: float, step: int) -> int:
    if len(known) == 1:
        ((n, bytes_),) = known.items()
        slope, n0, bytes0 = bytes_ / n, n, bytes_
    else:
        nearest = sorted(known, key=lambda n: abs(known[n] - budget))[:2]
        n0, n1 = sorted(nearest)
        bytes0, slope = known[n0], (known[n1] - known[n0]) / (n1 - n0)
    if slope <= 0:
        return 2 * max(known)
    return int(min(n0 + (budget - bytes0) / slope, 4 * max(known))) // step * step
