"""What long sequences need on 64, 256 and 512 chips: a table of plans, none of which ran.

    python -m tilescan.planning.table  all rows that results/plan/plan.json lacks
    python -m tilescan.planning.table --limit=1  the next one

Each row is compiled in a process of its own and written at once, to plan.json and plan.md. Needs
libtpu; one to five minutes a row, the hybrid on 512 chips a quarter of an hour.
"""

import argparse
import dataclasses
import importlib.metadata
import itertools
import json
import pathlib
import subprocess
import sys

import ml_collections

from tilescan.files import write_atomically
from tilescan.planning.chips import CHIPS, GIB
from tilescan.planning.topologies import generation, torus_axes
from tilescan.training.environment import git_commit

TOPOLOGIES = {64: "v5p:4x4x4", 256: "v5p:4x8x8", 512: "v5p:8x8x8"}
TOKENS = (2**17, 2**20, 2**22)
MODELS = ("transformer", "mamba2", "hybrid")
# Tokens of a sequence that a device should hold at most: the logits of so many are 3 GiB.
AT_MOST = 2**14
FOLDER = pathlib.Path("results") / "plan"


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table."""

    model: str
    tokens: int
    chips: int

    @property
    def key(self) -> str:
        """The row's key in plan.json."""
        return f"{self.model}-{self.tokens}-{self.chips}"

    @property
    def sequence(self) -> int:
        """Devices along a sequence: the fewest that hold AT_MOST tokens each, or else all.

        An axis of the mesh is a product of sides of the torus. What is left is fsdp, so that
        parameters are sharded as far as lengths allow: with sequence = chips they are whole.
        """
        return next(
            (n for n in torus_axes(TOPOLOGIES[self.chips]) if self.tokens <= n * AT_MOST),
            self.chips,
        )


ROWS = [Row(m, t, c) for c, t, m in itertools.product(TOPOLOGIES, TOKENS, MODELS)]


def config_of(row: Row) -> ml_collections.ConfigDict:
    """Returns the training configuration of a row: one sequence for each shard of the batch."""
    from tilescan.configs.long_sequences import get_config

    config = get_config(row.model)
    config.data.seq_len = row.tokens
    config.data.batch_size = config.mesh.fsdp = row.chips // row.sequence
    config.mesh.sequence = row.sequence
    return config


def measure(row: Row) -> dict:
    """Compiles a row; returns its plan, and what it depended on, as JSON."""
    from tilescan.planning.plan import plan

    config = config_of(row)
    made = plan(config, TOPOLOGIES[row.chips])
    versions = {name: importlib.metadata.version(name) for name in ("jax", "libtpu", "flax")}
    return {
        "row": dataclasses.asdict(row),
        "plan": dataclasses.asdict(made),
        "logits_bytes": made.tokens // made.devices * config.model.vocab_size * 4,
        "versions": versions,
        "commit": git_commit(digits=12),
    }


def load(folder: pathlib.Path) -> dict[str, dict]:
    """Reads the rows that a folder has, {} without any."""
    path = folder / "plan.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def write(folder: pathlib.Path, rows: dict[str, dict]) -> None:
    """Writes both files, of the rows that there are, in the order of ROWS."""
    done = {row.key: rows[row.key] for row in ROWS if row.key in rows}
    write_atomically(folder / "plan.json", json.dumps(done, indent=1) + "\n")
    write_atomically(folder / "plan.md", markdown(list(done.values())))


