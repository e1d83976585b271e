"""Flax Linen models: layers, token mixers, language models, published checkpoints."""

from tilescan.models.attention import Attention, KVCache
from tilescan.models.config import LanguageModelConfig
from tilescan.models.gated_delta_net import GatedDeltaNet, GatedDeltaNetState
from tilescan.models.gated_linear_attention import GatedLinearAttention, GLAState
from tilescan.models.h3 import H3, H3State
from tilescan.models.language_model import (
    LanguageModel,
    ModelState,
    SequenceClassifier,
    abstract_params,
    count_params,
    init_params,
    unroll_params,
)
from tilescan.models.layers import LOGICAL_AXES
from tilescan.models.mamba import Mamba, MambaState
from tilescan.models.mamba2 import Mamba2, Mamba2State
from tilescan.models.positions import RopeScaling
from tilescan.models.s4 import S4, S4D, S4State

__all__ = [
    "H3",
    "LOGICAL_AXES",
    "S4",
    "S4D",
    "Attention",
    "GLAState",
    "GatedDeltaNet",
    "GatedDeltaNetState",
    "GatedLinearAttention",
    "H3State",
    "KVCache",
    "LanguageModel",
    "LanguageModelConfig",
    "Mamba",
    "Mamba2",
    "Mamba2State",
    "MambaState",
    "ModelState",
    "RopeScaling",
    "S4State",
    "SequenceClassifier",
    "abstract_params",
    "count_params",
    "init_params",
    "unroll_params",
]
