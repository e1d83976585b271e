"""A Transformer's training step, cut over devices in the ways that the papers compare.

    tensor               Megatron's tensor parallelism: each device has some heads and some columns
                         of the MLP; activations between them are whole on every device
    megatron_sp          the same, with time cut between them: all-gather before attention and MLP,
                         reduce-scatter behind (arXiv 2205.05198)
    ring_self_attention, ring, ulysses, all_gather
                         time is cut everywhere, weights are whole; `ops.sequence_parallel`
    linformer            time is cut; keys and values are projected along time to a few rows, sums
                         of what each device has (arXiv 2006.04768; 2105.13120, section 3.3)

Plain functions of one device's part, for `jax.shard_map`; gradients are taken inside, so that what
is sent is what is written here. Pre-norm layers without biases or dropout, no positions. Of norms
and activation functions the backward pass keeps the inputs alone, of stored attention the weights,
as frameworks with fused ones do.

Letters: B batch, T time, E width, H heads, D head dim, F width of the MLP, V vocabulary, N layers,
K rows of projected keys.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from tilescan.experiments.measurements.devices import AXIS, mesh_of, struct
from tilescan.ops import masks
from tilescan.ops.attention import attention
from tilescan.ops.sequence_parallel import ATTENTION, ring_self_attention

TENSOR = ("tensor", "megatron_sp")
TIME = ("ring_self_attention", "ring", "ulysses", "all_gather", "linformer")
WAYS = (*TENSOR, *TIME)


@dataclasses.dataclass(frozen=True)
class Shape:
    """What is computed.

    Attributes:
      batch, length: B and T of the whole batch.
      layers, width, heads, mlp_dim, vocab: N, E, H, F (4 E if 0), V; without a vocabulary the
        input is [B, T, E] and the loss the sum of the outputs.
      blocks: of a layer: "attention", "mlp".
      residual: whether blocks are x + block(norm(x)), or block(x) alone.
      causal: what attention sees.
      stored: "tensor" and "megatron_sp" keep the whole matrix of scores, as RSA does; otherwise
        they attend in tiles. Rings and Ulysses always do.
      reduction: of ring_self_attention.
      remat: the backward pass computes layers again.
      sharded_weights: where weights would be whole, each device keeps a part and layers gather
        them (ZeRO-3).
      head_chunk: tokens of a device whose logits exist at once, 0: all.
      rows: K of linformer.
    """

    batch: int
    length: int
    layers: int
    width: int
    heads: int
    mlp_dim: int = 0
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
    def mask(self):
        return masks.Causal() if self.causal else masks.Full()


def weights(way: str, s: Shape) -> dict[str, tuple]:
    """{name: (shape, the dimension that devices share or None)}."""
    N, E, H, F = s.layers, s.width, s.heads, s.mlp_dim or 4 * s.width
    shapes = {"norms": (N, 2, E)} if s.residual else {}
    if "attention" in s.blocks:
        shapes |= {"qkv": (N, E, 3, H, E // H), "out": (N, H, E // H, E)}
    if "mlp" in s.blocks:
        shapes |= {"up": (N, E, F), "down": (N, F, E)}
    if s.vocab:
        shapes["embedding"] = (s.vocab, E)
    cut = dict.fromkeys(shapes)
    if way in TENSOR:
        cut |= {"qkv": 3, "out": 1, "up": 2, "down": 1, "embedding": 0}
    elif s.sharded_weights:
        cut |= {"qkv": 1, "out": 3, "up": 1, "down": 2, "embedding": 1}
    if way == "linformer":
        shapes["project"], cut["project"] = (N, 2, s.rows, s.length), 3
    return {name: (shape, cut[name]) for name, shape in shapes.items()}


def weight_bytes(way: str, s: Shape, count: int) -> int:
    """Of one device's float32 weights."""
    return sum(
        4 * math.prod(shape) // (1 if axis is None else count)
        for shape, axis in weights(way, s).values()
    )


def program(way: str, s: Shape, count: int, what: str = "step", run=None):
    """(function, its arguments' shapes) for `count` devices, to be compiled.

    Args:
      way: of WAYS.
      s: the shape; without a vocabulary for "forward" and "inputs".
      count: devices.
      what: "forward" the layers' output; "inputs" that and the gradient of their input; "step"
        the loss and the gradients of all weights, and of the input if there is no vocabulary.
      run: a function (way, s, params, data) of one device in place of that, with its results.

    Raises:
      ValueError: an unknown way; heads, or time, that the devices do not divide.
    """
    check(way, s, count)
    mesh = mesh_of(count)
    time = P() if way == "tensor" else P(None, AXIS)
    names = weights(way, s)
    spec = {name: _spec(axis) for name, (_, axis) in names.items()}
    params = {name: struct(mesh, shape, *spec[name]) for name, (shape, _) in names.items()}
    if s.vocab:
        tokens = struct(mesh, (s.batch, s.length), *time, dtype="int32")
        data = {"tokens": tokens, "targets": tokens}
    else:
        data = {"x": struct(mesh, (s.batch, s.length, s.width), *time)}
    run = run or {"forward": _forward, "inputs": _inputs, "step": _step}[what]
    results = {
        "forward": time,
        "inputs": (time, time),
        "step": (P(), spec, None if s.vocab else time),
    }
    call = jax.shard_map(
        functools.partial(run, way, s),
        mesh=mesh,
        in_specs=(spec, dict.fromkeys(data, time)),
        out_specs=results[what],
        check_vma=False,
    )
    return call, (params, data)


