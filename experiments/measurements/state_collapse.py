"""Where a Mamba-2 language model breaks beyond its training length: the diagnosis of
"Stuffed Mamba" (Chen et al. 2024, arXiv 2410.07145), for any model of `models.LanguageModel`.

Dimensions: B batch, T time, L layers, H heads, P head dim, N state dim.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict

from tilescan.data.batches import Batch
from tilescan.data.buckets import mean_by_position
from tilescan.models import LanguageModel, LanguageModelConfig
from tilescan.models.language_model import ModelState

COLLAPSE = 2.0  # times the greatest loss within the training length
TOP = 0.1  # share of the heads that forget least
# Mitigations: those that need no training, and those by training.
NONE, FORGET, WINDOW, NORM, HALF_STEP = "none", "forget", "window", "norm", "half_step"
CARRIED, LONGER = "carried", "longer"
ROWS = 256  # that are read together, so that their states need little memory


def state_elements(config: LanguageModelConfig) -> int:
    """Returns N_S: numbers in the recurrent state of a sequence, convolutions' inputs included."""
    state = jax.eval_shape(lambda: LanguageModel(config).init_state(1, 1)).layers
    kept = [leaf for layer in state for leaf in (layer.ssm, layer.conv)]
    return sum(math.prod(leaf.shape) for leaf in kept)


@functools.lru_cache(maxsize=64)
def reader(config: LanguageModelConfig):
    """Returns the compiled `read(params, state, tokens, targets, limit) -> (parts, state)`.

    parts: nll and hit (whether the target is the likeliest) [B, T], log_decay [L, B, H]
    (the sum over the chunk), state_mean and state_variance [L, B, H] after it. `limit`
    [L, H] bounds the norm of each head's state after the chunk; infinity leaves it.
    """
    model = LanguageModel(config)

    @jax.jit
    def read(params, state, tokens, targets, limit):
        (logits, state), traced = model.apply(
            {"params": params}, tokens, state=state, mutable=["intermediates"]
        )
        state = _bounded(state, limit)
        states = jnp.concatenate([layer.ssm for layer in state.layers])
        decays = [
            leaf[..., -1, :]
            for path, leaf in jax.tree.leaves_with_path(traced)
            if "cumulative_log_decay" in jax.tree_util.keystr(path)
        ]
        parts = {
            "nll": optax.softmax_cross_entropy_with_integer_labels(logits, targets),
            "hit": jnp.argmax(logits, axis=-1) == targets,
            "log_decay": jnp.concatenate([d.reshape(-1, *d.shape[-2:]) for d in decays]),
            "state_mean": jnp.mean(states, axis=(-2, -1)),
            "state_variance": jnp.var(states, axis=(-2, -1)),
        }
        return parts, state

    return read


def _bounded(state: ModelState, limit) -> ModelState:
    """Returns the state with h min(1, limit / |h|) for each head's h."""
    layers, start = [], 0
    for layer in state.layers:
        norm = jnp.sqrt(jnp.sum(layer.ssm**2, axis=(-2, -1), keepdims=True))
        bound = limit[start : start + len(norm), None, :, None, None]
        start += len(norm)
        factor = jnp.minimum(1.0, bound / jnp.maximum(norm, 1e-30))
        layers.append(layer._replace(ssm=layer.ssm * factor))
    return state._replace(layers=tuple(layers))


