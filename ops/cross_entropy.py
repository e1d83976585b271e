"""Losses of a language model's head whose logits never exist as a whole.

The head is applied to a chunk of positions at a time. A chunk's loss is differentiated at once, in
the forward pass, and its gradients are added to float32 sums: logits take O(B C V) memory instead
of O(B T V), and no matrix product is done twice (StreamBP, arXiv 2506.03077, section 3.1).

Dimensions: B batch, T time, C chunk, E embedding, V vocabulary.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Integer, Num, PyTree

from tilescan.ops.arrays import AnyArray
from tilescan.ops.attention_xla import varying
from tilescan.ops.explicit_axes import as_first, partitioned_by_compiler, replicated
from tilescan.ops.reverse_mode import written_vjp
from tilescan.ops.sizes import check_sizes
from tilescan.ops.token_ids import bounded_ids, check_ids, counted_ids


@partitioned_by_compiler(replicated)
def chunked_cross_entropy(
    hidden: Float[AnyArray, "B T E"],
    head: Float[AnyArray, "E V"] | Float[AnyArray, "V E"],
    targets: Integer[AnyArray, "B T"],
    weights: Num[AnyArray, "B T"] | Bool[AnyArray, "B T"],
    *,
    chunk: int,
    z_loss: float = 0.0,
    tied: bool = False,
    logit_scale: float | None = None,
    logit_cap: float | None = None,
    axis_name: str | None = None,
) -> dict[str, Float[Array, ""]]:
    """Computes the sums of `training.steps.cross_entropy` for logits cap(scale hidden head).

    Logits exist for a chunk of positions at a time.

    Args:
      hidden: what the head reads.
      head: the head's matrix [E, V], or with `tied` the embedding [V, E]; it is cast to hidden's
        dtype, and products are accumulated in float32.
      targets: ids in [0, V), of any integer dtype. Where the weight is 0 they are not read;
        elsewhere one outside [0, V) makes the loss and its gradients NaN.
      weights: of the tokens.
      chunk: positions per chunk, C; T need not be a multiple.
      z_loss: "loss" has + z_loss * logsumexp(logits)^2 per token.
      tied: whether head is [V, E].
      logit_scale, logit_cap: as in `models.LanguageModelConfig`.
      axis_name: inside `jax.shard_map`, the mesh axis that shards time, over which sums are added.

    Returns:
      {"loss", "nll", "correct", "weight", "exact", "rows"}, float32 (float64 for float64). "loss"
      alone has a gradient, and for hidden and head alone; it is computed with the loss.

    Raises:
      ValueError: shapes that do not fit, or a chunk below 1.
      TypeError: targets that are not integers.
    """
    objective = functools.partial(_cross_entropy, z_loss=z_loss)
    check_ids("targets", targets)
    _check(hidden, head, tied, chunk, {"targets": targets, "weights": weights})
    targets = counted_ids(targets, weights, _vocabulary(head, tied))
    per_token = {"targets": targets, "weights": weights}
    loss, sums = sum_over_chunks(
        objective, hidden, head, per_token, chunk=chunk, tied=tied,
        logit_scale=logit_scale, logit_cap=logit_cap,
    )  # fmt: skip
    if axis_name is not None:
        loss, sums = jax.lax.psum((loss, sums), axis_name)
    return {"loss": loss, **whole_rows(sums)}


@partitioned_by_compiler(as_first(2))
def chunked_log_probabilities(
    hidden: Float[AnyArray, "B T E"],
    head: Float[AnyArray, "E V"] | Float[AnyArray, "V E"],
    targets: Integer[AnyArray, "B T"],
    *,
    chunk: int,
    tied: bool = False,
    logit_scale: float | None = None,
    logit_cap: float | None = None,
    temperature: float = 1.0,
) -> Float[Array, "B T"]:
    """Computes log softmax(logits / temperature)[target] of every token by chunks, in float32.

    For losses that are not a sum over tokens: the backward pass takes any cotangent, for which it
    recomputes each chunk's logits. Arguments and errors as in `chunked_cross_entropy`. A target
    outside [0, V) gives NaN, and a NaN gradient unless its cotangent is 0.
    """
    check_ids("targets", targets)
    _check(hidden, head, tied, chunk, {"targets": targets})
    targets = bounded_ids(targets, _vocabulary(head, tied), -1)
    options = _Options(tied, logit_scale, logit_cap, temperature, chunk)
    hidden, head, targets = varying((hidden, head, targets), (hidden, head, targets))
    return _log_probabilities(options, hidden, head, targets)


@partitioned_by_compiler(replicated)
def sum_over_chunks(
    objective: Callable[..., tuple[AnyArray, Any]],
    hidden: Float[AnyArray, "B T E"],
    head: Float[AnyArray, "E V"] | Float[AnyArray, "V E"],
    per_token: PyTree,
    *,
    chunk: int,
    tied: bool = False,
    logit_scale: float | None = None,
    logit_cap: float | None = None,
    temperature: float = 1.0,
) -> tuple[Float[Array, ""], PyTree]:
    """Computes any loss that is a sum over tokens: (sum of losses, sums of other counts).

    Args:
      objective: `objective(logits [B, C, V], per_token of the chunk) -> (loss, sums)`, a scalar and
        a pytree of arrays to add up. It gets logits in float32 or wider and must give 0 for tokens
        whose per_token entries are all 0, which fill up the last chunk.
      per_token: pytree of arrays [B, T], constants for the gradient.
      temperature: divides the logits, after scale and cap.
      hidden, head, chunk, tied, logit_scale, logit_cap: as in `chunked_cross_entropy`.

    Returns:
      The loss, differentiable with respect to hidden and head, and the sums, constants.
    """
    _check(hidden, head, tied, chunk, per_token)
    options = _Options(tied, logit_scale, logit_cap, temperature, chunk)
    arrays = (hidden, head, jax.lax.stop_gradient(per_token))
    return _fused(objective, options, *varying(arrays, arrays))


def log_probabilities_of(
    logits: Float[AnyArray, "*B V"], targets: Integer[AnyArray, "*B"]
) -> tuple[Float[Array, "*B"], Float[Array, "*B"]]:
    """Returns (log softmax(logits)[target], logsumexp(logits)).

    The first is NaN, and so is its gradient, for targets outside [0, V). The target is selected by
    comparison: its gradient is elementwise where that of a gather would be a scatter.
    """
    targets = bounded_ids(targets, logits.shape[-1], -1)
    log_z = jax.nn.logsumexp(logits, axis=-1)
    ids = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    picked = jnp.sum(jnp.where(ids == targets[..., None], logits, 0), axis=-1)
    # A factor and not a `where`, so that the gradient is NaN as well.
    known = jnp.where(targets < 0, jnp.nan, 1).astype(logits.dtype)
    return (picked - log_z) * known, log_z


def count_hits(
    logits: Float[AnyArray, "B C V"],
    targets: Integer[AnyArray, "B C"],
    weights: Num[AnyArray, "B C"] | Bool[AnyArray, "B C"],
) -> dict[str, Array]:
    """Returns a chunk's counts for "correct", "weight" and, by `whole_rows`, "exact" and "rows"."""
    hit = jnp.argmax(logits, axis=-1) == targets
    counts = weights > 0
    return {
        "correct": jnp.sum(weights * hit),
        "weight": jnp.sum(weights),
        "counted": jnp.sum(counts, axis=-1),
        "wrong": jnp.sum(counts & ~hit, axis=-1),
    }


