"""What can be sharded over the sequence: every mixer, strategy, packing and order, tried.

    python -m tests.models.sequence_cells     # tries them all, writes docs/sequence_parallel.md

A cell is supported if loss and gradients of a one-block language model on four devices are those of
one device; otherwise the error that it raises is the cell.
"""

import functools
import itertools
import os
import pathlib
import re
import sys
from typing import NamedTuple

if __name__ == "__main__":
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from tilescan.models import LanguageModel, LanguageModelConfig
from tilescan.models.mixers import MIXERS, attends, is_recurrent
from tilescan.ops.sequence_parallel import ATTENTION_KINDS, BALANCES, SCAN_KINDS
from tilescan.training import sharding, steps
from tilescan.training.settings import MeshConfig

B, T, VOCAB = 2, 16, 16
DOC = pathlib.Path(__file__).resolve().parents[2] / "docs" / "sequence_parallel.md"
TOLERANCE = 1e-4
OPTIONS = {
    "local_attention": dict(window=5),
    "mamba2": dict(head_dim=4, state_dim=4),
    "mamba": dict(state_dim=4),
    "gla": dict(n_heads=2, gate_rank=2),
    "gated_deltanet": dict(n_heads=2),
    "h3": dict(state_dim=4),
    "s4": dict(state_dim=4),
    "s4d": dict(state_dim=4),
}


class Cell(NamedTuple):
    mixer: str
    kind: str
    packed: bool
    balance: str


def cells() -> list[Cell]:
    """All of them, in the order of the table."""
    found = []
    for mixer in (*filter(attends, MIXERS), *sorted(filter(is_recurrent, MIXERS))):
        kinds = ATTENTION_KINDS if attends(mixer) else SCAN_KINDS
        found += [Cell(mixer, *rest) for rest in itertools.product(kinds, (False, True), BALANCES)]
    return found


def outcome(cell: Cell) -> str:
    """ "exact", or the error that the cell raises.

    Raises:
      AssertionError: numbers that differ from one device's.
    """
    mesh = sharding.make_mesh(MeshConfig(data=1, sequence=4), jax.devices()[:4])
    params, want = on_one_device(cell.mixer, cell.packed)
    try:
        got = value_and_gradient(cell, mesh)(params)
    except ValueError as error:
        return str(error).splitlines()[0]
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        worst = np.abs(np.asarray(a) - b).max() / max(np.abs(b).max(), 1e-2)
        assert worst < TOLERANCE, (cell, worst)
    return "exact"


@functools.cache
def on_one_device(mixer: str, packed: bool):
    """(parameters, (loss, gradients)) of a mixer's model."""
    mesh = sharding.make_mesh(MeshConfig(data=1), jax.devices()[:1])
    cell = Cell(mixer, "ring" if attends(mixer) else "all_scan", packed, "contiguous")
    tokens = jnp.asarray(batch(packed)["tokens"])
    params = nn.unbox(jax.jit(model(cell).init)(jax.random.key(0), tokens))["params"]
    return params, jax.device_get(value_and_gradient(cell, mesh)(params))


def value_and_gradient(cell: Cell, mesh):
    """A function of the parameters, compiled for the mesh."""
    put = sharding.put_batch(batch(cell.packed), mesh, cell.balance)
    loss = steps.make_loss(model(cell), "language_model")

    def run(params):
        with sharding.use(mesh):
            params = jax.device_put(params, sharding.replicated(mesh))
            return jax.jit(jax.value_and_grad(lambda p: loss(p, put)[0]))(params)

    return run


def model(cell: Cell) -> LanguageModel:
    return LanguageModel(
        LanguageModelConfig(
            vocab_size=VOCAB,
            d_model=8,
            pattern=(cell.mixer,),
            repeats=1,
            n_heads=2,
            n_kv_heads=1,
            head_dim=4,
            mixers={cell.mixer: OPTIONS[cell.mixer]} if cell.mixer in OPTIONS else {},
            **{f"{'attention' if attends(cell.mixer) else 'scan'}_sequence_parallel": cell.kind},
            sequence_balance=cell.balance,
        )
    )


def batch(packed: bool) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, VOCAB, (B, T + 1)).astype(np.int32)
    rows = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:]}
    rows["weights"] = np.ones((B, T), np.float32)
    if packed:
        rows["segment_ids"] = np.sort(rng.integers(1, 4, (B, T)), axis=1).astype(np.int32)
    return rows


def document(outcomes: dict[Cell, str]) -> str:
    """The page: a row for mixer and strategy, a column for packing and order."""
    columns = list(itertools.product((False, True), BALANCES))
    head = [f"{'packed' if packed else 'whole'}, {balance}" for packed, balance in columns]
    lines = [
        "# What can be split over the sequence",
        "",
        "Written by `python -m tests.models.sequence_cells`, which tries every cell: ✓ means that",
        "loss and gradients of a one-block language model on four devices are those of one device",
        f"to {TOLERANCE:g} of the largest entry, in float32; a number is the error that is raised",
        "instead, below, for that MIXER.",
        "",
        "Set the strategy by `model.attention_sequence_parallel` and",
        "`model.scan_sequence_parallel`, and the order of tokens by `model.sequence_balance`; the",
        "devices are `mesh.sequence`.",
        "",
        f"| mixer | strategy | {' | '.join(head)} |",
        "|---" * (2 + len(head)) + "|",
    ]
    errors = []
    for (mixer, kind), group in itertools.groupby(outcomes, key=lambda c: (c.mixer, c.kind)):
        marks = []
        for cell in group:
            text = named(outcomes[cell], mixer, "MIXER")
            if text != "exact" and text not in errors:
                errors.append(text)
            marks.append("✓" if text == "exact" else str(1 + errors.index(text)))
        lines.append(f"| `{mixer}` | `{kind}` | {' | '.join(marks)} |")
    lines += ["", *(f"{i}. {text}" for i, text in enumerate(errors, 1)), ""]
    return "\n".join(lines)


def named(error: str, old: str, new: str) -> str:
    """An error about one mixer, about another: most say the same of all."""
    return re.sub(rf"(?<!\w){old}(?!\w)", new, error)


def main() -> None:
    outcomes = {}
    for i, cell in enumerate(cells(), 1):
        outcomes[cell] = outcome(cell)
        print(f"{i}/{len(cells())} {cell}: {outcomes[cell][:60]}", file=sys.stderr, flush=True)
    DOC.write_text(document(outcomes))


if __name__ == "__main__":
    jax.config.update("jax_disable_most_optimizations", True)
    main()
