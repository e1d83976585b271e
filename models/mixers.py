"""The names that a pattern of blocks can hold.

A mixer is a Linen module with

    __call__(x [B, T, E], *, state=None, positions=None, segment_ids=None) -> (y [B, T, E], state)
    init_state(batch, max_len) -> a pytree, or None if it carries nothing over time

The attributes of a recurrent mixer are its options, each with a default, which
`LanguageModelConfig.mixers` changes; a new one is a line in MIXERS.
"""

from flax import linen as nn

from tilescan.models.gated_delta_net import GatedDeltaNet
from tilescan.models.gated_linear_attention import GatedLinearAttention
from tilescan.models.h3 import H3
from tilescan.models.mamba import Mamba
from tilescan.models.mamba2 import Mamba2
from tilescan.models.s4 import S4, S4D

# Blocks with a recurrent mixer.
MIXERS: dict[str, type[nn.Module]] = {
    "gated_deltanet": GatedDeltaNet,
    "gla": GatedLinearAttention,
    "h3": H3,
    "mamba": Mamba,
    "mamba2": Mamba2,
    "s4": S4,
    "s4d": S4D,
}

# All other blocks, which `models.blocks.BLOCKS` makes of the model's own fields.
OTHER_BLOCKS = ("attention", "local_attention", "mlp")
