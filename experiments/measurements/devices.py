"""What the papers on sequence parallelism share: devices, compiled programs, counts, trainings.

Programs are compiled for as many devices as a cell needs, also where they could not run: the bytes
that devices send and the buffers that they hold are in the program. On CPUs the devices are virtual
ones, of which a process can have any number if it says so before it uses the first.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from tilescan.models import LanguageModel, LanguageModelConfig
from tilescan.training import sharding, steps
from tilescan.training.collectives import collectives, sent_bytes
from tilescan.training.settings import MeshConfig
from tilescan.training.train import sharded_init

AXIS = "sequence"
# The plan of buffers and the collectives are XLA's, before LLVM sees a program: programs that
# nobody runs need no optimised machine code.
NOT_RUN = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
# Virtual devices of a process that has none yet.
MANY = 256


def devices(count: int) -> list:
    """The first `count` devices, of the CPU if the accelerators are fewer.

    Raises:
      RuntimeError: JAX has started with fewer.
    """
    try:
        if jax.config.jax_num_cpu_devices < MANY:
            jax.config.update("jax_num_cpu_devices", MANY)
    except RuntimeError:
        pass  # JAX has its devices already
    found = jax.devices()
    if len(found) < count:
        found = jax.devices("cpu")
    if len(found) < count:
        raise RuntimeError(
            f"{count} devices are needed and JAX has started with {len(found)}; measure in a new "
            f"process, or set XLA_FLAGS=--xla_force_host_platform_device_count={count}"
        )
    return found[:count]


def mesh_of(count: int, axis: str = AXIS):
    """A mesh of one axis over the first `count` devices."""
    return jax.make_mesh((count,), (axis,), (AxisType.Auto,), devices=devices(count))


def struct(mesh, shape, *cut, dtype="float32") -> jax.ShapeDtypeStruct:
    """An argument of a program that is compiled only; `cut` names the axes that cut it."""
    return jax.ShapeDtypeStruct(tuple(shape), dtype, sharding=NamedSharding(mesh, P(*cut)))


def over_time(op: Callable, mesh) -> Callable:
    """op of whole arrays [B, T, ...], of which each device gets its stretch of time."""
    time = P(None, AXIS)
    return jax.shard_map(op, mesh=mesh, in_specs=time, out_specs=time, check_vma=False)


def compiled(program: Callable, *arguments):
    """The program for these arguments, compiled and not to be run."""
    return jax.jit(program).lower(*arguments).compile(NOT_RUN)


def sent(program) -> dict[str, dict[str, float]]:
    """{kind: {"bytes" that a device sends, "runs" of its collectives}} of a compiled program."""
    found = collectives(program.as_text())
    runs: dict[str, int] = {}
    for c in found:
        runs[c.kind] = runs.get(c.kind, 0) + c.times
    return {kind: {"bytes": n, "runs": runs[kind]} for kind, n in sent_bytes(found).items()}


def total_bytes(counts: Mapping[str, Mapping[str, float]]) -> float:
    """Of all kinds of `sent`."""
    return sum(kind["bytes"] for kind in counts.values())


def memory(program) -> dict[str, int]:
    """Bytes of a device: arguments, results that are not arguments, and what is between."""
    m = program.memory_analysis()
    parts = {
        "arguments": m.argument_size_in_bytes,
        "results": m.output_size_in_bytes - m.alias_size_in_bytes,
        "temporary": m.temp_size_in_bytes,
    }
    return parts | {"total": sum(parts.values())}


def difference(got, want) -> float:
    """The largest difference of two trees of arrays, as a part of each array's largest value."""
    errors = [
        np.max(np.abs(np.asarray(a, np.float64) - np.asarray(b, np.float64)))
        / max(np.max(np.abs(np.asarray(b, np.float64))), 1e-30)
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)
    ]
    return float(max(errors))