def kept_bytes(way: str, s: Shape, count: int) -> int:
    """Bytes that one device keeps from the forward pass for the backward pass, but weights."""
    kept = []

    def run(way, s, params, data):
        y, pull = jax.vjp(lambda p, x: _layers(way, s, p, x), params, data["x"])
        kept.extend(x for x in jax.tree.leaves(pull) if hasattr(x, "shape"))
        return y

    function, arguments = program(way, s, count, "forward", run)
    jax.eval_shape(function, *arguments)
    size = sum(math.prod(x.shape) * x.dtype.itemsize for x in kept)
    return size - weight_bytes(way, s, count)


def check(way: str, s: Shape, count: int) -> None:
    """Raises ValueError unless `count` devices can share the shape in this way."""
    if way not in WAYS:
        raise ValueError(f"way={way!r} is unknown; it must be one of {', '.join(WAYS)}")
    if way in (*TENSOR, "ulysses") and s.heads % count and "attention" in s.blocks:
        raise ValueError(f"{way} gives devices whole heads: {count} must divide heads={s.heads}")
    if way != "tensor" and s.length % count:
        raise ValueError(f"length={s.length} must be a multiple of the {count} devices")


def _spec(axis):
    return P() if axis is None else P(*[None] * axis, AXIS)


def _forward(way, s, params, data):
    return _layers(way, s, params, data["x"])


def _inputs(way, s, params, data):
    y, pull = jax.vjp(lambda x: _layers(way, s, params, x), data["x"])
    return y, pull(jnp.ones_like(y))[0]


def _step(way, s, params, data):
    """(loss, gradients of the weights, gradient of x or None)."""

    def loss(params, x):
        if not s.vocab:
            return jnp.sum(_layers(way, s, params, x))
        x = _embed(way, s, params["embedding"], data["tokens"])
        return _head(way, s, params["embedding"], _layers(way, s, params, x), data["targets"])

    value, (grads, dx) = jax.value_and_grad(loss, (0, 1))(params, data.get("x", 0.0))
    if way != "tensor":
        # Of whole weights a device has the gradient of its own tokens.
        cut = {name: axis for name, (_, axis) in weights(way, s).items()}
        grads = {k: g if cut[k] is not None else jax.lax.psum(g, AXIS) for k, g in grads.items()}
    if way in TIME or not (s.vocab or way == "tensor"):
        value = jax.lax.psum(value, AXIS)
    return value, grads, None if s.vocab else dx


def _layers(way, s, params, x):
    stacked = {k: w for k, w in params.items() if k != "embedding"}

    def layer(x, w):
        if way in TIME and s.sharded_weights:
            w = {k: _gathered(k, way, s, v) for k, v in w.items()}
        for i, block in enumerate(s.blocks):
            run = _attend if block == "attention" else _mlp
            if s.residual:
                x = x + run(way, s, w, _norm(x, w["norms"][i]))
            else:
                x = run(way, s, w, x)
        return x, None

    return jax.lax.scan(jax.checkpoint(layer) if s.remat else layer, x, stacked)[0]


def _gathered(name, way, s, w):
    """A layer's whole weight of the devices' parts."""
    axis = weights(way, s)[name][1]
    if axis is None or name == "project":
        return w
    return jax.lax.all_gather(w, AXIS, axis=axis - 1, tiled=True)


@jax.checkpoint
def _norm(x, scale):
    x = x - jnp.mean(x, -1, keepdims=True)
    x = x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-5)
    return x * scale[None, None]


def _enter(way, x):
    """Whole activations [B, T, E] in front of weights that devices share."""
    if way == "tensor":
        return _copied(x)
    return jax.lax.all_gather(x, AXIS, axis=1, tiled=True) if way == "megatron_sp" else x


def _leave(way, x):
    """The sum of the devices' parts of an output."""
    if way == "tensor":
        return _summed(x)
    if way == "megatron_sp":
        return jax.lax.psum_scatter(x, AXIS, scatter_dimension=1, tiled=True)
    return x


def _mlp(way, s, w, x):
    hidden = jax.checkpoint(jax.nn.gelu)(jnp.einsum("bte,ef->btf", _enter(way, x), w["up"]))
    return _leave(way, jnp.einsum("btf,fe->bte", hidden, w["down"]))