_HEAD = """\
# Long sequences on TPU v5p: what a training step needs

Static figures of a compiler, counts and vendors' bounds: **nothing here has run on a device**. Made
by `python -m tilescan.planning.table` with {versions}. Models: `configs/long_sequences.py`
(1.3B parameters, float32 with two moments, bfloat16 computation, layers computed again in the
backward pass, one sequence for each shard of the batch).

- The mesh: `sequence` is the smallest product of the torus's sides that leaves a device at most
  {at_most:,} tokens of a sequence, `fsdp` is the rest. A batch is sharded over `fsdp`, and
  parameters are not sharded over `sequence`: where one sequence takes all chips (fsdp 1), every
  chip holds all parameters, moments and gradients, and the whole gradient is summed over all chips.
- needs, state (parameters and moments), temporaries: GiB of a chip, as libtpu says; a chip has
  {memory:.0f}. logits: GiB of the float32 logits of a chip's tokens. The loss of `training.steps`
  holds them as a whole, among the temporaries, unless `train.logit_chunk` is set: set it
  where they are large, as on 64 chips for 4 million tokens.
- TFLOPs: of a chip and step, by formulas, with those that the backward pass does again:
  the mean. The hybrid's tokens lie in their order, so that its last chip has nearly twice the mean
  of attention; the Transformer's lie zigzag, and all have the same.
- permuted, gathered, reduced, all-to-all: GiB that a chip sends in a step, loops included, by the
  compiled program; kernels' own copies of states to the next chip are under permuted.
- bounds: seconds that no step can go below, by {flops:.0f} TFLOP/s, {bandwidth:,.0f} GB/s of memory
  and {links:.0f} GB/s of links; not times, and nothing of waiting.

"""
_COLUMNS = (
    "model", "tokens", "chips", "sequence x fsdp", "fits", "needs", "state", "temporaries",
    "logits", "TFLOPs", "permuted", "gathered", "reduced", "all-to-all",
    "bound: FLOPs", "memory", "links",
)  # fmt: skip


def markdown(rows: list[dict]) -> str:
    """Formats rows as plan.md: what they show and how, then the table."""
    chip = CHIPS[generation(TOPOLOGIES[64])]
    versions = sorted({f"{n} {v}" for row in rows for n, v in row["versions"].items()})
    head = _HEAD.format(
        versions=", ".join(versions),
        at_most=AT_MOST,
        memory=chip.memory / GIB,
        flops=chip.flops / 1e12,
        bandwidth=chip.bandwidth / 1e9,
        links=chip.links / 1e9,
    )
    lines = [" | ".join(_COLUMNS), " | ".join("---" for _ in _COLUMNS), *map(_line, rows)]
    return head + "\n".join(f"| {line} |" for line in lines) + "\n"


def _line(row: dict) -> str:
    """Formats a row's cells."""
    p, of = row["plan"], row["plan"]["bytes"]
    gib = lambda n: f"{n / GIB:.2f}"
    sent = p["sent"]
    kinds = lambda *names: (
        "-" if sent is None else gib(sum(sent.get(name, {"bytes": 0})["bytes"] for name in names))
    )
    bound = lambda name: f"{p['bounds'][name]:.3g}" if name in p["bounds"] else "-"
    cells = (
        row["row"]["model"],
        f"{p['seq_len']:,}",
        str(p["devices"]),
        f"{p['mesh']['sequence']} x {p['mesh']['fsdp']}",
        "yes" if p["fits"] else "no",
        ("at least " if p["at_least"] else "") + gib(p["needs"]),
        gib(of["parameters"] + of["optimizer"]),
        gib(of["temporaries"]) if "temporaries" in of else "-",
        gib(row["logits_bytes"]),
        f"{p['step_operations'] / p['devices'] / 1e12:,.0f}",
        kinds("collective-permute", "remote-copy"),
        kinds("all-gather"),
        kinds("all-reduce", "reduce-scatter"),
        kinds("all-to-all"),
        bound("compute"),
        bound("memory"),
        bound("links"),
    )
    return " | ".join(cells)


def main(argv: list[str] | None = None) -> int:
    """Compiles the rows that are missing, each in its own process; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=pathlib.Path, default=FOLDER)
    parser.add_argument("--only", default="", help="rows whose key contains this")
    parser.add_argument("--limit", type=int, help="how many rows at most")
    parser.add_argument("--row", help=argparse.SUPPRESS)  # what the process of a row is told
    options = parser.parse_args(argv)
    if options.row:
        print("@" + json.dumps(measure(next(row for row in ROWS if row.key == options.row))))
        return 0

    # The rows that are missing; each is written once it is there.
    rows, failed = load(options.folder), 0
    todo = [row for row in ROWS if options.only in row.key and row.key not in rows]
    for row in todo[: options.limit]:
        command = [sys.executable, "-m", "tilescan.planning.table", f"--row={row.key}"]
        done = subprocess.run(command, capture_output=True, text=True)
        answers = [line[1:] for line in done.stdout.splitlines() if line[:1] == "@"]
        if not answers:
            failed += 1
            print(f"{row.key}: ended with {done.returncode}: {done.stderr[-2000:]}", flush=True)
            continue
        rows = load(options.folder) | {row.key: json.loads(answers[0])}
        write(options.folder, rows)
        print(_line(rows[row.key]), flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
