"""StreamBP's gradients and training losses beside those of the plain model."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tilescan.experiments.papers.stream_bp.losses import (
    CHECKPOINT,
    DPO,
    GRPO,
    SFT,
    STREAM,
    make,
    parameters,
    random_batch,
)
from tilescan.training import steps
from tilescan.training.optimizers import make_optimizer
from tilescan.training.settings import OptimizerConfig

BASE32, STREAM32, BASE16, STREAM16 = "base32", "stream32", "base16", "stream16"
# The task that preferences are about: answers with many of the vocabulary's first tokens.
GROUP = 4  # answers to a prompt in GRPO
WARM_UP = 10  # steps


def precision(settings: Mapping[str, Any], seed: int) -> dict:
    """Errors of gradients against the plain float32 model.

    Settings: "model", whose head is not tied; "length", "chunks", "logit_chunk".

    Returns:
      {variant: {"head" and "layers": {"absolute": mean |error|, "relative": ||error|| / ||g||}}}
      for STREAM32, BASE16 and STREAM16: the 16s compute in bfloat16, with parameters in float32.
    """
    model = dict(settings["model"])
    params = parameters(model, seed)
    batch = random_batch(settings["length"], model["vocab_size"], seed)

    def gradients(method, dtype):
        loss = make(
            SFT,
            method,
            model | {"dtype": dtype},
            chunks=settings["chunks"],
            logit_chunk=settings["logit_chunk"],
        )
        mean = lambda p, b: loss(p, b)[0] / settings["length"]
        grads = jax.device_get(jax.jit(jax.grad(mean))(params, batch))
        layers = np.concatenate([np.ravel(g) for g in jax.tree.leaves(grads["backbone"]["layers"])])
        parts = {"head": np.ravel(grads["head"]["kernel"]), "layers": layers}
        return {name: part.astype(np.float64) for name, part in parts.items()}

    base = gradients(CHECKPOINT, "float32")

    def errors(found):
        return {
            part: {
                "absolute": float(np.mean(np.abs(found[part] - exact))),
                "relative": float(np.linalg.norm(found[part] - exact) / np.linalg.norm(exact)),
            }
            for part, exact in base.items()
        }

    return {
        STREAM32: errors(gradients(STREAM, "float32")),
        BASE16: errors(gradients(CHECKPOINT, "bfloat16")),
        STREAM16: errors(gradients(STREAM, "bfloat16")),
    }


def parity(settings: Mapping[str, Any], seed: int) -> dict:
    """Trains twice on the same batches, by the plain loss and by the streamed one.

    Texts are walks of a Markov chain. SFT learns the chain. GRPO and DPO start from a model that
    did, and prefer answers with many of the vocabulary's first half of tokens: of GROUP walks from
    one start each has its advantage, of two walks the better one is chosen. The policy that wrote
    them, and the reference, is the chain itself, whose log probabilities are known.

    Settings: "loss", "model", "length", "batch_size", "steps", "learning_rate", "sft_steps" and
    "sft_learning_rate" (of the model that GRPO and DPO start from), "chunks", "logit_chunk".

    Returns:
      {"plain", "streamed": [loss of each step], "largest_difference", "mean_difference"}.
    """
    model = dict(settings["model"])
    chain = Chain(model["vocab_size"], seed)
    params = parameters(model, seed)
    options = dict(chunks=settings["chunks"], logit_chunk=settings["logit_chunk"])

    def train(loss, method, params, count, rate):
        made = make(loss, method, model, **options)
        rng = np.random.default_rng([seed, len(loss)])
        batches = [
            chain.batch(loss, settings["batch_size"], settings["length"], rng) for _ in range(count)
        ]
        return _train(made, params, batches, rate)

    if settings["loss"] != SFT:
        params, _ = train(
            SFT, CHECKPOINT, params, settings["sft_steps"], settings["sft_learning_rate"]
        )
    how = settings["steps"], settings["learning_rate"]
    _, plain = train(settings["loss"], CHECKPOINT, params, *how)
    _, streamed = train(settings["loss"], STREAM, params, *how)
    differences = np.abs(np.subtract(plain, streamed))
    return {
        "plain": plain,
        "streamed": streamed,
        "largest_difference": float(differences.max()),
        "mean_difference": float(differences.mean()),
    }


def _train(loss, params, batches, rate) -> tuple[Any, list[float]]:
    """(parameters, the loss of each step)"""
    config = OptimizerConfig(learning_rate=rate, schedule="constant", warmup_steps=WARM_UP)
    tx, schedule = make_optimizer(config, len(batches))
    step = jax.jit(steps.make_train_step(loss, tx, schedule))
    key = jax.random.key_data(jax.random.key(0))
    state = steps.TrainState(jnp.zeros([], jnp.int32), params, tx.init(params), key)
    losses = []
    for batch in batches:
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    return state.params, losses


class Chain:
    """A Markov chain over V tokens, each of which mostly goes on to a few others."""

    def __init__(self, vocab_size: int, seed: int):
        rng = np.random.default_rng([seed, vocab_size])
        self.next = rng.dirichlet(np.full(vocab_size, 0.2), size=vocab_size)
        self.next = 0.98 * self.next + 0.02 / vocab_size  # nothing is impossible

    def walks(self, first: np.ndarray, length: int, rng) -> np.ndarray:
        """int32 [rows, 1 + length], beginning with `first`."""
        walk = [first]
        cumulative = np.cumsum(self.next, axis=1)
        for _ in range(length):
            drawn = rng.random((len(first), 1))
            chosen = np.sum(cumulative[walk[-1]] < drawn, axis=1)
            walk.append(np.minimum(chosen, len(self.next) - 1))
        return np.stack(walk, axis=1).astype(np.int32)

    def batch(self, loss: str, rows: int, length: int, rng) -> dict[str, np.ndarray]:
        """A batch of `rows` walks; the first quarter of each is the prompt, where answers are."""
        together = {SFT: 1, GRPO: GROUP, DPO: 2}[loss]
        prompt = 0 if loss == SFT else length // 4
        first = rng.integers(len(self.next), size=rows // together)
        prompts = np.repeat(self.walks(first, prompt, rng), together, axis=0)
        walks = np.concatenate(
            [prompts[:, :-1], self.walks(prompts[:, -1], length - prompt, rng)], axis=1
        )
        answers = np.arange(length)[None] >= prompt
        batch = {
            "tokens": walks[:, :-1],
            "targets": walks[:, 1:],
            "weights": np.broadcast_to(answers, (rows, length)).astype(np.float32),
        }
        if loss == SFT:
            return batch
        log_p = np.log(self.next[walks[:, :-1], walks[:, 1:]]).astype(np.float32)
        reward = np.mean(walks[:, 1 + prompt :] < len(self.next) // 2, axis=1)
        batch["reference_log_probs"] = log_p
        if loss == GRPO:
            group = reward.reshape(-1, GROUP)
            advantages = (group - group.mean(1, keepdims=True)) / (
                group.std(1, keepdims=True) + 1e-4
            )
            return batch | {"old_log_probs": log_p, "advantages": np.float32(advantages.ravel())}
        order = np.argsort(-reward.reshape(-1, 2), axis=1, kind="stable")
        pairs = 2 * np.arange(rows // 2)[:, None] + order
        return {name: value[pairs.T.ravel()] for name, value in batch.items()}
