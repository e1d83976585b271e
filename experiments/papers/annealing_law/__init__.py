"""Scaling Law with Learning Rate Annealing.

Tissue, Wang, Wang: Scaling Law with Learning Rate Annealing. 2024, arXiv 2408.11029.
"""

from tilescan.experiments.harness.cells import Paper
from tilescan.experiments.papers.annealing_law import cells, claims, tables

PAPER = Paper.of(
    (cells, claims, tables),
    title="Scaling law with learning rate annealing (arXiv 2408.11029)",
    summary="A law of four parameters, fitted to two short runs, predicts every step of runs with "
    "other learning-rate schedules.",
    family="training dynamics",
    source="recalled",
)