def whole_rows(sums: dict[str, Array]) -> dict[str, Array]:
    """Returns sums of `count_hits` with "rows" and "exact" in place of the counts of each row."""
    dtype = sums["weight"].dtype
    rows, right = sums["counted"] > 0, sums["wrong"] == 0
    rest = {name: value for name, value in sums.items() if name not in ("counted", "wrong")}
    return rest | {
        "exact": jnp.sum((rows & right).astype(dtype)),
        "rows": jnp.sum(rows.astype(dtype)),
    }


def _cross_entropy(logits, x, z_loss):
    # -sum_t w_t log p_t, and z_loss sum_t w_t log(Z_t)^2
    targets, weights = x["targets"], x["weights"].astype(logits.dtype)
    log_p, log_z = log_probabilities_of(logits, targets)
    nll = jnp.sum(weights * -log_p)
    loss = nll if not z_loss else nll + z_loss * jnp.sum(weights * jnp.square(log_z))
    return loss, {"nll": nll, **count_hits(logits, targets, weights)}


@dataclasses.dataclass(frozen=True)
class _Options:
    tied: bool
    logit_scale: float | None
    logit_cap: float | None
    temperature: float
    chunk: int

    def products(self, hidden, head):
        """Returns hidden head, accumulated in float32."""
        equation = "bce,ve->bcv" if self.tied else "bce,ev->bcv"
        return jnp.einsum(equation, hidden, head, preferred_element_type=_wide(hidden))

    def logits(self, products):
        if self.logit_scale is not None:
            products = products * self.logit_scale
        if self.logit_cap is not None:
            products = self.logit_cap * jnp.tanh(products / self.logit_cap)
        return products if self.temperature == 1 else products / self.temperature

    def gradients(self, hidden, head, g):
        """Returns cotangents of hidden and head in float32 for the cotangent g of the products."""
        g, wide = g.astype(hidden.dtype), _wide(hidden)
        to_hidden, to_head = ("ve", "ve") if self.tied else ("ev", "ev")
        return (
            jnp.einsum(f"bcv,{to_hidden}->bce", g, head, preferred_element_type=wide),
            jnp.einsum(f"bcv,bce->{to_head}", g, hidden, preferred_element_type=wide),
        )


