"""Flax Linen models: layers, token mixers, language models, published checkpoints."""

from models.attention import Attention, KVCache
from models.config import LanguageModelConfig
from models.gated_delta_net import GatedDeltaNet, GatedDeltaNetState
from models.gated_linear_attention import GatedLinearAttention, GLAState
from models.h3 import H3, H3State
from models.language_model import (
    LanguageModel,
    ModelState,
    SequenceClassifier,
    count_params,
    unroll_params,
)
from models.layers import LOGICAL_AXES
from models.mamba import Mamba, MambaState
from models.mamba2 import Mamba2, Mamba2State
from models.positions import RopeScaling
from models.s4 import S4, S4D, S4State

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
    "count_params",
    "unroll_params",
]