def read(
    config: LanguageModelConfig,
    params: Any,
    tokens: Int[Array, "B T"],
    targets: Int[Array, "B T"],
    *,
    chunk: int,
    limit: Float[Array, "L H"] | None = None,
) -> dict[str, np.ndarray]:
    """Reads rows from their beginning, `chunk` tokens a call, the state carried.

    Args:
      config: of a model whose pattern holds nothing but "mamba2".
      params: its parameters.
      tokens, targets: the next token of each.
      chunk: tokens a call; it divides T. States are looked at after each of these.
      limit: bound of the norm of each head's state, applied after each chunk alone.

    Rows are read in groups of one size, of at most ROWS.

    Returns:
      {"nll", "hit" [B, T]; "log_decay", "state_mean", "state_variance" [T / chunk, L, B, H]}, with
      log_decay the logarithm of the first token's share in the state, summed from the beginning.

    Raises:
      ValueError: another pattern, or a chunk that does not divide T.
    """
    check_mamba2(config)
    length = tokens.shape[1]
    if chunk < 1 or length % chunk:
        raise ValueError(f"chunk={chunk} must divide the length {length}")
    count = len(tokens)
    if count > ROWS:
        # The last group has rows of the one before it too, so that all are compiled once.
        size, found = -(-count // -(-count // ROWS)), []
        for end in [*range(size, count, size), count]:
            start, new = end - size, slice(-((end - 1) % size + 1), None)
            part = read(
                config, params, tokens[start:end], targets[start:end], chunk=chunk, limit=limit
            )
            found.append({k: x[new] if x.ndim == 2 else x[:, :, new] for k, x in part.items()})
        axes = {name: 0 if x.ndim == 2 else 2 for name, x in found[0].items()}
        return {k: np.concatenate([part[k] for part in found], axis) for k, axis in axes.items()}
    step, model = reader(config), LanguageModel(config)
    state = model.init_state(count, 1)
    if limit is None:
        first = state.layers[0].ssm
        limit = jnp.full((len(state.layers) * first.shape[0], first.shape[2]), jnp.inf)
    parts = []
    for start in range(0, length, chunk):
        piece = slice(start, start + chunk)
        part, state = step(params, state, tokens[:, piece], targets[:, piece], jnp.asarray(limit))
        parts.append(jax.device_get(part))
    joined = {name: np.concatenate([p[name] for p in parts], axis=1) for name in ("nll", "hit")}
    for name in ("log_decay", "state_mean", "state_variance"):
        joined[name] = np.stack([p[name] for p in parts])
    return joined | {"log_decay": np.cumsum(joined["log_decay"], axis=0)}


def check_mamba2(config: LanguageModelConfig) -> None:
    """Raises ValueError if the model has another mixer than Mamba-2's."""
    if set(config.pattern) != {"mamba2"}:
        raise ValueError(
            f"the diagnosis reads the states of Mamba-2; this model's pattern is {config.pattern}"
        )


def state_norms(found: Mapping[str, np.ndarray], size: int) -> np.ndarray:
    """Returns the norms of states of `size` numbers a head [T / chunk, L, B, H], of a reading."""
    return np.sqrt(size * (found["state_variance"] + found["state_mean"] ** 2))


def by_position(values: np.ndarray, weights: np.ndarray, width: int) -> list[float]:
    """Returns weighted means of [B, T] over buckets of `width` positions, all rows together.

    Raises:
      ValueError: a bucket has no weight.
    """
    T = values.shape[1]
    means, counted = mean_by_position(values, np.arange(T), range(0, T + 1, width), weights)
    if not (counted > 0).all():
        raise ValueError("a bucket of positions has no token that counts: read more rows")
    return [float(x) for x in means]


@dataclasses.dataclass(frozen=True)
class Collapse:
    """What the losses by position say.

    Attributes:
      ratio: greatest loss beyond the training length over the greatest one within.
      collapsed: ratio >= COLLAPSE, the paper's criterion.
      position: end of the first bucket with such a loss; None if there is none.
    """

    ratio: float
    collapsed: bool
    position: int | None


def judge_collapse(losses: list[float], width: int, train_length: int) -> Collapse:
    """Applies the criterion of section 3.1 to means over buckets of `width` positions.

    Raises:
      ValueError: no bucket lies within the training length, or none beyond it.
    """
    within = train_length // width
    if not 0 < within < len(losses):
        raise ValueError(
            f"{len(losses)} buckets of {width} tokens don't reach from within to beyond "
            f"train_length={train_length}"
        )
    bound = max(losses[:within])
    ratios = [loss / bound for loss in losses[within:]]
    over = [i for i, ratio in enumerate(ratios) if ratio >= COLLAPSE]
    position = (within + over[0] + 1) * width if over else None
    return Collapse(max(ratios), bool(over), position)


def kept_by_top(first_token: Sequence[float]) -> float:
    """Returns the mean share of the first token that the TOP of the heads keep, by its logarithm.

    The share of a head is the exponential of the mean of its logarithm over rows.
    """
    shares = np.sort(np.exp(first_token))
    return float(np.mean(shares[-max(1, round(TOP * len(shares))) :]))


def growth_of_outliers(variances: Sequence[Sequence[float]]) -> float:
    """Returns how much the states' variance grows from the first to the last, of the 95% head."""
    values = np.maximum(np.asarray(variances), 1e-30)
    return float(np.quantile(values[-1] / values[0], 0.95))


def untrained(config: LanguageModelConfig, seed: int) -> Any:
    """Returns the parameters that a training with this seed begins with."""
    first = jax.random.split(jax.random.key(seed))[0]
    init = jax.jit(lambda key: LanguageModel(config).init(key, jnp.zeros((1, 1), jnp.int32)))
    return nn.unbox(init(first)["params"])


def with_mixer(config: LanguageModelConfig, **options: Any) -> LanguageModelConfig:
    """Returns the config with other options of its Mamba-2 mixers; the same parameters fit."""
    mixers = {**config.mixers, "mamba2": {**config.mixers.get("mamba2", {}), **options}}
    return dataclasses.replace(config, mixers=mixers)


def candidates(options: ConfigDict) -> dict[str, list[dict[str, float]]]:
    """Returns {mitigation: what validation chooses from}, as `compare_mitigations` takes it.

    Args:
      options: train_length, T; kept_shares of a state over T, and b_scales, of FORGET; windows, by
        which T is divided; bounds and dt_scales.
    """
    o, length = options, options.train_length
    kept = [share ** (1 / length) for share in o.kept_shares]
    made = {
        NONE: [{}],
        FORGET: [{"decay_scale": scale, "b_scale": b} for scale in kept for b in o.b_scales],
        WINDOW: [{"state_window": round(length / part)} for part in o.windows],
        NORM: [{"bound": factor} for factor in o.bounds],
        HALF_STEP: [{"dt_scale": scale} for scale in o.dt_scales],
    }
    return {name: found for name, found in made.items() if found}


def compare_mitigations(
    config: LanguageModelConfig,
    params: Any,
    batches: Mapping[str, Batch],
    candidates: Mapping[str, Sequence[Mapping[str, float]]],
    *,
    train_length: int,
    chunk: int,
) -> dict[str, dict[str, Any]]:
    """Measures the loss within and beyond the training length under mitigations of collapse.

    Args:
      config: of a model whose pattern holds nothing but "mamba2".
      params: its parameters.
      batches: {"validation", "test"}: rows of several training lengths.
      candidates: {mitigation: what validation chooses from}: options of the mixer, see
        `with_mixer`; "bound" stands for a bound of each head's norm after every token, in units
        of its mean at the end of the training length on validation rows.
      train_length: T, even.
      chunk: tokens a call, as of `read`; it divides T.

    Returns:
      {mitigation: {"chosen": the candidate with the smallest loss at the end of validation rows,
      and of test rows "within": the mean loss in (T/2, T], "beyond": that of the last T/2}}.
    """

    def reading(split: str, limit: np.ndarray | None = None, **options) -> dict[str, np.ndarray]:
        changed, batch = with_mixer(config, **options), batches[split]
        # A bound of the norm holds after every token, as in the paper: it reads one a call.
        step = chunk if limit is None else 1
        return read(changed, params, batch["tokens"], batch["targets"], chunk=step, limit=limit)

    # Norms of the states at the end of the training length, a bound for longer sequences.
    mixer = config.mixers["mamba2"]
    size = mixer.get("head_dim", 64) * mixer.get("state_dim", 128)
    norms = state_norms(reading("validation"), size)[train_length // chunk - 1].mean(axis=1)

    def losses(split: str, bound: float | None = None, **options) -> list[float]:
        found = reading(split, None if bound is None else bound * norms, **options)["nll"]
        return by_position(found, batches[split]["weights"], train_length // 2)

    # Validation chooses, the test decides.
    result = {}
    for name, options in candidates.items():
        last = lambda candidate: losses("validation", **candidate)[-1]
        chosen = min(options, key=last) if len(options) > 1 else options[0]
        tested = losses("test", **chosen)
        result[name] = {"chosen": dict(chosen), "within": tested[1], "beyond": tested[-1]}
    return result
