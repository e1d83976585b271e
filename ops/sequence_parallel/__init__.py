"""One sequence over many devices: attention and recurrences inside `jax.shard_map`.

Letters are those of `ops`, and p of P devices along a mesh axis; T and S are a device's own.
"""

from ops.sequence_parallel.kinds import ATTENTION_KINDS, BALANCES, SCAN_KINDS, Kinds, kinds

__all__ = ["ATTENTION_KINDS", "BALANCES", "SCAN_KINDS", "Kinds", "kinds"]
