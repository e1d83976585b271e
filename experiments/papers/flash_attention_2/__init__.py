"""FlashAttention-2.

Dao: FlashAttention-2: Faster Attention with Better Parallelism and Work Partitioning. ICLR 2024,
arXiv 2307.08691.
"""

from tilescan.experiments.harness.cells import Paper
from tilescan.experiments.papers.flash_attention_2 import cells, claims, tables

PAPER = Paper.of(
    (cells, claims, tables),
    title="FlashAttention-2: faster attention with better parallelism and work partitioning "
    "(arXiv 2307.08691)",
    summary="The same exact attention with queries in the outer loop: the output stays on chip, is "
    "divided once, and tiles above the diagonal are skipped.",
)