def largest(size: Callable[[int], float], budget: float, start: int, tolerance: float = 0.0) -> int:
    """An n with size(n) <= budget < size(n + 1 + tolerance n), by few calls; 0 if 1 is too much.

    `size` grows with n. The next n to be tried is on the line through the two nearest ones, and
    behind one that fits by a hair.
    """
    below, above, seen, close = 0, None, {}, False
    n = start
    while True:
        seen[n] = size(n)
        fits = seen[n] <= budget
        below, above = (n, above) if fits else (below, n)
        step = 1 + int(tolerance * below)
        if above is not None and above - below <= step:
            return below
        guess = _on_line(seen, below, above, budget)
        n = below + step if fits and close else guess
        close = not (fits and close)  # a guess was made, and now it may be tested
        most = 4 * below if above is None else above - 1
        n = min(max(n, below + 1), most)


def _on_line(seen, below: int, above: int | None, budget: float) -> int:
    """Where the line through the two tried n around the budget, or below it, meets it."""
    tried = sorted(seen)
    fitting = [n for n in tried if n <= below][-2:]
    pair = [*fitting[-1:], above] if above is not None else fitting
    if len(pair) < 2:
        return 2 * below if above is None else above // 2
    a, b = pair
    return a + int((budget - seen[a]) / max(seen[b] - seen[a], 1) * (b - a))


def train(settings: Mapping[str, Any], seed: int) -> dict:
    """Trains a small model with its time cut over devices: {"losses": of every step}.

    Settings: "model", fields of LanguageModelConfig; "parts", devices along time; "batch",
    "length", "steps", Adam's "rate"; "masked", True for guessing hidden tokens and False for the
    next ones; "dtype" of parameters and layers (gradients and Adam's moments are float32).
    """
    s = settings
    mesh = sharding.make_mesh(MeshConfig(data=1, sequence=s["parts"]), devices(s["parts"]))
    with jax.enable_x64(s["dtype"] == "float64"):
        return {"losses": list(_losses(s, seed, mesh))}


def _losses(s, seed, mesh) -> Iterator[float]:
    fields = {k: tuple(v) if isinstance(v, list) else v for k, v in s["model"].items()}
    fields |= {"dtype": s["dtype"], "param_dtype": s["dtype"]}
    model = LanguageModel(LanguageModelConfig(**fields))
    batches = texts(s["model"]["vocab_size"], s["batch"], s["length"], s["masked"], seed)
    tx = optax.adam(s["rate"])
    where, _, initialise = sharded_init(model, tx, next(batches), seed, mesh)
    loss = steps.make_loss(model, "language_model")
    step = jax.jit(
        steps.make_train_step(loss, tx, lambda _: s["rate"]),
        out_shardings=(where, sharding.replicated(mesh)),
        donate_argnums=0,
    )
    with sharding.use(mesh):
        state = initialise()
        for _ in range(s["steps"]):
            state, metrics = step(state, sharding.put_batch(next(batches), mesh))
            yield float(metrics["loss"])


def texts(vocab: int, batch: int, length: int, masked: bool, seed: int) -> Iterator[dict]:
    """Endless batches of a Markov chain in which a token has four successors.

    With `masked`, 15% of the tokens are hidden behind the last token, which the chain lacks, and
    count; else all do, and targets are the next tokens.
    """
    rng = np.random.default_rng(seed)
    words = vocab - 1
    successors = rng.integers(0, words, (words, 4))
    odds = np.cumsum(rng.dirichlet(np.ones(4), words), axis=1)
    while True:
        rows = np.empty((batch, length + 1), np.int32)
        rows[:, 0] = rng.integers(0, words, batch)
        draws = rng.random((batch, length))
        for t in range(length):
            now = rows[:, t]
            choice = np.minimum((draws[:, t, None] > odds[now]).sum(1), 3)
            rows[:, t + 1] = successors[now, choice]
        tokens, targets = rows[:, :-1], rows[:, 1:]
        weights = np.ones((batch, length), np.float32)
        if masked:
            hidden = rng.random((batch, length)) < 0.15
            tokens, targets = np.where(hidden, words, tokens), tokens
            weights = hidden.astype(np.float32)
        yield {"tokens": tokens.astype(np.int32), "targets": targets, "weights": weights}


def apart(losses: list[float], others: list[float]) -> float:
    """The largest distance of two curves, step by step."""
    return max(abs(a - b) for a, b in zip(losses, others, strict=True))
