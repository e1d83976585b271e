"""ZeCO.

Chou et al.: ZeCO: Zero Communication Overhead Sequence Parallelism for Linear Attention. 2025,
arXiv 2507.01004.
"""

from tilescan.experiments.harness.cells import Paper
from tilescan.experiments.papers.zeco import cells, claims, tables

PAPER = Paper.of(
    (cells, claims, tables),
    title="ZeCO: zero communication overhead sequence parallelism for linear attention "
    "(arXiv 2507.01004)",
    summary="Devices that share a sequence of linear attention need one state each from the device "
    "before. All-Scan passes it on in blocks, so that what a device sends does not depend on how "
    "many devices there are.",
    family="sequence parallelism",
    source="from a secondary source",
)
