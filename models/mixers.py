"""The names of blocks that a pattern can hold, and the options of each.

The contract of a mixer, a Linen module that is a line of MIXERS:

    __call__(x, *, state=None, positions=None, segment_ids=None) -> (y, state)
      x, y: floating [B, T, E], T tokens and what the mixer makes of them.
      state: from `init_state` or from an earlier call, whose tokens then come before these. None:
        there are none before, and None is returned. A call split in two equals one call.
      positions: int [B, T], for mixers that look at positions; None: counted from the state on.
      segment_ids: int [B, T], any values; a token sees only tokens of its own id, also those in the
        state, so with a state give ids at every call or at none. None: all are one segment.
      Raises ValueError for x of another rank, and for positions and segment_ids of another shape.
    init_state(batch, max_len) -> the state before the first token, a pytree of arrays [B, ...] with
      room for max_len tokens; None of a block that carries nothing over time.

B is the batch, T time, E the embedding (d_model). The attributes of a mixer's class are its
options, with their defaults and types (`models.mixer_options`). A block of a pattern is

    "local_attention"        with the options mixers["local_attention"]
    "local_attention:wide"   a variant: the same options, changed by mixers["local_attention:wide"]
    "local_attention:512"    a variant with window = 512

so one pattern can hold several variants of a mixer. Variants share the name of their parameters.
"""

from typing import Any

from flax import linen as nn

from tilescan.models.attention import Attention, LocalAttention
from tilescan.models.gated_delta_net import GatedDeltaNet
from tilescan.models.gated_linear_attention import GatedLinearAttention
from tilescan.models.h3 import H3
from tilescan.models.layers import MLP
from tilescan.models.mamba import Mamba
from tilescan.models.mamba2 import Mamba2
from tilescan.models.s4 import S4, S4D

MIXERS: dict[str, type[nn.Module]] = {
    "attention": Attention,
    "local_attention": LocalAttention,
    "mlp": MLP,
    "gated_deltanet": GatedDeltaNet,
    "gla": GatedLinearAttention,
    "h3": H3,
    "mamba": Mamba,
    "mamba2": Mamba2,
    "s4": S4,
    "s4d": S4D,
}

_OF_ATTENTION = {
    "n_heads": "n_heads",
    "n_kv_heads": "n_kv_heads",
    "head_dim": "head_dim",
    "causal": "causal",
    "position": "position",
    "rope_theta": "rope_theta",
    "rope_scaling": "rope_scaling",
    "qk_norm": "qk_norm",
    "scale": "attention_scale",
    "logit_cap": "attention_logit_cap",
    "use_bias": "attention_bias",
    "implementation": "attention_implementation",
}
# Options that are the model's unless the mixer has its own: {mixer: {option: field of the model}}.
MODEL_FIELDS: dict[str, dict[str, str]] = {
    "attention": _OF_ATTENTION,
    "local_attention": _OF_ATTENTION,
    "mlp": {"kind": "mlp", "dim": "mlp_dim", "use_bias": "mlp_bias"},
}


def base_name(block: str) -> str:
    """Returns the mixer's name of a block: "local_attention" of "local_attention:512"."""
    return block.partition(":")[0]


def named_options(block: str) -> dict[str, Any]:
    """Returns the options that the name of a block alone sets: the window of a local attention."""
    base, _, variant = block.partition(":")
    return {"window": int(variant)} if base == "local_attention" and variant.isdecimal() else {}


def attends(block: str) -> bool:
    """Returns whether a block of a pattern is attention, over all tokens or a window."""
    return issubclass(MIXERS[base_name(block)], Attention)


def is_recurrent(block: str) -> bool:
    """Returns whether a block carries a state of fixed size from token to token."""
    return not issubclass(MIXERS[base_name(block)], Attention | MLP)
