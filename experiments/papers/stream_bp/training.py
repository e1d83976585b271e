"""StreamBP's gradients and training losses beside those of the plain model."""

import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from tilescan.data.batches import BatchDataset
from tilescan.experiments.harness.shared_models import Trained
from tilescan.experiments.harness.workspace import Workspace
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
from tilescan.training.train import train

BASE32, STREAM32, BASE16, STREAM16 = "base32", "stream32", "base16", "stream16"
# The task that preferences are about: answers with many of the vocabulary's first tokens.
GROUP = 4  # answers to a prompt in GRPO
WARM_UP = 10  # steps


def precision(settings: Mapping[str, Any], seed: int) -> dict:
    """Measures errors of gradients against the plain float32 model.

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


def parity(settings: Mapping[str, Any], seed: int, workspace: Workspace) -> dict:
    """Trains twice on the same batches, by the plain loss and by the streamed one.

    Sequences are walks of a Markov chain. SFT learns the chain. GRPO and DPO start from a model
    that did, and prefer answers with many of the vocabulary's first half of tokens: of GROUP walks
    from one start each has its advantage, of two walks the better one is chosen. The policy that
    wrote them, and the reference, is the chain itself, whose log probabilities are known.

    Settings: "loss", "model", "length", "batch_size", "steps", "learning_rate", "sft_steps" and
    "sft_learning_rate" (of the model that GRPO and DPO start from), "chunks", "logit_chunk".

    Returns:
      {"plain", "streamed": [loss of each step], "largest_difference", "mean_difference"}.
    """
    loss, model = settings["loss"], dict(settings["model"])
    if loss == SFT:
        params = parameters(model, seed)
    else:
        params = sft_model(settings, seed, workspace).params
    batches = _batches(loss, settings, settings["steps"], seed)
    options = dict(chunks=settings["chunks"], logit_chunk=settings["logit_chunk"])
    plain, streamed = (
        _losses(make(loss, method, model, **options), params, batches, settings["learning_rate"])
        for method in (CHECKPOINT, STREAM)
    )
    differences = np.abs(np.subtract(plain, streamed))
    return {
        "plain": plain,
        "streamed": streamed,
        "largest_difference": float(differences.max()),
        "mean_difference": float(differences.mean()),
    }


def sft_model(settings: Mapping[str, Any], seed: int, workspace: Workspace) -> Trained:
    """Returns the model that learned the chain: one for GRPO and DPO."""
    model = dict(settings["model"])
    keys = {
        **{f"model.{name}": value for name, value in model.items() if name != "dtype"},
        "model.remat": "full",
        "precision.compute_dtype": model["dtype"],
        "data.seq_len": settings["length"],
        "data.batch_size": settings["batch_size"],
        "train.steps": settings["sft_steps"],
        "optimizer.learning_rate": settings["sft_learning_rate"],
        "optimizer.schedule": "constant",
        "optimizer.warmup_steps": WARM_UP,
    }

    def make(config: ConfigDict, folder: pathlib.Path) -> None:
        batches = _batches(SFT, settings, config.train.steps, seed)
        known = {"data": "chain", "seed": seed}
        dataset = BatchDataset(batches.__getitem__, None, known, model["vocab_size"])
        train(config, folder, datasets={"train": dataset}, params=parameters(model, seed))

    return workspace.trained({"data": "chain", "train": keys}, seed, make)


def _batches(
    loss: str, settings: Mapping[str, Any], count: int, seed: int
) -> list[dict[str, np.ndarray]]:
    chain = Chain(settings["model"]["vocab_size"], seed)
    rng = np.random.default_rng([seed, len(loss)])
    return [
        chain.batch(loss, settings["batch_size"], settings["length"], rng) for _ in range(count)
    ]


def _losses(loss, params, batches, rate: float) -> list[float]:
    """The loss of each step of a training from these parameters."""
    config = OptimizerConfig(learning_rate=rate, schedule="constant", warmup_steps=WARM_UP)
    tx, schedule = make_optimizer(config, len(batches))
    step = jax.jit(steps.make_train_step(loss, tx, schedule))
    key = jax.random.key_data(jax.random.key(0))
    state = steps.TrainState(jnp.zeros([], jnp.int32), params, tx.init(params), key)
    losses = []
    for batch in batches:
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    return losses


class Chain:
    """A Markov chain over V tokens, each of which mostly goes on to a few others."""

    def __init__(self, vocab_size: int, seed: int):
        rng = np.random.default_rng([seed, vocab_size])
        self.next = rng.dirichlet(np.full(vocab_size, 0.2), size=vocab_size)
        self.next = 0.98 * self.next + 0.02 / vocab_size  # nothing is impossible

    def walks(self, first: np.ndarray, length: int, rng) -> np.ndarray:
        """Returns walks, int32 [rows, 1 + length], that begin with `first`."""
        walk = [first]
        cumulative = np.cumsum(self.next, axis=1)
        for _ in range(length):
            drawn = rng.random((len(first), 1))
            chosen = np.sum(cumulative[walk[-1]] < drawn, axis=1)
            walk.append(np.minimum(chosen, len(self.next) - 1))
        return np.stack(walk, axis=1).astype(np.int32)

    def batch(self, loss: str, rows: int, length: int, rng) -> dict[str, np.ndarray]:
        """Returns a batch of `rows` walks; of answers, a first quarter of each is the prompt."""
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
