"""Ring Self-Attention (RSA).

Li et al.: Sequence Parallelism: Long Sequence Training from System Perspective. ACL 2023, arXiv
2105.13120.
"""

from tilescan.experiments.harness.cells import Paper
from tilescan.experiments.papers.ring_self_attention import cells, claims, tables

PAPER = Paper.of(
    (cells, claims, tables),
    title="Sequence parallelism: long sequence training from system perspective (arXiv 2105.13120)",
    summary="Devices shard the sequence instead of the weights, and keys and values go round a "
    "ring. Batches and sequences then grow with the devices, where tensor parallelism keeps whole "
    "activations on each.",
    short="Ring Self-Attention",
    family="sequence parallelism",
    source="from a secondary source",
)
