"""DeepSpeed-Ulysses: the measurements.

Jacobs et al.: DeepSpeed Ulysses: System Optimizations for Enabling Training of Extreme Long
Sequence Transformer Models. 2023, arXiv 2309.14509.
"""

from tilescan.experiments.harness.cells import Cell, Paper
from tilescan.experiments.measurements import devices as sequence_parallel_cells
from tilescan.experiments.papers.ulysses import claims as ulysses_claims
from tilescan.experiments.papers.ulysses import measure as ulysses_cells
from tilescan.experiments.papers.ulysses import tables as ulysses_tables


def cells(config) -> list[Cell]:
    """All measurements of the config."""
    return [
        *exactness_cells(config),
        *traffic_cells(config),
        *memory_cells(config),
        *training_cells(config),
    ]


def exactness_cells(config) -> list[Cell]:
    """Every kind of attention against one device."""
    c = config.exactness
    base = {k: c[k] for k in ("length", "heads", "dim")}
    return [
        Cell(
            f"exactness-{kind}-P{n}",
            ulysses_cells.exactness,
            {"kind": "exactness", "attention": kind, "devices": n, **base},
            seconds=4,
        )
        for kind in c.kinds
        for n in c.devices
    ]


def traffic_cells(config) -> list[Cell]:
    """What a layer sends: lengths by devices, and lengths that grow with the devices."""
    c = config.traffic
    points = [(n, length) for length in c.lengths for n in c.devices]
    points += [(n, n * c.weak_length) for n in c.weak_devices]
    base = {"width": c.width, "heads": c.heads, "ways": list(c.ways)}
    return [
        Cell(
            f"traffic-P{n}-N{length}",
            ulysses_cells.traffic,
            {"kind": "traffic", "devices": n, "length": length, **base},
            seconds=10,
        )
        for n, length in dict.fromkeys(points)
    ]


def memory_cells(config) -> list[Cell]:
    """The longest text that fits."""
    c = config.memory
    base = {k: c[k] for k in ("layers", "width", "heads", "vocab_size", "unit", "gib", "tolerance")}
    return [
        Cell(
            f"longest-{way}-P{n}",
            ulysses_cells.longest,
            {"kind": "longest", "way": way, "devices": n, **base},
            seconds=25,
        )
        for way in c.ways
        for n in c.devices
    ]


def training_cells(config) -> list[Cell]:
    """The same training on one device and with its time cut."""
    c = config.training
    model = {
        "vocab_size": c.vocab_size,
        "d_model": c.d_model,
        "n_heads": c.heads,
        "repeats": c.layers,
        "sequence_parallel": "ulysses",
    }
    base = {k: c[k] for k in ("batch", "length", "steps", "rate")}
    made = []
    for dtype in c.dtypes:
        # Float32 shows by one cut how rounding grows, which float64 hides.
        for n in (1, *(c.parts if dtype == c.dtypes[0] else c.parts[:1])):
            settings = {"kind": "training", "parts": n, "model": model, "dtype": dtype}
            settings |= {"masked": False, **base}
            train = sequence_parallel_cells.train
            made.append(Cell(f"training-{dtype}-P{n}", train, settings, seconds=5 + c.steps / 10))
    return made


PAPER = Paper(
    name="ulysses",
    title="DeepSpeed Ulysses: system optimizations for extreme long sequence Transformers "
    "(arXiv 2309.14509)",
    summary="Devices that share a text exchange time for heads by all-to-all and attend to all of "
    "it with some heads each. What a device sends stays constant when texts grow with the devices, "
    "and any attention fits between.",
    cells=cells,
    tables=ulysses_tables.tables,
    claims=ulysses_claims.claims,
    figures=ulysses_tables.figures,
    family="sequence parallelism",
)
