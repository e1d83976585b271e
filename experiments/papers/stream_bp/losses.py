"""The methods of a gradient that StreamBP's paper compares, for its three losses."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from tilescan.models import LanguageModel, LanguageModelConfig
from tilescan.training.steps import make_loss
from tilescan.training.stream_bp import stream_dpo_loss, stream_grpo_loss, stream_loss

SFT, GRPO, DPO = LOSSES = ("sft", "grpo", "dpo")
# All activations; the inputs of layers; these and no whole logits (mini-sequences, MsT); chunks.
NONE, CHECKPOINT, MST, STREAM = METHODS = ("none", "checkpoint", "mst", "stream")
# Defaults of TRL, whose trainers the paper starts from, but the weight of the KL term.
GRPO_OPTIONS = {"kl_weight": 0.04, "clip_low": 0.2, "clip_high": 0.2, "temperature": 1.0}
BETA = 0.1


def make(
    loss: str, method: str, model: Mapping[str, Any], *, chunks: int, logit_chunk: int
) -> Callable:
    """Returns loss(params, batch) -> (sum, Sums).

    Args:
      loss: one of LOSSES.
      method: one of METHODS.
      model: fields of LanguageModelConfig.
      chunks: of STREAM, parts of the sequence.
      logit_chunk: of MST and STREAM, positions whose logits exist at once.

    Raises:
      ValueError: an unknown loss or method.
    """
    if loss not in LOSSES or method not in METHODS:
        raise ValueError(
            f"loss={loss!r}, method={method!r}; known: {', '.join(LOSSES)}; {', '.join(METHODS)}"
        )
    config = LanguageModelConfig(**model)
    if method in (CHECKPOINT, MST):
        config = dataclasses.replace(config, remat="full")
    language_model = LanguageModel(config)
    if method in (NONE, CHECKPOINT):
        return _WHOLE[loss](language_model)
    options = dict(chunks=chunks if method == STREAM else None, logit_chunk=logit_chunk)
    if loss == GRPO:
        return stream_grpo_loss(language_model, **options, **GRPO_OPTIONS)
    if loss == DPO:
        return stream_dpo_loss(language_model, **options, beta=BETA)
    return stream_loss(language_model, **options)


def _whole_log_probs(model, params, batch, temperature=1.0):
    logits = model.apply({"params": params}, batch["tokens"])[0] / temperature
    log_p = jax.nn.log_softmax(logits)
    return jnp.take_along_axis(log_p, batch["targets"][..., None], axis=-1)[..., 0]


def _whole_sft(model):
    return make_loss(model, "language_model")


def _whole_grpo(model):
    """The formula on whole logits; means over each answer, then over answers."""
    o = GRPO_OPTIONS

    def loss(params, batch, key=None):
        log_p = _whole_log_probs(model, params, batch, o["temperature"])
        mask, A = batch["weights"], batch["advantages"][:, None]
        ratio = jnp.exp(log_p - batch["old_log_probs"])
        clipped = jnp.clip(ratio, 1 - o["clip_low"], 1 + o["clip_high"])
        delta = batch["reference_log_probs"] - log_p
        each = -jnp.minimum(ratio * A, clipped * A)
        each = each + o["kl_weight"] * (jnp.exp(delta) - delta - 1)
        lengths = jnp.maximum(jnp.sum(mask, 1), 1)
        total = jnp.sum(jnp.sum(mask * each, 1) / lengths)
        return total, _sums(total, jnp.float32(mask.shape[0]))

    return loss


def _whole_dpo(model):
    def loss(params, batch, key=None):
        log_p = _whole_log_probs(model, params, batch)
        ratios = jnp.sum(batch["weights"] * (log_p - batch["reference_log_probs"]), 1)
        chosen, rejected = jnp.split(ratios, 2)
        total = jnp.sum(jax.nn.softplus(-BETA * (chosen - rejected)))
        return total, _sums(total, jnp.float32(len(chosen)))

    return loss


_WHOLE = {SFT: _whole_sft, GRPO: _whole_grpo, DPO: _whole_dpo}


def _sums(loss, weight):
    """What `steps.make_train_step` reads; nothing was counted."""
    zero = jnp.zeros_like(loss)
    names = dict.fromkeys(("nll", "correct", "exact", "rows"), zero)
    return {"loss": loss, "weight": weight, **names}


def abstract_parameters(model: Mapping[str, Any]) -> Any:
    """Returns the shapes of the parameters."""
    tokens = jnp.zeros((1, 2), jnp.int32)
    init = lambda: LanguageModel(LanguageModelConfig(**model)).init(jax.random.key(0), tokens)
    return nn.unbox(jax.eval_shape(init))["params"]


def parameters(model: Mapping[str, Any], seed: int) -> Any:
    """Returns initialized parameters."""
    tokens = jnp.zeros((1, 2), jnp.int32)
    init = LanguageModel(LanguageModelConfig(**model)).init
    return nn.unbox(jax.jit(init)(jax.random.key(seed), tokens))["params"]


def abstract_batch(loss: str, length: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes of the smallest batch: a sequence, an answer, or a pair of answers."""
    rows = 2 if loss == DPO else 1
    fields = {k: ((rows, length), jnp.int32) for k in ("tokens", "targets")}
    fields["weights"] = ((rows, length), jnp.float32)
    if loss == GRPO:
        fields["advantages"] = ((rows,), jnp.float32)
        fields["old_log_probs"] = ((rows, length), jnp.float32)
    if loss != SFT:
        fields["reference_log_probs"] = ((rows, length), jnp.float32)
    return {k: jax.ShapeDtypeStruct(*v) for k, v in fields.items()}


def random_batch(length: int, vocab_size: int, seed: int) -> dict[str, jax.Array]:
    """Returns a sequence of random tokens, all of which count."""
    tokens = np.random.default_rng(seed).integers(vocab_size, size=(1, length + 1), dtype=np.int32)
    batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:]}
    return jax.device_put(batch | {"weights": np.ones((1, length), np.float32)})
