"""Small Mamba-2 models for "Stuffed Mamba": rows of text or pairs, and training that may carry the
state on (truncated backpropagation through time).

The parts are those of `training`; the loop is its own because one compiled step serves all seeds of
a size, and because the state goes from step to step.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import optax
from flax import linen as nn

from tilescan.data import sources, splits, tokenizers
from tilescan.data.batches import Batch
from tilescan.data.tasks import recall_stream
from tilescan.experiments.measurements.training import training_config
from tilescan.models import LanguageModel, LanguageModelConfig
from tilescan.training import config as config_lib
from tilescan.training import steps as steps_lib
from tilescan.training.optimizers import make_optimizer
from tilescan.training.settings import OptimizerConfig

STREAM, TEXT = "stream", "text"
# rows(split, count, length, key) -> tokens, targets and weights [count, length]
Rows = Callable[[str, int, int, tuple[int, ...]], Batch]


def stream_rows(options: Mapping[str, Any]) -> Rows:
    """Rows of `data.recall_stream`, the splits told apart by the rows themselves."""

    def rows(split, count, length, key):
        return recall_stream.recall_stream(length, **options).rows(split, count, key, hard=True)

    return rows


def text_rows(options: Mapping[str, Any]) -> Rows:
    """Windows of documents that hold more than `least` bytes: {"source": name, "least": bytes}.

    Splits are by document.
    """
    tokenizer, parts = tokenizers.get_tokenizer("byte"), {}
    for split, documents in splits.split_documents(sources.load(options["source"])).items():
        encoded = [tokenizer.encode(document.text) for document in documents]
        parts[split] = [text for text in encoded if len(text) > options["least"]]

    def rows(split, count, length, key):
        rng = np.random.default_rng(key)
        long = [text for text in parts[split] if len(text) > length]
        if not long:
            raise ValueError(
                f"{options['source']!r} has no document of more than {length} bytes in {split!r}"
            )
        # By the number of windows: each window is as likely as any other.
        shares = np.asarray([len(text) - length for text in long], float)
        cut = []
        for index in rng.choice(len(long), count, p=shares / shares.sum()):
            start = rng.integers(0, len(long[index]) - length)
            cut.append(long[index][start : start + length + 1])
        cut = np.stack(cut).astype(np.int32)
        weights = np.ones((count, length), np.float32)
        return {"tokens": cut[:, :-1], "targets": cut[:, 1:], "weights": weights}

    return rows


@functools.lru_cache(maxsize=4)
def _make_rows(kind: str, options: tuple) -> Rows:
    return (stream_rows if kind == STREAM else text_rows)(dict(options))


def make_rows(kind: str, options: Mapping[str, Any]) -> Rows:
    """The rows of a kind, STREAM or TEXT, made once for the same options."""
    if kind not in (STREAM, TEXT):
        raise ValueError(f"kind={kind!r} must be {STREAM!r} or {TEXT!r}")
    return _make_rows(kind, tuple(sorted(options.items())))


@functools.lru_cache(maxsize=8)
def _programs(config: LanguageModelConfig, optimizer: OptimizerConfig, steps: int):
    """(initialise(batch, seed), compiled step(state, memory, batch) -> (state, memory, loss))."""
    model = LanguageModel(config)
    tx, _ = make_optimizer(optimizer, steps)

    def initialise(batch, seed):
        state = steps_lib.init_state(model, tx, batch, seed)
        return state.replace(params=nn.meta.unbox(state.params))

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state, memory, batch):
        def loss(params):
            logits, after = model.apply({"params": params}, batch["tokens"], state=memory)
            sums = steps_lib.cross_entropy(logits, batch["targets"], batch["weights"])
            return sums["loss"] * steps_lib.per_token(sums), after

        (value, after), grads = jax.value_and_grad(loss, has_aux=True)(state.params)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return state.replace(step=state.step + 1, params=params, opt_state=opt_state), after, value

    return initialise, step


def train(keys: Mapping[str, Any], rows: Rows, seed: int, carry: int = 1):
    """Trains as the training config says: data.seq_len, data.batch_size, train.steps, optimizer.

    Args:
      keys: of the training config, the model's with model.vocab_size among them.
      rows: where training rows come from.
      seed: of parameters and rows.
      carry: so many stretches of data.seq_len tokens follow one another in a row; the state goes
        on over their borders and the gradient does not (truncated backpropagation).

    Returns:
      (the model's config, its parameters, [the mean loss of each tenth of the training]).

    Raises:
      FloatingPointError: the loss is not finite.
    """
    c = config_lib.settings(training_config(keys, seed))
    config = c.model_config(c.model["vocab_size"])
    length, size = c.data.seq_len, c.data.batch_size
    initialise, step = _programs(config, c.optimizer, c.train.steps)
    zero = LanguageModel(config).init_state(size, 1)
    state, memory, losses, long = None, zero, [], None
    for number in range(c.train.steps):
        part = number % carry
        if part == 0:
            long = rows("train", size, carry * length, (seed, number + 1))
            memory = zero
        batch = {k: v[:, part * length : (part + 1) * length] for k, v in long.items()}
        if state is None:
            state = initialise({"tokens": batch["tokens"]}, seed)
        state, memory, loss = step(state, memory, batch)
        losses.append(loss)
    losses = np.asarray(jax.device_get(losses), float)
    if not np.isfinite(losses).all():
        at = int(np.flatnonzero(~np.isfinite(losses))[0])
        raise FloatingPointError(f"the loss is {losses[at]} at step {at + 1}; lower the rate")
    tenths = np.array_split(losses, min(10, len(losses)))
    return config, state.params, [float(np.mean(part)) for part in tenths]
