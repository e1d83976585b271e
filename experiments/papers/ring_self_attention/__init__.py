"""Ring Self-Attention: the measurements.

Li et al.: Sequence Parallelism: Long Sequence Training from System Perspective. ACL 2023, arXiv
2105.13120.
"""

from tilescan.experiments.harness.cells import Cell, Paper
from tilescan.experiments.measurements import devices as sequence_parallel_cells
from tilescan.experiments.papers.ring_self_attention import (
    claims as ring_self_attention_claims,
)
from tilescan.experiments.papers.ring_self_attention import (
    measure as ring_self_attention_cells,
)
from tilescan.experiments.papers.ring_self_attention import (
    tables as ring_self_attention_tables,
)


def cells(config) -> list[Cell]:
    """All measurements of the config."""
    return [
        *exactness_cells(config),
        *traffic_cells(config),
        *weak_cells(config),
        *largest_cells(config),
        *linformer_cells(config),
        *crossover_cells(config),
        *training_cells(config),
    ]


def exactness_cells(config) -> list[Cell]:
    """RSA and others against dense attention."""
    c = config.exactness
    base = {k: c[k] for k in ("length", "heads", "dim")}
    run = ring_self_attention_cells.exactness
    return [
        Cell(f"exactness-N{n}", run, {"kind": "exactness", "devices": n, **base}, seconds=10)
        for n in c.devices
    ]


def traffic_cells(config) -> list[Cell]:
    """What a layer sends."""
    c, m = config.traffic, config.model
    base = {"batch": c.batch, "length": c.length, "width": m.width, "heads": m.heads}
    run = ring_self_attention_cells.traffic
    return [
        Cell(f"traffic-N{n}", run, {"kind": "traffic", "devices": n, **base}, seconds=12)
        for n in c.devices
    ]


def _model(config) -> dict:
    return {k: config.model[k] for k in ("layers", "width", "heads", "vocab_size")}


def weak_cells(config) -> list[Cell]:
    """Table 4: batches, then texts, that grow with the devices."""
    c, made = config.weak, []
    for grows in ("batch", "length"):
        for way in c.ways:
            for n in c.devices:
                if way in ("tensor", "ulysses") and config.model.heads % n:
                    continue
                batch, length = (
                    (n * c.batch, c.length) if grows == "batch" else (c.batch, n * c.short)
                )
                settings = {"kind": "weak", "grows": grows, "way": way, "devices": n}
                settings |= {"batch": batch, "length": length, **_model(config)}
                run = ring_self_attention_cells.memory
                made.append(Cell(f"weak-{grows}-{way}-N{n}", run, settings, seconds=4))
    return made


def largest_cells(config) -> list[Cell]:
    """The largest batch and the longest text by the devices."""
    c, made = config.largest, []
    for vary in ("batch", "length"):
        for way in c.ways:
            for n in c.devices:
                if way == "tensor" and config.model.heads % n:
                    continue
                if vary == "batch" and way != "tensor" and c.length % n:
                    continue
                settings = {"kind": "largest", "vary": vary, "way": way, "devices": n}
                settings |= {"length": c.length} if vary == "batch" else {"batch": c.batch}
                settings |= {"gib": c.gib, "tolerance": c.tolerance, **_model(config)}
                run = ring_self_attention_cells.largest
                made.append(Cell(f"largest-{vary}-{way}-N{n}", run, settings, seconds=15))
    return made


def linformer_cells(config) -> list[Cell]:
    """The longest text with attention to a few rows, and with RSA beside it."""
    c, made = config.linformer, []
    for way in ("linformer", "ring_self_attention"):
        for n in c.devices:
            settings = {"kind": "sparse", "vary": "length", "way": way, "devices": n}
            settings |= {"batch": c.batch, "rows": c.rows, "gib": config.largest.gib}
            settings |= {"tolerance": config.largest.tolerance, **_model(config)}
            run = ring_self_attention_cells.largest
            made.append(Cell(f"sparse-{way}-N{n}", run, settings, seconds=15))
    return made


def crossover_cells(config) -> list[Cell]:
    """An MLP alone."""
    made = []
    for n in config.crossover.devices:
        for tokens in config.crossover.tokens:
            settings = {"kind": "crossover", "devices": n, "tokens": tokens}
            settings["width"] = config.model.width
            run = ring_self_attention_cells.crossover
            made.append(Cell(f"crossover-N{n}-BL{tokens}", run, settings, seconds=1))
    return made


def training_cells(config) -> list[Cell]:
    """Guessing hidden tokens, on one device and with time cut."""
    c = config.training
    model = {
        "vocab_size": c.vocab_size,
        "d_model": c.d_model,
        "n_heads": c.heads,
        "repeats": c.layers,
        "causal": False,
        "mlp": "gelu",
        "norm": "layernorm",
        "sequence_parallel": "ring_self_attention",
    }
    base = {k: c[k] for k in ("batch", "length", "steps", "rate")}
    made = []
    for dtype in c.dtypes:
        for n in (1, c.parts):
            settings = {"kind": "training", "parts": n, "model": model, "dtype": dtype}
            settings |= {"masked": True, **base}
            train = sequence_parallel_cells.train
            made.append(Cell(f"training-{dtype}-N{n}", train, settings, seconds=5 + c.steps / 10))
    return made


PAPER = Paper(
    name="ring_self_attention",
    title="Sequence parallelism: long sequence training from system perspective (arXiv 2105.13120)",
    summary="Devices split the text instead of the weights, and keys and values go round a ring. "
    "Batches and texts then grow with the devices, where tensor parallelism keeps whole "
    "activations on each.",
    cells=cells,
    tables=ring_self_attention_tables.tables,
    claims=ring_self_attention_claims.claims,
    figures=ring_self_attention_tables.figures,
    family="sequence parallelism",
)
