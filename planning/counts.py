"""FLOPs of a training step, by formulas: a compiler's count has loops once and no kernels.

Dimensions: B batch, T time, S key time, H heads, D head dim.
"""

import dataclasses
import math
from typing import Any

import jax
from flax import linen as nn
from jaxtyping import PyTree

from tilescan.models import LanguageModelConfig
from tilescan.models.blocks import make_mixer
from tilescan.models.mixers import attends, is_recurrent
from tilescan.ops import masks

# Of a recurrence, for each entry of its state and each token, at the least: the decay, the input's
# product, their sum, and the output's product and sum. Chunked forms do more.
RECURRENCE = 5
# Backward over forward. Attention's computes the scores again (FlashAttention-2, section 4.1).
BACKWARD, ATTENTION_BACKWARD = 2.0, 2.5


@dataclasses.dataclass(frozen=True)
class Flops:
    """FLOPs of the forward pass over a batch, all devices together.

    Attributes:
      matmuls: 2 x weights x tokens, of all linear maps and convolutions inside blocks.
      head: the same of the map to the vocabulary.
      attention: 4 x pairs of query and visible key x H x D.
      recurrences: RECURRENCE x entries of the states x tokens.
      remat: the model's.
    """

    matmuls: float
    head: float
    attention: float
    recurrences: float
    remat: str

    @property
    def model(self) -> float:
        """Forward and backward, nothing twice but attention's scores."""
        others = self.matmuls + self.head + self.recurrences
        return (1 + BACKWARD) * others + (1 + ATTENTION_BACKWARD) * self.attention

    @property
    def step(self) -> float:
        """The model's, and what the backward pass computes again."""
        again = 0.0
        if self.remat != "none":
            again = self.attention + self.recurrences  # no plain matmul: no policy keeps them
        if self.remat in ("full", "offload"):
            again += self.matmuls
        return self.model + again


def flops(config: LanguageModelConfig, params: PyTree, B: int, T: int) -> Flops:
    """Counts the FLOPs of B rows of T tokens, each one sequence.

    Documents packed in a row attend less.

    Args:
      config: of the model.
      params: the model's parameters, or their shapes.
      B, T: rows and tokens of each.
    """
    # Weights of linear maps, inside blocks and to the vocabulary.
    weights = {"blocks": 0, "head": 0}
    for path, leaf in jax.tree_util.tree_leaves_with_path(nn.unbox(params)):
        names = [str(getattr(key, "key", key)) for key in path]
        if names[-1] == "kernel":
            weights["blocks" if "layers" in " ".join(names) else "head"] += math.prod(leaf.shape)
        if names[-1] == "embedding" and "embed" in names and config.tie_embeddings:
            weights["head"] += math.prod(leaf.shape)

    # Products of queries and keys over H and D, and entries of states, of one repeat.
    products, entries = 0, 0
    for block in config.pattern:
        if attends(block):
            mixer = make_mixer(config, block)
            products += visible_pairs(mixer.sees, T) * mixer.n_heads * mixer.head_dim
        elif is_recurrent(block):
            entries += state_entries(config, block)
    return Flops(
        matmuls=2.0 * weights["blocks"] * B * T,
        head=2.0 * weights["head"] * B * T,
        attention=4.0 * B * config.repeats * products,
        recurrences=float(RECURRENCE) * config.repeats * entries * B * T,
        remat=config.remat,
    )


def visible_pairs(mask: masks.Mask, T: int) -> int:
    """Counts pairs of query and key that a mask lets T tokens see; T^2 of a mask not known here."""
    match mask:
        case masks.Causal():
            return T * (T + 1) // 2
        case masks.SlidingWindow():
            return _band(T, mask.left) + _band(T, mask.right) - T
        case masks.Lambda():
            near = _band(T, mask.window - 1)
            # The sinks before the window: of query i, min(sinks, i + 1 - window).
            before = max(0, T - mask.window)
            sinks = min(mask.sinks, before)
            return near + sinks * (sinks + 1) // 2 + (before - sinks) * sinks
    return T * T


def _band(T: int, width: int | None) -> int:
    """Counts pairs at a distance of at most `width`, on one side, own token included."""
    width = T - 1 if width is None else min(width, T - 1)
    return T * (width + 1) - width * (width + 1) // 2


def state_entries(config: LanguageModelConfig, kind: str) -> int:
    """Counts entries of what a recurrent block carries over time, but its convolution's window."""
    mixer = make_mixer(config, kind)
    try:
        state = jax.eval_shape(lambda: mixer.init_state(1, 1))
    except ValueError:  # a layer that reads from both ends has no state: count each direction's
        state = jax.eval_shape(lambda: mixer.clone(bidirectional=False).init_state(1, 1))
        return 2 * _entries(state)
    return _entries(state)


def _entries(state: Any) -> int:
    """Counts the entries of a mixer's recurrent state."""
    return sum(
        math.prod(leaf.shape)
        for name in ("ssm", "memory")
        for leaf in jax.tree.leaves(getattr(state, name, ()))
    )
