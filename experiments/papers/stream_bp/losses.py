"""The methods of a gradient that StreamBP's paper compares, for its three losses."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tilescan.models import LanguageModel, LanguageModelConfig
from tilescan.training.steps import make_loss
from tilescan.training.stream_bp import stream_dpo_loss, stream_grpo_loss, stream_loss
from tilescan.training.whole_losses import dpo_loss, grpo_loss

SFT, GRPO, DPO = LOSSES = ("sft", "grpo", "dpo")
# All activations; the inputs of layers; these and no whole logits (mini-sequences, MsT); chunks.
NONE, CHECKPOINT, MST, STREAM = METHODS = ("none", "checkpoint", "mst", "stream")
# Defaults of TRL, whose trainers the paper starts from, but the weight of the KL term.
OPTIONS = {
    SFT: {},
    GRPO: {"kl_weight": 0.04, "clip_low": 0.2, "clip_high": 0.2, "temperature": 1.0},
    DPO: {"beta": 0.1},
}
_WHOLE = {SFT: lambda m: make_loss(m, "language_model"), GRPO: grpo_loss, DPO: dpo_loss}
_STREAMED = {SFT: stream_loss, GRPO: stream_grpo_loss, DPO: stream_dpo_loss}


def make(
    loss: str, method: str, model: Mapping[str, Any], *, chunks: int = 1, logit_chunk: int
) -> Callable:
    """Returns loss(params, batch) -> (sum, Sums).

    Args:
      loss: one of LOSSES.
      method: one of METHODS.
      model: fields of LanguageModelConfig.
      chunks: of STREAM, into how many the sequence is divided.
      logit_chunk: of MST and STREAM, positions whose logits exist at once.

    Raises:
      ValueError: an unknown loss or method.
    """
    if loss not in LOSSES or method not in METHODS:
        raise ValueError(
            f"loss={loss!r}, method={method!r}; known: {', '.join(LOSSES)}; {', '.join(METHODS)}"
        )
    remat = {"remat": "full"} if method in (CHECKPOINT, MST) else {}
    made = LanguageModel(LanguageModelConfig(**{**model, **remat}))
    if method in (NONE, CHECKPOINT):
        return _WHOLE[loss](made, **OPTIONS[loss])
    chunks = chunks if method == STREAM else None
    return _STREAMED[loss](made, chunks=chunks, logit_chunk=logit_chunk, **OPTIONS[loss])


def sizes(settings: Mapping[str, Any]) -> dict[str, int]:
    """Returns the sizes that `make` takes, of a cell's settings."""
    return {"chunks": settings["chunks"], "logit_chunk": settings["logit_chunk"]}


def abstract_batch(loss: str, length: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes of the smallest batch: a sequence, an answer, or a pair of answers."""
    rows = 2 if loss == DPO else 1
    floats = {
        SFT: (),
        GRPO: ("old_log_probs", "reference_log_probs"),
        DPO: ("reference_log_probs",),
    }
    dtypes = dict.fromkeys(("tokens", "targets"), jnp.int32)
    dtypes |= dict.fromkeys(("weights", *floats[loss]), jnp.float32)
    batch = {name: jax.ShapeDtypeStruct((rows, length), dtype) for name, dtype in dtypes.items()}
    advantages = {"advantages": jax.ShapeDtypeStruct((rows,), jnp.float32)}
    return batch | advantages if loss == GRPO else batch


def random_batch(length: int, vocab_size: int, seed: int) -> dict[str, jax.Array]:
    """Returns a sequence of random tokens, all of which count."""
    tokens = np.random.default_rng(seed).integers(vocab_size, size=(1, length + 1), dtype=np.int32)
    batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:]}
    return jax.device_put(batch | {"weights": np.ones((1, length), np.float32)})
