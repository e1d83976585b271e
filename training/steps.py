"""What one update and one evaluation batch compute: pure functions of state and batch."""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jaxtyping import Array, Float, Integer, PyTree

from tilescan.ops.cross_entropy import log_probabilities_of
from tilescan.ops.explicit_axes import partitioned_by_compiler, replicated, specs_of
from tilescan.ops.token_ids import check_ids, counted_ids

# Sums over tokens: "loss", "nll", "correct", "weight"; over rows: "exact", "rows".
Sums = dict[str, Any]


@flax.struct.dataclass
class TrainState:
    """Everything that a checkpoint must hold to continue, but the data iterator.

    The same tree holds shapes or shardings in the place of arrays.

    Attributes:
      step: int32 [], updates done.
      params: the model's.
      opt_state: the optimizer's.
      key: uint32 key data; update t uses fold_in(key, t).
      masters: see `masters_of`.
    """

    step: Any
    params: PyTree
    opt_state: PyTree
    key: Any
    masters: PyTree | None = None


def init_state(
    model: nn.Module, tx: optax.GradientTransformation, batch: dict, seed: int
) -> TrainState:
    """Initializes parameters from the seed; leaves are still boxed with their logical axis names.

    Moments are float32 whatever the parameters are: a second moment with decay 0.999 does not move
    in bfloat16. Nor does a parameter by less than 1/256 of itself: see `masters_of`.
    """
    init_key, run_key = jax.random.split(jax.random.key(seed))
    params = model.init(init_key, **model_inputs(batch))["params"]
    values = nn.meta.unbox(params)
    opt_state, key = tx.init(float32(values)), jax.random.key_data(run_key)
    return TrainState(jnp.zeros([], jnp.int32), params, opt_state, key, masters_of(values))


def start_from(state: TrainState, params: PyTree, shardings: TrainState) -> TrainState:
    """Returns a state just initialized with other parameters, copied, in its own dtypes.

    Args:
      state: as `init_state` makes it, without boxes.
      params: arrays in the tree of state.params; masters take their values as they are.
      shardings: where the leaves of the state lie.

    Raises:
      ValueError: params of another model; names the first parameter that differs.
    """
    params = nn.meta.unbox(params)
    ours, theirs = (
        {jax.tree_util.keystr(path): jnp.shape(x) for path, x in jax.tree.leaves_with_path(tree)}
        for tree in (state.params, params)
    )
    for path in sorted(ours | theirs):
        if ours.get(path) != theirs.get(path):
            raise ValueError(
                f"params to start from are of another model: {path} has shape "
                f"{theirs.get(path, 'absent')}, and the model's is {ours.get(path, 'absent')}"
            )

    # Copies: updates donate their buffers.
    def put(x, like, where):
        return None if like is None else jax.device_put(jnp.array(x, like.dtype, copy=True), where)

    started = jax.tree.map(put, params, state.params, shardings.params)
    masters = None
    if state.masters is not None:
        masters = jax.tree.map(put, params, state.masters, shardings.masters)
    return state.replace(params=started, masters=masters)


def float32(tree: PyTree) -> PyTree:
    """Returns a tree of arrays with every leaf in float32."""
    return jax.tree.map(lambda x: x.astype(jnp.float32), tree)


def masters_of(params: PyTree) -> PyTree | None:
    """Returns float32 copies of the parameters that are narrower than float32, or None.

    Updates are added up in these masters, and the parameters are the masters rounded. Added to
    bfloat16 itself, of 8 bits, most updates at a small learning rate would round to nothing. The
    tree is that of params with None for wide leaves; if all are wide it is None as a whole.
    """
    if not any(is_narrow(x) for x in jax.tree.leaves(params)):
        return None
    return jax.tree.map(lambda x: x.astype(jnp.float32) if is_narrow(x) else None, params)


def is_narrow(x: jax.Array | np.ndarray | jax.ShapeDtypeStruct) -> bool:
    """Returns whether a parameter has fewer bits than float32."""
    return jnp.issubdtype(x.dtype, jnp.floating) and jnp.finfo(x.dtype).bits < 32


