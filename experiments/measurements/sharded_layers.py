"""One device's share of a Transformer's layers, for the strategies that the papers compare.

    tensor               Megatron's tensor parallelism: each device has some heads and some columns
                         of the MLP; activations between them are whole on every device
    megatron_sp          the same, with time sharded between them: all-gather before attention and
                         MLP, reduce-scatter after them (arXiv 2205.05198)
    ring_self_attention, ring, ulysses, all_gather
                         time is sharded everywhere, weights are whole; `ops.sequence_parallel`
    linformer            time is sharded; keys and values are projected along time to a few rows,
                         sums of what each device has (arXiv 2006.04768; 2105.13120, section 3.3)

Plain functions for `jax.shard_map`; gradients are taken inside, so that what is sent is what is
written here. Pre-norm layers without biases or dropout, no positions. Of norms and activation
functions the backward pass keeps the inputs alone, of stored attention the weights, as frameworks
with fused ones do.

Dimensions: B batch, T time, E width, H heads, D head dim, F width of the MLP, V vocabulary, N
layers, K rows of projected keys.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from tilescan.experiments.measurements.devices import AXIS
from tilescan.ops import masks
from tilescan.ops.attention import attention
from tilescan.ops.sequence_parallel import ATTENTION, ring_self_attention

TENSOR = ("tensor", "megatron_sp")
TIME = ("ring_self_attention", "ring", "ulysses", "all_gather", "linformer")
STRATEGIES = (*TENSOR, *TIME)


@dataclasses.dataclass(frozen=True)
class Shape:
    """A Transformer, and how it is computed.

    Attributes:
      batch, length: B and T of the whole batch.
      layers, width, heads, vocab: N, E, H, V (F is 4 E); without a vocabulary the
        input is [B, T, E] and the loss the sum of the outputs.
      blocks: of a layer: "attention", "mlp".
      residual: whether blocks are x + block(norm(x)), or block(x) alone.
      causal: what attention sees.
      stored: "tensor" and "megatron_sp" keep the whole matrix of scores, as RSA does; otherwise
        they attend in tiles. Rings and Ulysses always do.
      reduction: of ring_self_attention.
      remat: the backward pass computes layers again.
      sharded_weights: where weights would be whole, each device keeps a shard and layers gather
        them (ZeRO-3).
      head_chunk: tokens of a device whose logits exist at once, 0: all.
      rows: K of linformer.
    """

    batch: int
    length: int
    layers: int
    width: int
    heads: int
    vocab: int = 0
    blocks: tuple[str, ...] = ("attention", "mlp")
    residual: bool = True
    causal: bool = False
    stored: bool = False
    reduction: str = "all_reduce"
    remat: bool = False
    sharded_weights: bool = False
    head_chunk: int = 0
    rows: int = 256

    @property
    def mask(self) -> masks.Mask:
        """What attention sees."""
        return masks.Causal() if self.causal else masks.Full()


def weights(strategy: str, s: Shape) -> dict[str, tuple]:
    """Returns {name: (shape, the dimension that is sharded over devices, or None)}."""
    N, E, H, F = s.layers, s.width, s.heads, 4 * s.width
    shapes = {"norms": (N, 2, E)} if s.residual else {}
    if "attention" in s.blocks:
        shapes |= {"qkv": (N, E, 3, H, E // H), "out": (N, H, E // H, E)}
    if "mlp" in s.blocks:
        shapes |= {"up": (N, E, F), "down": (N, F, E)}
    if s.vocab:
        shapes["embedding"] = (s.vocab, E)
    axes = dict.fromkeys(shapes)
    if strategy in TENSOR:
        axes |= {"qkv": 3, "out": 1, "up": 2, "down": 1, "embedding": 0}
    elif s.sharded_weights:
        axes |= {"qkv": 1, "out": 3, "up": 1, "down": 2, "embedding": 1}
    if strategy == "linformer":
        shapes["project"], axes["project"] = (N, 2, s.rows, s.length), 3
    return {name: (shape, axes[name]) for name, shape in shapes.items()}


def apply_layers(strategy: str, s: Shape, params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    """Returns all layers' output of a device's activations [B, T, E]."""
    stacked = {k: w for k, w in params.items() if k != "embedding"}

    def layer(x, w):
        if strategy in TIME and s.sharded_weights:
            w = {k: _gathered(k, strategy, s, v) for k, v in w.items()}
        for i, block in enumerate(s.blocks):
            run = _attend if block == "attention" else _mlp
            if s.residual:
                x = x + run(strategy, s, w, _norm(x, w["norms"][i]))
            else:
                x = run(strategy, s, w, x)
        return x, None

    return jax.lax.scan(jax.checkpoint(layer) if s.remat else layer, x, stacked)[0]


def _gathered(name, strategy, s, w):
    """Returns a layer's whole weight, gathered from the devices' shards."""
    axis = weights(strategy, s)[name][1]
    if axis is None or name == "project":
        return w
    return jax.lax.all_gather(w, AXIS, axis=axis - 1, tiled=True)


@jax.checkpoint
def _norm(x, scale):
    x = x - jnp.mean(x, -1, keepdims=True)
    x = x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-5)
    return x * scale[None, None]


def _entering(strategy, x):
    """Returns whole activations [B, T, E] for weights that are sharded over devices."""
    if strategy == "tensor":
        return _copied(x)
    return jax.lax.all_gather(x, AXIS, axis=1, tiled=True) if strategy == "megatron_sp" else x


def _leaving(strategy, x):
    """Returns the sum of the devices' partial outputs, or a device's shard of it."""
    if strategy == "tensor":
        return _summed(x)
    if strategy == "megatron_sp":
        return jax.lax.psum_scatter(x, AXIS, scatter_dimension=1, tiled=True)
    return x


def _mlp(strategy, s, w, x):
    hidden = jax.checkpoint(jax.nn.gelu)(jnp.einsum("bte,ef->btf", _entering(strategy, x), w["up"]))
    return _leaving(strategy, jnp.einsum("btf,fe->bte", hidden, w["down"]))


def _attend(strategy, s, w, x):
    q, k, v = jnp.moveaxis(jnp.einsum("bte,echd->btchd", _entering(strategy, x), w["qkv"]), 2, 0)
    if strategy in TENSOR:
        o = dense(q, k, v, s.causal) if s.stored else attention(q, k, v, mask=s.mask)
    elif strategy == "linformer":
        o = linformer(q, k, v, w["project"])
    elif strategy == "ring_self_attention":
        o = ring_self_attention(q, k, v, mask=s.mask, reduction=s.reduction)
    else:
        o = ATTENTION[strategy](q, k, v, mask=s.mask)
    return _leaving(strategy, jnp.einsum("bthd,hde->bte", o, w["out"]))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def dense(q: jax.Array, k: jax.Array, v: jax.Array, causal: bool) -> jax.Array:
    """Returns softmax(q k^T / sqrt(D)) v of [B, T, H, D]; its backward pass keeps the weights."""
    return _dense(q, k, v, causal)[0]


def _dense(q, k, v, causal):
    scores = jnp.einsum("bthd,bshd->bhts", q * q.shape[-1] ** -0.5, k)
    if causal:
        seen = jnp.tril(jnp.ones(scores.shape[2:], bool))
        scores = jnp.where(seen[None, None], scores, -jnp.inf)
    p = jax.nn.softmax(scores)
    return jnp.einsum("bhts,bshd->bthd", p, v), (q, k, v, p)


def _dense_bwd(causal, residuals, do):
    q, k, v, p = residuals
    dp = jnp.einsum("bthd,bshd->bhts", do, v)
    ds = p * (dp - jnp.sum(p * dp, -1, keepdims=True)) * q.shape[-1] ** -0.5
    return (
        jnp.einsum("bhts,bshd->bthd", ds, k),
        jnp.einsum("bhts,bthd->bshd", ds, q),
        jnp.einsum("bhts,bthd->bshd", p, do),
    )


dense.defvjp(_dense, _dense_bwd)


def linformer(q: jax.Array, k: jax.Array, v: jax.Array, project: jax.Array) -> jax.Array:
    """Attends to K rows, sums over time of keys and of values; inside `jax.shard_map`.

    Args:
      q, k, v: a device's [B, T, H, D].
      project: a device's columns of the two projections [2, K, T].
    """
    k, v = (
        _shared(jnp.einsum("kt,bthd->bkhd", p, x)) for p, x in zip(project, (k, v), strict=True)
    )
    return dense(q, k, v, False)


def embed(strategy: str, s: Shape, table: jax.Array, tokens: jax.Array) -> jax.Array:
    """Returns the embeddings [B, T, E] of a device's tokens [B, T]."""
    if strategy in TIME:
        if s.sharded_weights:
            table = jax.lax.all_gather(table, AXIS, axis=1, tiled=True)
        return jnp.take(table, tokens, axis=0)
    if strategy == "megatron_sp":
        tokens = jax.lax.all_gather(tokens, AXIS, axis=1, tiled=True)
    return _leaving(strategy, _own_rows(table, tokens))


