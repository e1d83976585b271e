"""ZeCO: the measurements.

Chou et al.: ZeCO: Zero Communication Overhead Sequence Parallelism for Linear Attention. 2025,
arXiv 2507.01004.
"""

from tilescan.experiments.harness.cells import Cell, Paper
from tilescan.experiments.measurements import devices as sequence_parallel_cells
from tilescan.experiments.papers.zeco import claims as zeco_claims
from tilescan.experiments.papers.zeco import counts as zeco_counts
from tilescan.experiments.papers.zeco import tables as zeco_tables


def cells(config) -> list[Cell]:
    """All measurements of the config."""
    return [
        *exactness_cells(config),
        *traffic_cells(config),
        *block_cells(config),
        *training_cells(config),
    ]


def exactness_cells(config) -> list[Cell]:
    """Every schedule against one device."""
    c = config.exactness
    base = {k: c[k] for k in ("length", "heads", "dim")}
    base |= {"decays": list(c.decays), "dtypes": list(c.dtypes)}
    return [
        Cell(
            f"exactness-P{n}",
            zeco_counts.exactness,
            {"kind": "exactness", "devices": n, **base},
            seconds=20 + 4 * n,
        )
        for n in c.devices
    ]


def traffic_cells(config) -> list[Cell]:
    """What devices send, compiled for the paper's shape."""
    c = config.traffic
    base = {"length": c.length, "heads": c.heads, "dim": c.dim}
    return [
        Cell(
            f"traffic-P{n}",
            zeco_counts.traffic,
            {"kind": "traffic", "devices": n, **base},
            seconds=20,
        )
        for n in c.devices
    ]


def block_cells(config) -> list[Cell]:
    """All-Scan by the number of blocks."""
    made = []
    for n in config.blocks.devices:
        for k in config.blocks.blocks:
            settings = {"kind": "blocks", "devices": n, "blocks": k}
            settings |= {"heads": config.traffic.heads, "dim": config.traffic.dim}
            made.append(Cell(f"blocks-P{n}-K{k}", zeco_counts.blocks, settings, seconds=0.5))
    return made


def training_cells(config) -> list[Cell]:
    """One device, and time cut over several by each schedule."""
    c = config.training
    model = {
        "vocab_size": c.vocab_size,
        "d_model": c.d_model,
        "pattern": ["gla", "mlp"],
        "repeats": c.layers,
        "mixers": {"gla": {"n_heads": c.heads}},
    }
    base = {k: c[k] for k in ("batch", "length", "steps", "rate")}
    made = []
    for dtype in c.dtypes:
        # Schedules differ in their rounding alone, which float64 hides; one shows how it grows.
        kinds = c.kinds if dtype == c.dtypes[0] else c.kinds[:1]
        for kind in ("one device", *kinds):
            parts = 1 if kind == "one device" else c.parts
            own = model if parts == 1 else model | {"sequence_parallel": kind}
            settings = {"kind": "training", "schedule": kind, "parts": parts, "model": own}
            settings |= {"dtype": dtype, "masked": False, **base}
            cell_id = f"training-{dtype}-{kind.replace(' ', '-')}"
            train = sequence_parallel_cells.train
            made.append(Cell(cell_id, train, settings, seconds=5 + c.steps / 10))
    return made


PAPER = Paper(
    name="zeco",
    title="ZeCO: zero communication overhead sequence parallelism for linear attention "
    "(arXiv 2507.01004)",
    summary="Devices that share a sequence of linear attention need one state each from the device "
    "before. All-Scan passes it on in blocks, so that what a device sends does not depend on how "
    "many devices there are.",
    cells=cells,
    tables=zeco_tables.tables,
    claims=zeco_claims.claims,
    figures=zeco_tables.figures,
    family="sequence parallelism",
)