def _exact_params(state: TrainState) -> PyTree:
    """Returns the parameters as they are updated: masters where there are, and else themselves."""
    if state.masters is None:
        return float32(state.params)
    return jax.tree.map(
        lambda x, master: x.astype(jnp.float32) if master is None else master,
        state.params,
        state.masters,
    )


def model_inputs(batch: dict) -> dict:
    """Returns the arrays of a batch that models see."""
    return {k: batch[k] for k in ("tokens", "positions", "segment_ids") if k in batch}


@partitioned_by_compiler(replicated)
def cross_entropy(
    logits: Float[Array, "*B V"],
    targets: Integer[Array, "*B"],
    weights: Float[Array, "*B"],
    z_loss: float = 0.0,
) -> Sums:
    """Sums weighted -log softmax(logits)[target], in float32 whatever the logits are.

    Targets are ids in [0, V) of any integer dtype. Where the weight is 0 they are never looked at;
    elsewhere one that is not a token id (-100, V) makes "loss" and "nll", and their gradients, NaN.

    With z_loss, "loss" has + z_loss * logsumexp(logits)^2 per token, which holds the normalizer
    near 1 (PaLM, Chowdhery et al. 2022, section 5); "nll" is without it. "rows" counts the rows
    (the last axis) with any weight and "exact" those whose weighted tokens are all right: as greedy
    decoding would write them, since up to the first mistake it reads the targets.

    Raises:
      ValueError: targets or weights that do not have the shape of the logits without V.
      TypeError: targets that are not integers.
    """
    check_ids("targets", targets)
    for name, x in (("targets", targets), ("weights", weights)):
        if x.shape != logits.shape[:-1]:
            raise ValueError(f"{name} must be {logits.shape[:-1]} like logits, got {x.shape}")

    # Of each token.
    logits = logits.astype(jnp.float32)
    targets = counted_ids(targets, weights, logits.shape[-1])
    log_p, log_z = log_probabilities_of(logits, targets)
    nll = -log_p
    hit = jnp.argmax(logits, axis=-1) == targets

    # Of each row: whether it has any weight, and any weighted token wrong.
    counts = weights > 0
    by_row = lambda a: a if a.ndim < 2 else jnp.any(a, axis=-1)
    rows, wrong = by_row(counts), by_row(counts & ~hit)
    correct = hit.astype(jnp.float32)
    weights = weights.astype(jnp.float32)
    return {
        "loss": jnp.sum(weights * (nll + z_loss * jnp.square(log_z))),
        "nll": jnp.sum(weights * nll),
        "correct": jnp.sum(weights * correct),
        "weight": jnp.sum(weights),
        "exact": jnp.sum((rows & ~wrong).astype(jnp.float32)),
        "rows": jnp.sum(rows.astype(jnp.float32)),
    }


def make_loss(model: nn.Module, task: str, z_loss: float = 0.0) -> Callable:
    """Returns `loss(params, batch, key) -> (summed loss, Sums)`.

    language_model: batch has tokens, targets, weights [B,T]. classification: tokens [B,T], labels
    [B] and, optionally, weights [B] (rows that count). `key` is for dropout; None evaluates.
    """

    def loss(params, batch, key=None):
        rngs = {} if key is None else {"dropout": key}
        out = model.apply({"params": params}, **model_inputs(batch), rngs=rngs)
        logits = out[0] if isinstance(out, tuple) else out
        if task == "classification":
            targets = batch["labels"]
            weights = batch.get("weights", jnp.ones(targets.shape, jnp.float32))
        else:
            targets, weights = batch["targets"], batch["weights"]
        sums = cross_entropy(logits, targets, weights, z_loss)
        return sums["loss"], sums

    return loss


