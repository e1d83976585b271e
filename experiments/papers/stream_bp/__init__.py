"""StreamBP: exact backpropagation along the sequence in chunks.

Luo, Huang, Zhang, Li, Wang: StreamBP: Memory-Efficient Exact Backpropagation for Long Sequence
Training of LLMs. NeurIPS 2025, arXiv 2506.03077.
"""

from tilescan.experiments.harness.cells import Paper
from tilescan.experiments.papers.stream_bp import cells, claims, tables

PAPER = Paper.of(
    (cells, claims, tables),
    title="StreamBP: memory-efficient exact backpropagation for long sequence training of LLMs "
    "(arXiv 2506.03077)",
    summary="A layer is differentiated by chunks of its output, and the head by chunks of its "
    "logits, so that little but the inputs of layers grows with the sequence. The gradients are "
    "exact, and take no longer than with checkpointing.",
    family="sequence parallelism",
)
