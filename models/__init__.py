"""Flax Linen models: layers, token mixers, language models, published checkpoints."""

from models.attention import Attention, KVCache
from models.config import LanguageModelConfig
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

__all__ = [
    "LOGICAL_AXES",
    "Attention",
    "KVCache",
    "LanguageModel",
    "LanguageModelConfig",
    "Mamba",
    "Mamba2",
    "Mamba2State",
    "MambaState",
    "ModelState",
    "RopeScaling",
    "SequenceClassifier",
    "count_params",
    "unroll_params",
]