def _wide(x):
    return jnp.promote_types(x.dtype, jnp.float32)


@functools.partial(written_vjp, nondiff_argnums=(0, 1))
def _fused(objective, options, hidden, head, per_token):
    """Returns the sums alone, as an evaluation computes them."""
    chunks = _Chunks(hidden, per_token, options.chunk)
    head = head.astype(hidden.dtype)

    def one(i):
        h, x = chunks.take(i, chunks.hidden)
        return objective(options.logits(options.products(h, head)), x)

    def add(total, i):
        return jax.tree.map(jnp.add, total, one(i)), None

    return jax.lax.scan(add, _zeros(one, chunks), jnp.arange(chunks.n))[0]


def _fused_fwd(objective, options, hidden, head, per_token):
    """Returns the sums, and both gradients of the loss."""
    chunks = _Chunks(hidden, per_token, options.chunk)
    narrow = head.astype(hidden.dtype)

    def one(i, hidden):
        h, x = chunks.take(i, hidden)
        products = options.products(h, narrow)
        of_products = lambda products: objective(options.logits(products), x)
        sums, g = jax.value_and_grad(of_products, has_aux=True)(products)
        return sums, options.gradients(h, narrow, g)

    def add(carry, i):
        total, hidden, to_head = carry
        sums, (dh, dw) = one(i, hidden)
        total = jax.tree.map(jnp.add, total, sums)
        # This chunk of hidden is not read again: its gradient replaces it.
        return (total, chunks.put(hidden, i, dh), to_head + dw), None

    sums = _zeros(lambda i: one(i, chunks.hidden)[0], chunks)
    to_head = varying(jnp.zeros(head.shape, _wide(hidden)), head)
    carry = jax.lax.scan(add, (sums, chunks.hidden, to_head), jnp.arange(chunks.n))[0]
    total, to_hidden, to_head = carry
    like = jnp.zeros((0,), head.dtype)
    return total, (to_hidden[:, : hidden.shape[1]], to_head, like)


