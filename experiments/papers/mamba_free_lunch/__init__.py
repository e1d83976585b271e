"""Can Mamba Always Enjoy the "Free Lunch"?

Ren, Chen, Liu, Ji, Guo, Ding: Exploring the Limitations of Mamba in COPY and CoT Reasoning.
EMNLP 2025, arXiv 2410.03810.
"""

from tilescan.experiments.harness.cells import Paper
from tilescan.experiments.papers.mamba_free_lunch import cells, claims, tables

PAPER = Paper.of(
    (cells, claims, tables),
    title='Can Mamba always enjoy the "free lunch"? Limitations in copying and chains of thought '
    "(arXiv 2410.03810)",
    short="Mamba's free lunch",
    summary="A state of fixed size copies a string only if it has room for it, and learns to with "
    "more examples than attention; problems whose steps are local need no more than it has.",
    family="state space models",
    source="from a secondary source",
)
