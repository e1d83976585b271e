"""Hungry Hungry Hippos (H3).

Fu, Dao, Saab, Thomas, Rudra, Re: Hungry Hungry Hippos: Towards Language Modeling with State Space
Models. ICLR 2023, arXiv 2212.14052.
"""

from tilescan.experiments.harness.cells import Paper
from tilescan.experiments.papers.h3 import cells, claims, tables

PAPER = Paper.of(
    (cells, claims, tables),
    title="Hungry Hungry Hippos: towards language modeling with state space models "
    "(arXiv 2212.14052)",
    summary="Two state spaces and two gates let a layer recall and compare tokens; with one layer "
    "of attention kept, it models text as well as a Transformer.",
    family="state space models",
    source="from a secondary source",
)
