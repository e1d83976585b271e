"""StreamBP's gradients and training losses beside those of the plain model."""

import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from tilescan.data.batches import Batch, BatchDataset
from tilescan.data.tasks.markov import MarkovChain
from tilescan.experiments.harness.shared_models import Trained
from tilescan.experiments.harness.workspace import Workspace
from tilescan.experiments.papers.stream_bp import losses
from tilescan.experiments.papers.stream_bp.losses import CHECKPOINT, DPO, GRPO, SFT, STREAM
from tilescan.models import LanguageModelConfig, init_params
from tilescan.training import steps
from tilescan.training.optimizers import make_optimizer
from tilescan.training.settings import OptimizerConfig
from tilescan.training.train import train

BASE32, STREAM32, BASE16, STREAM16 = "base32", "stream32", "base16", "stream16"
# How each is computed; BASE32 is what the others are compared with.
_VARIANTS = {
    STREAM32: (STREAM, "float32"),
    BASE16: (CHECKPOINT, "bfloat16"),
    STREAM16: (STREAM, "bfloat16"),
}
TOGETHER = {SFT: 1, GRPO: 4, DPO: 2}  # walks from one start: answers to one prompt
WARM_UP = 10  # steps


def precision(settings: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """Measures errors of gradients against the plain float32 model.

    Settings: "model", whose head is not tied; "length", "chunks", "logit_chunk".

    Returns:
      {variant: {"head" and "layers": {"absolute": mean |error|, "relative": ||error|| / ||g||}}}
      for STREAM32, BASE16 and STREAM16: the 16s compute in bfloat16, with parameters in float32.
    """
    model, length = dict(settings["model"]), settings["length"]
    params = init_params(LanguageModelConfig(**model), seed)
    batch = losses.random_batch(length, model["vocab_size"], seed)

    def gradients(method: str, dtype: str) -> dict[str, np.ndarray]:
        loss = losses.make(SFT, method, model | {"dtype": dtype}, **losses.sizes(settings))
        mean = lambda p, b: loss(p, b)[0] / length
        grads = jax.device_get(jax.jit(jax.grad(mean))(params, batch))
        layers = np.concatenate([np.ravel(g) for g in jax.tree.leaves(grads["backbone"]["layers"])])
        parts = {"head": np.ravel(grads["head"]["kernel"]), "layers": layers}
        return {name: part.astype(np.float64) for name, part in parts.items()}

    def error(found: np.ndarray, exact: np.ndarray) -> dict[str, float]:
        relative = np.linalg.norm(found - exact) / np.linalg.norm(exact)
        return {"absolute": float(np.mean(np.abs(found - exact))), "relative": float(relative)}

    base = gradients(CHECKPOINT, "float32")
    found = {variant: gradients(*how) for variant, how in _VARIANTS.items()}
    return {v: {part: error(g[part], base[part]) for part in base} for v, g in found.items()}


def parity(settings: Mapping[str, Any], seed: int, workspace: Workspace) -> dict[str, Any]:
    """Trains twice on the same batches, by the plain loss and by the streamed one.

    Sequences are walks of a Markov chain. SFT learns the chain. GRPO and DPO start from a model
    that did, and prefer answers with many of the vocabulary's first half of tokens: of four walks
    from one start each has its advantage, of two walks the better one is chosen. The policy that
    wrote them, and the reference, is the chain itself, whose log probabilities are known.

    Settings: "loss", "model", "length", "batch_size", "steps", "learning_rate", "sft_steps" and
    "sft_learning_rate" (of the model that GRPO and DPO start from), "chunks", "logit_chunk".

    Returns:
      {"plain", "streamed": [loss of each step], "largest_difference", "mean_difference"}.
    """
    loss, model = settings["loss"], dict(settings["model"])
    if loss == SFT:
        params = init_params(LanguageModelConfig(**model), seed)
    else:
        params = sft_model(settings, seed, workspace).params
    batches = _batches(loss, settings, settings["steps"], seed)
    sizes = losses.sizes(settings)
    plain, streamed = (
        _losses(losses.make(loss, method, model, **sizes), params, batches, settings)
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
        params = init_params(LanguageModelConfig(**model), seed)
        train(config, folder, datasets={"train": dataset}, params=params)

    return workspace.trained({"data": "chain", "train": keys}, seed, make)


def _batches(loss: str, settings: Mapping[str, Any], count: int, seed: int) -> list[Batch]:
    chain = MarkovChain(settings["model"]["vocab_size"], seed)
    rng = np.random.default_rng([seed, len(loss)])
    sizes = settings["batch_size"], settings["length"]
    return [walks(chain, loss, *sizes, rng) for _ in range(count)]


def _losses(
    loss: Callable, params: Any, batches: Sequence[Batch], settings: Mapping[str, Any]
) -> list[float]:
    """Returns the loss of each step of a training from these parameters."""
    config = OptimizerConfig(
        learning_rate=settings["learning_rate"], schedule="constant", warmup_steps=WARM_UP
    )
    tx, schedule = make_optimizer(config, len(batches))
    step = jax.jit(steps.make_train_step(loss, tx, schedule))
    key = jax.random.key_data(jax.random.key(0))
    state = steps.TrainState(jnp.zeros([], jnp.int32), params, tx.init(params), key)
    seen = []
    for batch in batches:
        state, metrics = step(state, batch)
        seen.append(float(metrics["loss"]))
    return seen


def walks(chain: MarkovChain, loss: str, rows: int, length: int, rng: np.random.Generator) -> Batch:
    """Returns a batch of walks for a loss; of answers, a first quarter of each is the prompt."""
    # Answers go on from the end of one prompt.
    together, prompt = TOGETHER[loss], 0 if loss == SFT else length // 4
    first = rng.integers(len(chain.next), size=rows // together)
    prompts = np.repeat(chain.walks(first, prompt, rng), together, axis=0)
    answers = chain.walks(prompts[:, -1], length - prompt, rng)
    tokens = np.concatenate([prompts[:, :-1], answers], axis=1)
    counts = np.broadcast_to(np.arange(length) >= prompt, (rows, length)).astype(np.float32)
    batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "weights": counts}
    if loss == SFT:
        return batch

    # GRPO: a reward less the mean over its group, over the deviation.
    log_p = chain.log_probabilities(tokens)
    reward = np.mean(answers[:, 1:] < len(chain.next) // 2, axis=1).reshape(-1, together)
    batch["reference_log_probs"] = log_p
    if loss == GRPO:
        advantages = reward - reward.mean(1, keepdims=True)
        advantages /= reward.std(1, keepdims=True) + 1e-4
        return batch | {"old_log_probs": log_p, "advantages": np.float32(advantages.ravel())}

    # DPO: the better ones of all pairs, then the others.
    order = np.argsort(-reward, axis=1, kind="stable")
    pairs = 2 * np.arange(rows // 2)[:, None] + order
    return {name: value[pairs.T.ravel()] for name, value in batch.items()}