def split_microbatches(batch: dict, parts: int) -> dict:
    """Reshapes [B, ...] to [parts, B/parts, ...].

    Microbatch i has the rows i, i + parts, ..., so that no row leaves its device.
    """
    return jax.tree.map(
        lambda x: jnp.swapaxes(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 0, 1), batch
    )


def summed_gradients(
    loss: Callable, params: PyTree, batch: dict, key: jax.Array | None, microbatches: int
) -> tuple[PyTree, Sums]:
    """Returns the gradient of the summed loss, and Sums, over microbatches one after another.

    Sums, not means, are what adds up: microbatches with unequal weight give the full batch's
    gradient too.
    """
    gradient = jax.grad(loss, has_aux=True)
    if microbatches == 1:
        grads, sums = gradient(params, batch, key)
        return float32(grads), sums

    def add(total, part):
        index, rows = part
        grads, sums = gradient(params, rows, jax.random.fold_in(key, index))
        return jax.tree.map(jnp.add, total, (float32(grads), sums)), None

    parts = (jnp.arange(microbatches), split_microbatches(batch, microbatches))
    shapes = jax.eval_shape(gradient, params, jax.tree.map(lambda x: x[0], parts[1]), key)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, jnp.float32), shapes)
    return jax.lax.scan(add, zeros, parts)[0]


def per_token(sums: Sums) -> Float[Array, ""]:
    """Returns 1 / weight, or 0 if nothing has weight."""
    some = sums["weight"] > 0
    return jnp.where(some, 1.0 / jnp.where(some, sums["weight"], 1.0), 0.0)


def means(sums: Sums) -> dict[str, Float[Array, ""]]:
    """Returns means over the tokens that count; all 0 if none does."""
    scale = per_token(sums)
    return {
        "loss": sums["loss"] * scale,
        "nll": sums["nll"] * scale,
        "accuracy": sums["correct"] * scale,
        "exact": sums["exact"] / jnp.maximum(sums["rows"], 1.0),
    }


def make_train_step(
    loss: Callable,
    tx: optax.GradientTransformation,
    rate: Callable,
    microbatches: int = 1,
    gradient_norms: bool = False,
) -> Callable:
    """Returns `step(state, batch) -> (state, metrics)`, to be jitted with the caller's shardings.

    metrics: loss, nll, accuracy (means over weighted tokens), exact (share of rows that are right
    as a whole), weight (tokens that counted), grad_norm before clipping, update_norm, param_norm,
    learning_rate; with `gradient_norms` grad_l1 before clipping, the sum of absolute entries.
    """

    @partitioned_by_compiler(
        lambda args, kwargs, out: (specs_of(args[0]), replicated(args, kwargs, out[1]))
    )
    def train_step(state: TrainState, batch: dict):
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
        grads, sums = summed_gradients(loss, state.params, batch, key, microbatches)
        scale = per_token(sums)
        grads = jax.tree.map(lambda g: g * scale, grads)

        # The update, added to float32 whatever the parameters are.
        exact = _exact_params(state)
        updates, opt_state = tx.update(grads, state.opt_state, exact)
        if state.masters is None:
            params, masters = optax.apply_updates(state.params, updates), None
        else:
            exact = optax.apply_updates(exact, updates)
            params = jax.tree.map(lambda x, p: x.astype(p.dtype), exact, state.params)
            masters = jax.tree.map(lambda p, x: x if is_narrow(p) else None, params, exact)

        metrics = means(sums) | {
            "weight": sums["weight"],
            "grad_norm": optax.tree.norm(grads),
            "update_norm": optax.tree.norm(updates),
            "param_norm": optax.tree.norm(float32(params)),
            "learning_rate": rate(state.step),
        }
        if gradient_norms:
            metrics["grad_l1"] = optax.tree.norm(grads, ord=1)
        state = TrainState(state.step + 1, params, opt_state, state.key, masters)
        return state, metrics

    return train_step


def make_eval_step(loss: Callable) -> Callable:
    """Returns `step(params, batch) -> Sums`, to be added up over batches."""
    return lambda params, batch: loss(params, batch)[1]
