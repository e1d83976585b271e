"""One sequence over many devices: attention and recurrences inside `jax.shard_map`.

    with jax.set_mesh(mesh):  # with an axis "sequence"
        o = jax.shard_map(
            functools.partial(ring_attention, mask=masks.Causal(), balance="zigzag"),
            in_specs=P(None, "sequence"), out_specs=P(None, "sequence"),
        )(q, k, v)

Models do this where the mesh in use has such an axis, as their configuration's
`sequence_parallel` and `sequence_balance` say. Dimensions are those of `ops`; T and S are the
tokens of one device, P the devices along the axis.
"""

import functools

from tilescan.ops.sequence_parallel.gather_attention import gather_attention
from tilescan.ops.sequence_parallel.kinds import (
    ATTENTION_KINDS,
    BALANCES,
    SCAN_KINDS,
    TPU_ATTENTION_KINDS,
    Kinds,
    kinds,
)
from tilescan.ops.sequence_parallel.ring_attention import ring_attention
from tilescan.ops.sequence_parallel.ring_self_attention import ring_self_attention
from tilescan.ops.sequence_parallel.ulysses import ulysses_attention, usp_attention

# By the names of ATTENTION_KINDS and TPU_ATTENTION_KINDS.
ATTENTION = {
    "ring": ring_attention,
    "ulysses": ulysses_attention,
    "usp": usp_attention,
    "all_gather": gather_attention,
    "ring_self_attention": ring_self_attention,
    "ring_kernel": functools.partial(ring_attention, transfers="kernel"),
}

__all__ = [
    "ATTENTION",
    "ATTENTION_KINDS",
    "BALANCES",
    "SCAN_KINDS",
    "TPU_ATTENTION_KINDS",
    "Kinds",
    "gather_attention",
    "kinds",
    "ring_attention",
    "ring_self_attention",
    "ulysses_attention",
    "usp_attention",
]
