"""Losses of a language model in the memory of a chunk of the sequence: StreamBP (arXiv 2506.03077).

    loss = stream_loss(model, chunks=4)       # in place of steps.make_loss(model, "language_model")
    step = steps.make_train_step(loss, tx, rate)

Each returns `loss(params, batch, key) -> (summed loss, Sums)`, as `training.steps` takes it. With
`chunks=None` the layers are the model's own, with its remat, and only the logits go by chunks.

Batches hold tokens, targets and weights [B, T], positions and segment_ids or not, and what a loss
asks for besides. Where devices share a sequence, layers that are streamed read it in an order of
their own (`models.stream_bp.stream_order`): the losses, which are sums over tokens, put a batch
into it, which moves integers, not vectors.
"""

from collections.abc import Callable
from typing import Any

from jaxtyping import Array, Float, PyTree

from tilescan.models import LanguageModel
from tilescan.models.stream_bp import in_stream_order, stream_hidden
from tilescan.ops.cross_entropy import chunked_log_probabilities
from tilescan.ops.partitioned import partitioned_cross_entropy
from tilescan.training.preference_losses import dpo, grpo
from tilescan.training.steps import model_inputs

LOGIT_CHUNK = 128


def stream_loss(
    model: LanguageModel,
    *,
    chunks: int | None,
    logit_chunk: int = LOGIT_CHUNK,
    z_loss: float = 0.0,
) -> Callable:
    """Returns the loss of the next token's cross-entropy.

    Args:
      model: any LanguageModel.
      chunks: of the sequence in the layers' backward pass; see `models.stream_bp`.
      logit_chunk: positions whose logits exist at once.
      z_loss: as in `training.steps.make_loss`.
    """

    def loss(params, batch, key=None):
        del key  # these models have no dropout
        batch = _in_order(model, batch, chunks)
        head = head_of(model, params)
        sums = partitioned_cross_entropy(
            hidden_of(model, params, batch, chunks),
            head.pop("head"),
            batch["targets"],
            batch["weights"],
            chunk=logit_chunk,
            z_loss=z_loss,
            **head,
        )
        return sums["loss"], sums

    return loss


def stream_grpo_loss(
    model: LanguageModel, *, chunks: int | None, logit_chunk: int = LOGIT_CHUNK, **options: Any
) -> Callable:
    """Returns `preference_losses.grpo`'s loss, with its options; batches hold its arguments.

    They have its names, but the mask is "weights": "advantages" [B], "old_log_probs" and
    "reference_log_probs" [B, T].
    """

    def loss(params, batch, key=None):
        del key
        batch = _in_order(model, batch, chunks)
        sums = grpo(
            hidden_of(model, params, batch, chunks),
            targets=batch["targets"],
            mask=batch["weights"],
            advantages=batch["advantages"],
            old_log_probs=batch["old_log_probs"],
            reference_log_probs=batch.get("reference_log_probs"),
            chunk=logit_chunk,
            **head_of(model, params),
            **options,
        )
        return sums["loss"], sums

    return loss


def stream_dpo_loss(
    model: LanguageModel, *, chunks: int | None, logit_chunk: int = LOGIT_CHUNK, beta: float = 0.1
) -> Callable:
    """Returns `preference_losses.dpo`'s loss; batches hold "reference_log_probs" [B, T].

    The mask is "weights".

    Microbatches keep pairs together where their number divides that of pairs.
    """

    def loss(params, batch, key=None):
        del key
        batch = _in_order(model, batch, chunks)
        sums = dpo(
            hidden_of(model, params, batch, chunks),
            targets=batch["targets"],
            mask=batch["weights"],
            reference_log_probs=batch["reference_log_probs"],
            chunk=logit_chunk,
            beta=beta,
            **head_of(model, params),
        )
        return sums["loss"], sums

    return loss


def log_probabilities(
    model: LanguageModel,
    params: PyTree,
    batch: dict,
    *,
    logit_chunk: int = LOGIT_CHUNK,
    temperature: float = 1.0,
) -> Float[Array, "B T"]:
    """Returns log p(target) of every token, float32: what references and old policies give."""
    return chunked_log_probabilities(
        hidden_of(model, params, batch, None),
        targets=batch["targets"],
        chunk=logit_chunk,
        temperature=temperature,
        **head_of(model, params),
    )


def _in_order(model: LanguageModel, batch: dict, chunks: int | None) -> dict:
    """Returns a batch in the order in which `hidden_of` reads it."""
    return batch if chunks is None else in_stream_order(model.config, batch, chunks)


def hidden_of(
    model: LanguageModel, params: PyTree, batch: dict, chunks: int | None
) -> Float[Array, "B T E"]:
    """Returns what the head reads, streamed unless chunks is None, of a batch `_in_order`."""
    if chunks is None:
        return model.apply({"params": params}, **model_inputs(batch), method="hidden")[0]
    return stream_hidden(model, params, **model_inputs(batch), chunks=chunks, in_order=True)


def head_of(model: LanguageModel, params: PyTree) -> dict[str, Any]:
    """Returns the head's arguments to the functions of `ops.cross_entropy`."""
    config = model.config
    if config.tie_embeddings:
        head = params["backbone"]["embed"]["embedding"]
    else:
        head = params["head"]["kernel"]
    return {
        "head": head,
        "tied": config.tie_embeddings,
        "logit_scale": config.logit_scale,
        "logit_cap": config.logit_cap,
    }