def _own_rows(table, tokens):
    """Returns the rows of tokens [B, T] in this device's shard of the vocabulary, else zeros."""
    row = tokens - jax.lax.axis_index(AXIS) * table.shape[0]
    here = (0 <= row) & (row < table.shape[0])
    rows = jnp.take(table, jnp.clip(row, 0, table.shape[0] - 1), axis=0)
    return jnp.where(here[..., None], rows, 0)


def mean_loss(
    strategy: str, s: Shape, table: jax.Array, x: jax.Array, targets: jax.Array
) -> jax.Array:
    """Returns the mean cross-entropy of [B, T, E]; where time is sharded, a device's share of it.

    Raises:
      ValueError: s.head_chunk does not divide a device's tokens.
    """
    if strategy in TIME and s.sharded_weights:
        table = jax.lax.all_gather(table, AXIS, axis=1, tiled=True)
    T = x.shape[1]
    chunk = min(s.head_chunk or T, T)
    if T % chunk:
        raise ValueError(f"head_chunk={chunk} must divide the {T} tokens of a device")
    one = functools.partial(_cross_entropy, strategy, table)
    # Logits of one chunk exist at once; the backward pass computes them again.
    if chunk == T:
        total = one(x, targets)
    else:
        split = lambda a: jnp.moveaxis(a.reshape(a.shape[0], -1, chunk, *a.shape[2:]), 1, 0)
        add = lambda total, piece: (total + jax.checkpoint(one)(*piece), None)
        total, _ = jax.lax.scan(add, jnp.float32(0), (split(x), split(targets)))
    return total / (s.batch * s.length)


