"""GRPO and DPO on whole logits [B, T, V]: the formulas of `preference_losses`, as they are written.

    loss = grpo_loss(model, kl_weight=0.04)         # in place of stream_bp.stream_grpo_loss
    step = steps.make_train_step(loss, tx, rate)

For short sequences, and to compare with: everything that a backward pass needs is kept, but for
what the model's remat leaves out. Each returns `loss(params, batch, key) -> (summed loss, Sums)`,
as `training.steps` takes it, whose weight is the number of rows or of pairs, with an answer or not.
Nothing is counted: "nll", "correct", "exact" and "rows" are 0.

Dimensions: B batch, T time, V vocabulary.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tilescan.models import LanguageModel
from tilescan.training.steps import Sums, model_inputs


def grpo_loss(
    model: LanguageModel,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    kl_weight: float = 0.0,
    temperature: float = 1.0,
) -> Callable:
    """Returns the loss of `preference_losses.grpo`, the mean over each answer, then over answers.

    Batches hold tokens, targets and weights (the mask) [B, T], "advantages" [B], "old_log_probs"
    and "reference_log_probs" [B, T], finite everywhere. Options as there.
    """

    def loss(params, batch, key=None):
        log_p = _log_probabilities(model, params, batch, temperature)
        mask, A = batch["weights"], batch["advantages"][:, None]
        ratio = jnp.exp(log_p - batch["old_log_probs"])
        clipped = jnp.clip(ratio, 1 - clip_low, 1 + clip_high)
        delta = batch["reference_log_probs"] - log_p
        each = -jnp.minimum(ratio * A, clipped * A)
        each = each + kl_weight * (jnp.exp(delta) - delta - 1)
        lengths = jnp.maximum(jnp.sum(mask, 1), 1)
        return _sums(jnp.sum(jnp.sum(mask * each, 1) / lengths), mask.shape[0])

    return loss


def dpo_loss(model: LanguageModel, *, beta: float = 0.1) -> Callable:
    """Returns the loss of `preference_losses.dpo`: the first half of the rows was chosen.

    Batches hold tokens, targets, weights (the mask) and "reference_log_probs" [B, T], finite
    everywhere.
    """

    def loss(params, batch, key=None):
        log_p = _log_probabilities(model, params, batch)
        ratios = jnp.sum(batch["weights"] * (log_p - batch["reference_log_probs"]), 1)
        chosen, rejected = jnp.split(ratios, 2)
        return _sums(jnp.sum(jax.nn.softplus(-beta * (chosen - rejected))), len(chosen))

    return loss


def _log_probabilities(
    model: LanguageModel, params: Any, batch: Mapping[str, Any], temperature: float = 1.0
) -> Float[Array, "B T"]:
    """Returns log p(target) of every token; logits are divided by the temperature."""
    logits = model.apply({"params": params}, **model_inputs(batch))[0] / temperature
    log_p = jax.nn.log_softmax(logits)
    return jnp.take_along_axis(log_p, batch["targets"][..., None], axis=-1)[..., 0]


def _sums(loss: Float[Array, ""], weight: int) -> tuple[Float[Array, ""], Sums]:
    zero = jnp.zeros_like(loss)
    names = dict.fromkeys(("nll", "correct", "exact", "rows"), zero)
    return loss, {"loss": loss, "weight": jnp.float32(weight), **names}
