"""DeepSpeed-Ulysses.

Jacobs et al.: DeepSpeed Ulysses: System Optimizations for Enabling Training of Extreme Long
Sequence Transformer Models. 2023, arXiv 2309.14509.
"""

from tilescan.experiments.harness.cells import Paper
from tilescan.experiments.papers.ulysses import cells, claims, tables

PAPER = Paper.of(
    (cells, claims, tables),
    title="DeepSpeed Ulysses: system optimizations for extreme long sequence Transformers "
    "(arXiv 2309.14509)",
    summary="Devices that share a sequence exchange time for heads by all-to-all and attend to all "
    "of it with some heads each. What a device sends stays constant when sequences grow with the "
    "devices, and any attention fits between.",
    family="sequence parallelism",
)