def _attend(way, s, w, x):
    q, k, v = jnp.moveaxis(jnp.einsum("bte,echd->btchd", _enter(way, x), w["qkv"]), 2, 0)
    if way in TENSOR:
        o = dense(q, k, v, s.causal) if s.stored else attention(q, k, v, mask=s.mask)
    elif way == "linformer":
        o = linformer(q, k, v, w["project"])
    elif way == "ring_self_attention":
        o = ring_self_attention(q, k, v, mask=s.mask, reduction=s.reduction)
    else:
        o = ATTENTION[way](q, k, v, mask=s.mask)
    return _leave(way, jnp.einsum("bthd,hde->bte", o, w["out"]))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def dense(q, k, v, causal: bool):
    """softmax(q k^T / sqrt(D)) v of [B, T, H, D], whose weights are kept for the backward pass."""
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


def linformer(q, k, v, project):
    """Attention to K rows, sums over time of keys and of values; inside `jax.shard_map`.

    Args:
      q, k, v: a device's [B, T, H, D].
      project: a device's columns of the two projections [2, K, T].
    """
    k, v = (
        _shared(jnp.einsum("kt,bthd->bkhd", p, x)) for p, x in zip(project, (k, v), strict=True)
    )
    return dense(q, k, v, False)


def _embed(way, s, table, tokens):
    if way in TIME:
        if s.sharded_weights:
            table = jax.lax.all_gather(table, AXIS, axis=1, tiled=True)
        return jnp.take(table, tokens, axis=0)
    if way == "megatron_sp":
        tokens = jax.lax.all_gather(tokens, AXIS, axis=1, tiled=True)
    return _leave(way, _own_rows(table, tokens))


def _own_rows(table, tokens):
    """The rows of tokens [B, T] that this device's part of the vocabulary has; zeros for others."""
    row = tokens - jax.lax.axis_index(AXIS) * table.shape[0]
    here = (0 <= row) & (row < table.shape[0])
    rows = jnp.take(table, jnp.clip(row, 0, table.shape[0] - 1), axis=0)
    return jnp.where(here[..., None], rows, 0)


def _head(way, s, table, x, targets):
    """Mean cross-entropy of [B, T, E]; where time is cut, a device's part of it."""
    if way in TIME and s.sharded_weights:
        table = jax.lax.all_gather(table, AXIS, axis=1, tiled=True)
    T = x.shape[1]
    chunk = min(s.head_chunk or T, T)
    if T % chunk:
        raise ValueError(f"head_chunk={chunk} must divide the {T} tokens of a device")
    one = functools.partial(_cross_entropy, way, table)
    if chunk == T:
        total = one(x, targets)
    else:
        cut = lambda a: jnp.moveaxis(a.reshape(a.shape[0], T // chunk, chunk, *a.shape[2:]), 1, 0)
        add = lambda total, part: (total + jax.checkpoint(one)(*part), None)
        total, _ = jax.lax.scan(add, jnp.float32(0), (cut(x), cut(targets)))
    return total / (s.batch * s.length)


def _cross_entropy(way, table, x, targets):
    """Summed over tokens; `table` is the device's part of the vocabulary in TENSOR's ways."""
    if way in TIME:
        logits = jnp.einsum("bte,ve->btv", x, table)
        picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        return jnp.sum(jax.nn.logsumexp(logits, axis=-1) - picked)
    if way == "megatron_sp":
        targets = jax.lax.all_gather(targets, AXIS, axis=1, tiled=True)
    logits = jnp.einsum("bte,ve->btv", _enter(way, x), table)
    peak = jax.lax.pmax(jnp.max(jax.lax.stop_gradient(logits), -1), AXIS)
    log_z = jnp.log(_summed(jnp.sum(jnp.exp(logits - peak[..., None]), -1))) + peak
    row = targets - jax.lax.axis_index(AXIS) * table.shape[0]
    here = (0 <= row) & (row < table.shape[0])
    row = jnp.clip(row, 0, table.shape[0] - 1)
    picked = jnp.take_along_axis(logits, row[..., None], axis=-1)[..., 0]
    return jnp.sum(log_z - _summed(jnp.where(here, picked, 0)))


@jax.custom_vjp
def _copied(x):
    """Megatron's f: what all devices have, each for its own weights; gradients are summed."""
    return x


_copied.defvjp(lambda x: (x, None), lambda _, dx: (jax.lax.psum(dx, AXIS),))


@jax.custom_vjp
def _summed(x):
    """Megatron's g: a sum over devices, whose gradient all of them have."""
    return jax.lax.psum(x, AXIS)


_summed.defvjp(lambda x: (jax.lax.psum(x, AXIS), None), lambda _, dx: (dx,))


@jax.custom_vjp
def _shared(x):
    """A sum over devices that each uses for its own tokens: gradients are summed as well."""
    return jax.lax.psum(x, AXIS)


_shared.defvjp(lambda x: (jax.lax.psum(x, AXIS), None), lambda _, dx: (jax.lax.psum(dx, AXIS),))
