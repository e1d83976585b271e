"""Structured State Spaces (S4).

Gu, Goel, Re: Efficiently Modeling Long Sequences with Structured State Spaces. ICLR 2022, arXiv
2111.00396.
"""

from tilescan.experiments.harness.cells import Paper
from tilescan.experiments.papers.s4 import cells, claims, tables

PAPER = Paper.of(
    (cells, claims, tables),
    title="Efficiently modeling long sequences with structured state spaces (arXiv 2111.00396)",
    summary="A linear state space that starts from HiPPO is a long convolution in training and a "
    "recurrence in generation. It learns from long sequences what Transformers of its size do not.",
    family="state space models",
)
