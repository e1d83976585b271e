"""Attention as a token mixer: heads, positions and a key-value cache around `ops.attention`.

Dimensions: B batch, T query time, S key time, H heads, G key-value heads, D head dim, E embedding.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Integer

from tilescan.models import positions as positions_lib
from tilescan.models.layers import RMSNorm, linear, scaled_fan_in
from tilescan.models.module import Module
from tilescan.models.recurrent import check_mixer_inputs
from tilescan.ops import masks
from tilescan.ops.attention import attention, decode_attention
from tilescan.ops.mesh_axes import sequence_devices
from tilescan.ops.partitioned import partitioned, partitioned_decode

# Up to this many queries against a cache are split over keys instead of over queries.
DECODE_QUERIES = 8


class KVCache(NamedTuple):
    """Keys and values of the tokens so far; slot s of a row holds its s-th token.

    Rows may have different lengths: setting `length` lower forgets the last tokens of a row. What
    slots from `length` on hold, also NaN, is never seen.
    """

    k: Float[Array, "B S G D"]
    v: Float[Array, "B S G D"]
    segment_ids: Integer[Array, "B S"]
    length: Integer[Array, " B"]

    @classmethod
    def create(
        cls, batch: int, max_len: int, n_kv_heads: int, head_dim: int, dtype: Any
    ) -> "KVCache":
        """Returns the cache of [batch] rows without tokens, with max_len slots each."""
        kv = jnp.zeros((batch, max_len, n_kv_heads, head_dim), dtype)
        ids = jnp.zeros((batch, max_len), jnp.int32)
        return cls(kv, kv, ids, jnp.zeros((batch,), jnp.int32))

    def filled_ids(self, ids: Integer[Array, "B T"] | None) -> Integer[Array, "B S"]:
        """Returns the slots' ids (1 if ids is None), empty slots having one that ids don't hold."""
        filled = jnp.arange(self.k.shape[1])[None] < self.length[:, None]
        if ids is None:
            return filled.astype(jnp.int32)
        least, most = jnp.min(ids, axis=1), jnp.max(ids, axis=1)
        none = jnp.where(least > jnp.iinfo(ids.dtype).min, least - 1, most + 1)
        return jnp.where(filled, self.segment_ids, none[:, None])

    def append(
        self, k: Float[Array, "B T G D"], v: Float[Array, "B T G D"], ids: Integer[Array, "B T"]
    ) -> "KVCache":
        """Returns the cache with T more tokens, after the last of each row.

        Raises:
          ValueError: if T tokens never fit (a full row is seen only when the program runs).
        """
        T, S = k.shape[1], self.k.shape[1]
        if T > S:
            raise ValueError(
                f"{T} new tokens don't fit a cache of max_len={S}; init_state(batch, {T}) or more"
            )

        def write(row, new, start):
            return jax.lax.dynamic_update_slice_in_dim(row, new.astype(row.dtype), start, axis=0)

        put = jax.vmap(write)
        return KVCache(
            put(self.k, k, self.length),
            put(self.v, v, self.length),
            put(self.segment_ids, ids, self.length),
            self.length + T,
        )


class Attention(Module):
    """Multi-head, grouped-query or multi-query attention with any mask of `ops.masks`.

    Attributes:
      n_heads, n_kv_heads, head_dim: H, G and D; G must divide H.
      mask: what a query sees; packed `segment_ids` are added to it. Default: Causal() or Full().
      causal: whether a query sees only the past, where no mask is given.
      position: a kind of `positions.POSITION_KINDS`; "learned" and "none" do nothing here.
      rope_theta, rope_scaling: of the rotary kinds.
      qk_norm: RMSNorm over D of queries and keys, before the rotation.
      scale: of the logits, default D ** -0.5.
      logit_cap: soft cap of the logits.
      use_bias: whether the four linear maps have biases.
      out_scale: multiplies the standard deviation of the output's initial weights.
      implementation: of `ops.attention`, which every device of a mesh in use (`jax.set_mesh`)
        calls for its own rows and heads; see `ops.partitioned`. Or a function to call in place of
        `ops.attention`, with its arguments; short decoding steps do not.
      sequence_parallel, sequence_balance: how devices that share a sequence exchange keys and
        values (a name of `ATTENTION_KINDS` or `TPU_ATTENTION_KINDS` in `ops.sequence_parallel`),
        and in which order the tokens then are. With a state, time is not sharded.
    """

    n_heads: int
    n_kv_heads: int
    head_dim: int
    mask: masks.Mask | None = None
    causal: bool = True
    position: str = "rope"
    rope_theta: float = 10000.0
    rope_scaling: positions_lib.RopeScaling | None = None
    qk_norm: bool = False
    norm_eps: float = 1e-6
    scale: float | None = None
    logit_cap: float | None = None
    use_bias: bool = False
    out_scale: float = 1.0
    implementation: str | Callable | None = None
    sequence_parallel: str = "ring"
    sequence_balance: str = "contiguous"
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @property
    def sees(self) -> masks.Mask:
        """What a query sees within its segment."""
        if self.mask is not None:
            return self.mask
        return masks.Causal() if self.causal else masks.Full()

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T E"],
        *,
        state: KVCache | None = None,
        positions: Integer[Array, "B T"] | None = None,
        segment_ids: Integer[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T E"], KVCache | None]:
        """Mixes T tokens, as `models.mixers` says; a row that outgrows the state becomes NaN."""
        check_mixer_inputs(x, positions=positions, segment_ids=segment_ids)
        B, T, E = x.shape
        # Queries, keys and values, by position.
        q = self._project("query", self.n_heads, "heads")(x)
        k = self._project("key", self.n_kv_heads, "kv_heads")(x)
        v = self._project("value", self.n_kv_heads, "kv_heads")(x)
        if self.qk_norm:
            norm = dict(eps=self.norm_eps, dtype=self.dtype, param_dtype=self.param_dtype)
            q, k = RMSNorm(name="query_norm", **norm)(q), RMSNorm(name="key_norm", **norm)(k)
        if self.position.startswith("rope"):
            if positions is None:
                positions = positions_lib.token_positions(
                    B, T, start=None if state is None else state.length
                )
            rope = dict(
                theta=self.rope_theta,
                interleaved=self.position == "rope_interleaved",
                scaling=self.rope_scaling,
            )
            q = positions_lib.apply_rope(q, positions, **rope)
            k = positions_lib.apply_rope(k, positions, **rope)

        # Attention among the new tokens, or also to those in the cache.
        if state is None:
            self._check_balance()
            split = dict(sequence_parallel=self.sequence_parallel, balance=self.sequence_balance)
            o = self._attend(q, k, v, segment_ids, segment_ids, 0, **split)
        else:
            o, state = self._extend(q, k, v, segment_ids, state)
        out = linear(
            E,
            ("heads", "head_dim", "embed"),
            inputs=2,
            use_bias=self.use_bias,
            init=scaled_fan_in(self.out_scale),
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            name="out",
        )
        return out(o), state

    @nn.nowrap
    def init_state(self, batch: int, max_len: int) -> KVCache:
        """Returns an empty cache of max_len slots in each of [batch] rows."""
        return KVCache.create(batch, max_len, self.n_kv_heads, self.head_dim, self.dtype)

    def _project(self, name: str, heads: int, axis: str) -> nn.DenseGeneral:
        return linear(
            (heads, self.head_dim),
            ("embed", axis, "head_dim"),
            use_bias=self.use_bias,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            name=name,
        )

    def _options(self, T: int, S: int, q_offset: int | Array) -> dict[str, Any]:
        options = dict(scale=self.scale, logit_cap=self.logit_cap)
        if self.position == "alibi":
            options["bias"] = positions_lib.alibi_bias(
                self.n_heads, T, S, q_offset, causal=sees_only_past(self.sees)
            )
        return options

    def _check_balance(self) -> None:
        """ALiBi's biases count columns, which is right for tokens in their order alone."""
        moved = self.sequence_balance != "contiguous" and sequence_devices() > 1
        if moved and self.position == "alibi":
            raise ValueError(
                f"sequence_balance={self.sequence_balance!r} moves tokens, which position='alibi' "
                "can't follow; use sequence_balance='contiguous' or another position"
            )

    def _attend(self, q, k, v, q_ids, kv_ids, q_offset, **split) -> Float[Array, "B T H D"]:
        mask = self.sees if q_ids is None else self.sees & masks.Segments(q_ids, kv_ids)
        op, options = attention, {"implementation": self.implementation}
        if callable(self.implementation):
            op, options = self.implementation, {}
        return partitioned(
            op,
            q,
            k,
            v,
            mask=mask,
            q_offset=q_offset,
            **options,
            **split,
            **self._options(q.shape[1], k.shape[1], q_offset),
        )

    def _extend(self, q, k, v, ids, state: KVCache) -> tuple[Float[Array, "B T H D"], KVCache]:
        """Attention of T new tokens to themselves and to everything in the cache."""
        (B, T), S = q.shape[:2], state.k.shape[1]
        packed = ids is not None
        slots = ids.astype(jnp.int32) if packed else jnp.ones((B, T), jnp.int32)
        ids = slots if packed else None
        if T <= DECODE_QUERIES and sequence_devices() > 1:
            caches = state.k, state.v, state.segment_ids
            o, caches = partitioned_decode(
                q, (k, v, slots), caches, state.length, mask=self.sees, ids=ids,
                **self._options(T, S, state.length),
            )  # fmt: skip
            new = KVCache(*caches, state.length + T)
        elif T <= DECODE_QUERIES:
            new = state.append(k, v, slots)
            mask = self.sees & masks.Segments(ids, new.segment_ids) if packed else self.sees
            options = self._options(T, S, state.length)
            o = decode_attention(q, new.k, new.v, lengths=new.length, mask=mask, **options)
        else:
            new = state.append(k, v, slots)
            kv_ids = new.segment_ids if packed else None
            if not sees_only_past(self.sees):
                kv_ids, ids = new.filled_ids(ids), slots  # hides the slots still empty
            o = self._attend_rows(q, new, ids, kv_ids, state.length)
        # Writing past the end would move the slice and give plausible, wrong numbers.
        full = (new.length > S)[:, None, None, None]
        return jnp.where(full, jnp.nan, o).astype(o.dtype), new

    def _attend_rows(self, q, cache: KVCache, ids, kv_ids, start) -> Float[Array, "B T H D"]:
        """One call if all rows of the cache are equally long, else row by row."""
        k, v = cache.k, cache.v

        def together():
            return self._attend(q, k, v, ids, kv_ids, start[0])

        def one(row):
            q, k, v, ids, kv_ids, start = row
            add = lambda a: None if a is None else a[None]
            return self._attend(add(q), add(k), add(v), add(ids), add(kv_ids), start)[0]

        if q.shape[0] == 0:  # without rows there is no start
            return self._attend(q, k, v, ids, kv_ids, 0)
        if q.shape[0] == 1:
            return together()
        return jax.lax.cond(
            jnp.all(start == start[0]),
            together,
            lambda: jax.lax.map(one, (q, k, v, ids, kv_ids, start)),
        )


class LocalAttention(Attention):
    """Attention within a window, and of what a `mask` shows, if one is given.

    Attributes:
      window: a query sees itself and the window - 1 tokens before it; without `causal` also the
        window - 1 tokens after it.
      sinks: the first tokens, which every later one sees too (arXiv 2309.17453).
    """

    window: int | None = None
    sinks: int = 0

    @property
    def sees(self) -> masks.Mask:
        """What a query sees within its segment."""
        if self.window is None:
            raise ValueError("LocalAttention needs window, e.g. window=256")
        if self.sinks:
            near: masks.Mask = masks.Lambda(self.sinks, self.window)
        else:
            near = masks.SlidingWindow(self.window - 1, 0 if self.causal else self.window - 1)
        return near if self.mask is None else self.mask & near


def sees_only_past(mask: masks.Mask) -> bool:
    """Returns whether the mask is causal by its construction (False if it can't be told)."""
    match mask:
        case masks.Causal() | masks.Lambda():
            return True
        case masks.SlidingWindow():
            return mask.right is not None and mask.right <= 0
        case masks.And():
            return any(sees_only_past(part) for part in mask.masks)
        case masks.Or():
            return all(sees_only_past(part) for part in mask.masks)
    return False
