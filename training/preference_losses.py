"""Losses on answers instead of on whole sequences, with logits in chunks: GRPO and DPO.

GRPO (Shao et al. 2024, arXiv 2402.03300, equation 3) is a sum over tokens: a chunk's gradient is
final once its logits are there. DPO (Rafailov et al. 2023, arXiv 2305.18290, equation 7) is not,
but its gradient is that of log probabilities times one number per pair, -beta sigmoid(-z): they
are computed once for the number and once more for the gradient (StreamBP, arXiv 2506.03077,
section 3.1).

Both return sums as `training.steps.cross_entropy` does: what is minimized is "loss" / "weight".

Dimensions: B batch, T time, E embedding, V vocabulary, P pairs.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Integer

from tilescan.ops.cross_entropy import (
    chunked_log_probabilities,
    count_hits,
    log_probabilities_of,
    sum_over_chunks,
    whole_rows,
)
from tilescan.ops.token_ids import check_ids
from tilescan.training.steps import Sums


def grpo(
    hidden: Float[Array, "B T E"],
    head: Float[Array, "E V"] | Float[Array, "V E"],
    targets: Integer[Array, "B T"],
    mask: Float[Array, "B T"],
    advantages: Float[Array, " B"],
    old_log_probs: Float[Array, "B T"],
    reference_log_probs: Float[Array, "B T"] | None = None,
    *,
    chunk: int,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    kl_weight: float = 0.0,
    temperature: float = 1.0,
    normalizer: str | int = "sequences",
    **head_options: Any,
) -> Sums:
    """Sums GRPO's loss over the answers' tokens.

    Of a token it is -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) + kl_weight KL, where r is
    exp(log p - old log p) and KL = exp(ref - log p) - (ref - log p) - 1.

    Args:
      hidden, head: of the policy; see `ops.cross_entropy.chunked_cross_entropy`.
      targets, mask: tokens and whether they belong to an answer (1) or not (0). What does not is
        never looked at; a target of an answer that is not a token id makes the loss NaN.
      advantages: A of each row: its reward, less the mean over its group, over the std.
      old_log_probs: of the policy that wrote the answers, at the same temperature.
      reference_log_probs: of the reference; may be None where kl_weight is 0.
      chunk: positions per chunk.
      temperature: divides the logits.
      normalizer: what "weight" is: "sequences", the mean over each answer and then over answers;
        "tokens", the mean over all tokens; or a number of tokens that stands for every answer's
        length (Dr. GRPO, arXiv 2503.20783).
      **head_options: tied, logit_scale, logit_cap.

    Returns:
      Sums with "kl" and "clipped" (the share of tokens whose gradient the clip removed) besides.

    Raises:
      ValueError: an unknown normalizer, no reference for the KL term.
      TypeError: targets that are not integers.
    """
    check_ids("targets", targets)
    if kl_weight and reference_log_probs is None:
        raise ValueError(f"kl_weight={kl_weight} needs reference_log_probs")

    # Weights of tokens by the normalizer, and what they sum to.
    mask = (mask > 0).astype(jnp.promote_types(hidden.dtype, jnp.float32))
    lengths = jnp.sum(mask, axis=1, keepdims=True)
    answers = jnp.sum((lengths > 0).astype(mask.dtype))
    if normalizer == "sequences":
        weights, total = mask / jnp.maximum(lengths, 1), answers
    elif normalizer == "tokens":
        weights, total = mask, jnp.sum(mask)
    elif isinstance(normalizer, int) and normalizer > 0:
        weights, total = mask, answers * normalizer
    else:
        raise ValueError(
            f"normalizer={normalizer!r} must be 'sequences', 'tokens' or a positive number of "
            "tokens"
        )

    # What the chunks read, by token.
    per_token = {
        "targets": jnp.where(mask > 0, targets, 0),
        "weights": weights,
        "advantages": jnp.broadcast_to(advantages[:, None], targets.shape),
        "old": old_log_probs,
        "reference": old_log_probs if reference_log_probs is None else reference_log_probs,
    }
    # Only of the answers: elsewhere these may be anything, and 0 times infinity is NaN.
    others = ("advantages", "old", "reference")
    per_token |= {k: jnp.where(mask > 0, per_token[k], 0) for k in others}
    objective = functools.partial(_grpo, low=1 - clip_low, high=1 + clip_high, kl_weight=kl_weight)
    loss, sums = sum_over_chunks(
        objective, hidden, head, per_token, chunk=chunk, temperature=temperature, **head_options
    )
    return {"loss": loss, **whole_rows(sums), "weight": total}


def _grpo(logits, x, low, high, kl_weight):
    """Returns (loss, sums) of a chunk of tokens; see `grpo`."""
    weights, advantages = x["weights"], x["advantages"].astype(logits.dtype)
    log_p, _ = log_probabilities_of(logits, x["targets"])
    counts = weights > 0
    # The estimate of KL(policy || reference) that is never negative (Schulman's k3).
    delta = jnp.where(counts, x["reference"] - log_p, 0)
    kl = jnp.expm1(delta) - delta
    # The clipped surrogate of PPO.
    ratio = jnp.exp(jnp.where(counts, log_p - x["old"], 0))
    free, clipped = ratio * advantages, jnp.clip(ratio, low, high) * advantages
    per_token = -jnp.minimum(free, clipped)
    if kl_weight:
        per_token = per_token + kl_weight * kl
    return jnp.sum(weights * per_token), {
        "nll": jnp.sum(weights * -log_p),
        "kl": jnp.sum(weights * kl),
        "clipped": jnp.sum(weights * (clipped < free)),
        **count_hits(logits, x["targets"], weights),
    }


def dpo(
    hidden: Float[Array, "B T E"],
    head: Float[Array, "E V"] | Float[Array, "V E"],
    targets: Integer[Array, "B T"],
    mask: Float[Array, "B T"],
    reference_log_probs: Float[Array, "B T"],
    *,
    chunk: int,
    beta: float = 0.1,
    **head_options: Any,
) -> Sums:
    """Sums DPO's loss over pairs: -log sigmoid(z), with the logits z = beta (chosen - rejected).

    chosen and rejected are sums of log p - ref over the tokens of an answer.

    Args:
      hidden, head: of the policy; see `ops.cross_entropy.chunked_cross_entropy`.
      targets, mask: tokens and whether they belong to an answer (1) or not (0), as in `grpo`. Rows
        0 .. P - 1 are chosen, row P + p is what was rejected for row p; B = 2 P.
      reference_log_probs: of the same tokens, from the reference.
      chunk: positions per chunk.
      beta: the cost of leaving the reference.
      **head_options: tied, logit_scale, logit_cap.

    Returns:
      Sums over pairs: "correct" (and "exact") counts z > 0, "nll" is of the chosen tokens, and
      "margin" the sum of z. "weight" (and "rows") are the pairs with any answer.

    Raises:
      ValueError: an odd number of rows.
      TypeError: targets that are not integers.
    """
    check_ids("targets", targets)
    if hidden.shape[0] % 2:
        raise ValueError(
            f"{hidden.shape[0]} rows are not pairs: the first half is chosen, the second rejected"
        )
    counts = mask > 0
    log_p = chunked_log_probabilities(
        hidden, head, jnp.where(counts, targets, 0), chunk=chunk, **head_options
    )

    # Log ratios of whole answers, and the margin of each pair.
    answers = jnp.sum(jnp.where(counts, log_p, 0), axis=1)
    ratios = answers - jnp.sum(jnp.where(counts, reference_log_probs, 0), axis=1)
    chosen, rejected = jnp.split(ratios, 2)
    z = beta * (chosen - rejected)
    pairs = jnp.any(counts.reshape(2, -1, counts.shape[1]), axis=(0, 2)).astype(z.dtype)
    right, total = jnp.sum(pairs * (z > 0)), jnp.sum(pairs)
    return {
        "loss": jnp.sum(pairs * jax.nn.softplus(-z)),
        "nll": -jnp.sum(jnp.split(answers, 2)[0]),
        "correct": right,
        "weight": total,
        "exact": right,
        "rows": total,
        "margin": jnp.sum(pairs * z),
    }