def _cross_entropy(strategy, table, x, targets):
    """Returns the sum over tokens; `table` is a shard of the vocabulary for TENSOR's strategies."""
    if strategy in TIME:
        logits = jnp.einsum("bte,ve->btv", x, table)
        picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        return jnp.sum(jax.nn.logsumexp(logits, axis=-1) - picked)
    # log Z and the target's logit are sums over the devices' shards of the vocabulary.
    if strategy == "megatron_sp":
        targets = jax.lax.all_gather(targets, AXIS, axis=1, tiled=True)
    logits = jnp.einsum("bte,ve->btv", _entering(strategy, x), table)
    peak = jax.lax.pmax(jnp.max(jax.lax.stop_gradient(logits), -1), AXIS)
    log_z = jnp.log(_summed(jnp.sum(jnp.exp(logits - peak[..., None]), -1))) + peak
    row = targets - jax.lax.axis_index(AXIS) * table.shape[0]
    here = (0 <= row) & (row < table.shape[0])
    row = jnp.clip(row, 0, table.shape[0] - 1)
    picked = jnp.take_along_axis(logits, row[..., None], axis=-1)[..., 0]
    return jnp.sum(log_z - _summed(jnp.where(here, picked, 0)))


@jax.custom_vjp
def _copied(x):
    """Returns x (Megatron's f): each device uses it with its own weights; gradients are summed."""
    return x


_copied.defvjp(lambda x: (x, None), lambda _, dx: (jax.lax.psum(dx, AXIS),))


@jax.custom_vjp
def _summed(x):
    """Returns the sum over devices (Megatron's g), whose gradient all of them have."""
    return jax.lax.psum(x, AXIS)


_summed.defvjp(lambda x: (jax.lax.psum(x, AXIS), None), lambda _, dx: (dx,))


@jax.custom_vjp
def _shared(x):
    """Returns the sum over devices, each with its own use for it: gradients are summed too."""
    return jax.lax.psum(x, AXIS)


_shared.defvjp(lambda x: (jax.lax.psum(x, AXIS), None), lambda _, dx: (jax.lax.psum(dx, AXIS),))
