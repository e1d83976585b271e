"""Stuffed Mamba.

Chen, Zhang, Hu, Han, Liu, Sun: Stuffed Mamba: State Collapse and State Capacity of RNN-Based
Long-Context Modeling. 2024, arXiv 2410.07145.
"""

from tilescan.experiments.harness.cells import Paper
from tilescan.experiments.papers.stuffed_mamba import cells, claims, tables

PAPER = Paper.of(
    (cells, claims, tables),
    title="Stuffed Mamba: state collapse and state capacity of RNNs on long contexts "
    "(arXiv 2410.07145)",
    summary="A Mamba-2 trained on sequences too short to fill its state never learns to forget, "
    "and breaks on longer ones; larger states need longer sequences; forgetting can be forced "
    "afterwards.",
    family="state space models",
    source="from a secondary source",
)