def _fused_bwd(objective, options, residuals, cotangents):
    to_hidden, to_head, like = residuals
    g = cotangents[0]
    return (to_hidden * g.astype(to_hidden.dtype), (to_head * g).astype(like.dtype), None)


_fused.defvjp(_fused_fwd, _fused_bwd)


@functools.partial(written_vjp, nondiff_argnums=(0,))
def _log_probabilities(options, hidden, head, targets):
    chunks = _Chunks(hidden, targets, options.chunk)
    head = head.astype(hidden.dtype)

    def add(out, i):
        h, ids = chunks.take(i, chunks.hidden)
        log_p = log_probabilities_of(options.logits(options.products(h, head)), ids)[0]
        return chunks.put(out, i, log_p), None

    out = varying(jnp.zeros(chunks.hidden.shape[:2], _wide(hidden)), hidden)
    return jax.lax.scan(add, out, jnp.arange(chunks.n))[0][:, : hidden.shape[1]]


def _log_probabilities_fwd(options, hidden, head, targets):
    return _log_probabilities(options, hidden, head, targets), (hidden, head, targets)


def _log_probabilities_bwd(options, residuals, g):
    hidden, head, targets = residuals
    targets = jnp.where(g != 0, targets, 0)  # targets that the loss left out are not read

    def weighted(logits, x):
        return jnp.sum(x["g"] * log_probabilities_of(logits, x["targets"])[0]), ()

    _, (to_hidden, to_head, _) = _fused_fwd(
        weighted, options, hidden, head, {"g": g, "targets": targets}
    )
    return to_hidden, to_head.astype(head.dtype), None


_log_probabilities.defvjp(_log_probabilities_fwd, _log_probabilities_bwd)


class _Chunks:
    """Arrays [B, T, ...] by chunks of C positions; zeros fill up the last one."""

    def __init__(self, hidden, per_token, chunk: int):
        T = hidden.shape[1]
        self.C = min(chunk, T)
        self.n = -(-T // self.C)

        def pad(x):
            extra = self.n * self.C - T
            return x if not extra else jnp.pad(x, [(0, 0), (0, extra)] + [(0, 0)] * (x.ndim - 2))

        self.hidden, self.per_token = jax.tree.map(pad, (hidden, per_token))

    def take(self, i, hidden):
        chunk = lambda x: jax.lax.dynamic_slice_in_dim(x, i * self.C, self.C, axis=1)
        return jax.tree.map(chunk, (hidden, self.per_token))

    def put(self, x, i, part):
        return jax.lax.dynamic_update_slice_in_dim(x, part.astype(x.dtype), i * self.C, axis=1)


def _zeros(one, chunks):
    """Returns zeros of the shapes and dtypes that `one` returns for a chunk."""
    shapes = jax.eval_shape(one, jnp.int32(0))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    return varying(zeros, chunks.hidden)


def _vocabulary(head, tied) -> int:
    return head.shape[0 if tied else 1]


def _check(hidden, head, tied, chunk, per_token):
    if hidden.ndim != 3:
        raise ValueError(f"hidden must be [B, T, E], got shape {hidden.shape}")
    axis, letters = (1, "[V, E]") if tied else (0, "[E, V]")
    if head.ndim != 2 or head.shape[axis] != hidden.shape[2]:
        raise ValueError(
            f"head must be {letters} with E = {hidden.shape[2]} (tied={tied}), got {head.shape}"
        )
    check_sizes(hidden=(hidden, "B, T, E"), head=(head, letters[1:-1]))
    if chunk < 1:
        raise ValueError(f"chunk={chunk} must be at least 1")
    for path, x in jax.tree.leaves_with_path(per_token):
        if x.shape[:2] != hidden.shape[:2]:
            raise ValueError(
                f"{jax.tree_util.keystr(path, simple=True)} must be [B, T] = {hidden.shape[:2]} "
                f"like hidden, got {x.shape}"
            )
