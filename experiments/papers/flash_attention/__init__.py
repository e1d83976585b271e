"""FlashAttention.

Dao, Fu, Ermon, Rudra, Re: FlashAttention: Fast and Memory-Efficient Exact Attention with
IO-Awareness. NeurIPS 2022, arXiv 2205.14135.
"""

from tilescan.experiments.harness.cells import Paper
from tilescan.experiments.papers.flash_attention import cells, claims, figures, tables

PAPER = Paper.of(
    (cells, claims, figures, tables),
    title="FlashAttention: fast and memory-efficient exact attention with IO-awareness "
    "(arXiv 2205.14135)",
    summary="Softmax attention computed tile by tile, so that the matrix of scores is never "
    "stored: exact, linear in memory, and faster the longer the sequence.",
)
