"""Language models and classifiers from a repeating pattern of blocks.

Dimensions: B batch, T time, E embedding, V vocabulary, L repeats of the pattern.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Integer

from tilescan.models.blocks import REPEAT_INPUT, Repeat, init_state, make_norm
from tilescan.models.config import LanguageModelConfig
from tilescan.models.layers import Embedding, linear
from tilescan.models.module import Module
from tilescan.models.positions import token_positions
from tilescan.ops.explicit_axes import spec
from tilescan.ops.mesh_axes import sequence_devices

REMAT_POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_saveable,
    "dots_no_batch": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[REPEAT_INPUT],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}


class ModelState(NamedTuple):
    """What a model carries from one call to the next.

    layers: the mixers' states, stacked over the repeats; position: of the next token, 0 before the
    first; segment: of the last token, before the first any (nothing is carried over from there).
    """

    layers: tuple[Any, ...]
    position: Integer[Array, " B"]
    segment: Integer[Array, " B"]


class Configured(Module):
    """A module of a `LanguageModelConfig`; anything else is refused where the module is made."""

    config: LanguageModelConfig

    def __post_init__(self) -> None:
        """Checks the configuration's type.

        Raises:
          TypeError: another type, such as a dict.
        """
        if not isinstance(self.config, LanguageModelConfig):
            fields = hasattr(self.config, "keys")
            raise TypeError(
                f"{type(self).__name__} takes a LanguageModelConfig, not a "
                f"{type(self.config).__name__}"
                + ("; write LanguageModelConfig(**config)" if fields else "")
            )
        super().__post_init__()


class Backbone(Configured):
    """Tokens to normalized vectors: everything of a model but its head."""

    config: LanguageModelConfig

    def setup(self) -> None:
        """Makes the embedding, the scan over repeats of the pattern, and the last norm."""
        config = self.config
        dtypes = dict(dtype=config.dtype, param_dtype=config.param_dtype)
        if config.input_features is None:
            self.embed = Embedding(config.vocab_size, config.d_model, **dtypes)
        else:
            self.embed = linear(config.d_model, ("inputs", "embed"), use_bias=True, **dtypes)
        if config.position == "learned":
            axes = ("position", "embed")
            self.position = Embedding(config.max_len, config.d_model, axes=axes, **dtypes)
        body = Repeat
        if config.remat != "none":
            policy = REMAT_POLICIES[config.remat]
            body = nn.remat(body, policy=policy, prevent_cse=not config.scan_layers)
        if config.scan_layers:
            self.layers = nn.scan(
                body,
                variable_axes={"params": 0, "intermediates": 0},
                split_rngs={"params": True, "dropout": True},
                in_axes=(0, nn.broadcast, nn.broadcast),
                out_axes=0,
                length=config.repeats,
                metadata_params={nn.PARTITION_NAME: "layers"},
            )(config)
        else:
            self.layers = [body(config) for _ in range(config.repeats)]
        self.final_norm = make_norm(config, "final_norm")

    def __call__(
        self,
        tokens: Integer[Array, "B T"] | Float[Array, "B T F"],
        *,
        state: ModelState | None = None,
        positions: Integer[Array, "B T"] | None = None,
        segment_ids: Integer[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T E"], ModelState | None]:
        """Returns the vectors that the head takes, and the new state; see `LanguageModel`."""
        config = self.config
        _check(config, tokens, positions=positions, segment_ids=segment_ids)
        B, T = tokens.shape[:2]
        # Whatever the call's integers are, a state's are int32.
        positions, segment_ids = (
            None if x is None else x.astype(jnp.int32) for x in (positions, segment_ids)
        )
        if positions is None:
            _check_order(config)
            carried = (None, None) if state is None else (state.position, state.segment)
            positions = token_positions(B, T, segment_ids, *carried)
        # The embedding; the layers; the state for what comes next.
        x = self.embedded(tokens, positions)
        x, layers = self._run_layers(x, state, positions, segment_ids)
        if state is not None:
            last = jnp.zeros((B,), jnp.int32) if segment_ids is None else segment_ids[:, -1]
            state = ModelState(layers, positions[:, -1] + 1, last)
        return self.final_norm(x), state

    def embedded(
        self,
        tokens: Integer[Array, "B T"] | Float[Array, "B T F"],
        positions: Integer[Array, "B T"],
    ) -> Float[Array, "B T E"]:
        """Returns what the first layer takes: the tokens' vectors, with learned positions."""
        x = self.embed(tokens)
        if self.config.embed_scale is not None:
            x = x * jnp.asarray(self.config.embed_scale, x.dtype)
        if self.config.position == "learned":
            x = x + self.position(positions)
        return x

    def _run_layers(
        self,
        x: Float[Array, "B T E"],
        state: ModelState | None,
        positions: Integer[Array, "B T"],
        segment_ids: Integer[Array, "B T"] | None,
    ) -> tuple[Any, Any]:
        states = None if state is None else state.layers
        if self.config.scan_layers:
            return self.layers(x, states, positions, segment_ids)
        new = []
        for i, layer in enumerate(self.layers):
            x, s = layer(x, jax.tree.map(lambda a, i=i: a[i], states), positions, segment_ids)
            new.append(s)
        return x, None if state is None else jax.tree.map(lambda *a: jnp.stack(a), *new)


class LanguageModel(Configured):
    """Scores of the next token at every position.

        config = LanguageModelConfig(vocab_size=256, d_model=128, repeats=4, n_heads=4)
        model = LanguageModel(config)
        params = nn.unbox(model.init(jax.random.key(0), tokens))["params"]
        logits, _ = model.apply({"params": params}, tokens)

    With `state=model.init_state(batch, max_len)` the same call reads on from where the last one
    stopped, be it one token (decoding) or many.
    """

    config: LanguageModelConfig

    def setup(self) -> None:
        """Makes the backbone and, unless it is tied, the head.

        Raises:
          ValueError: tied embeddings of a model without embeddings.
        """
        config = self.config
        if config.input_features is not None and config.tie_embeddings:
            raise ValueError(
                f"input_features={config.input_features} leaves no embedding to tie the head to; "
                "set tie_embeddings=False"
            )
        self.backbone = Backbone(config)
        if not config.tie_embeddings:
            self.head = linear(
                config.vocab_size,
                ("embed", "vocab"),
                dtype=config.dtype,
                param_dtype=config.param_dtype,
            )

    def __call__(
        self,
        tokens: Integer[Array, "B T"] | Float[Array, "B T F"],
        *,
        state: ModelState | None = None,
        positions: Integer[Array, "B T"] | None = None,
        segment_ids: Integer[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T V"], ModelState | None]:
        """Reads T tokens.

        Args:
          tokens: ids in [0, vocab_size); outside it the output is NaN. With `input_features`, real
            numbers [B, T, F].
          state: from `init_state` or an earlier call.
          positions: default: counted from the state on, anew in each segment.
          segment_ids: tokens see only those of their own id. With a state give them at every
            call or at none.

        Returns:
          (float32 logits, the new state or None).

        Raises:
          ValueError: for shapes that are not [B, T] (or [B, T, F]), or more tokens than learned
            positions.
          TypeError: for positions or segment_ids that are not integers.
        """
        x, state = self.backbone(tokens, state=state, positions=positions, segment_ids=segment_ids)
        return self.logits(x), state

    def hidden(
        self,
        tokens: Integer[Array, "B T"] | Float[Array, "B T F"],
        *,
        state: ModelState | None = None,
        positions: Integer[Array, "B T"] | None = None,
        segment_ids: Integer[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T E"], ModelState | None]:
        """Returns the vectors that `logits` takes, and the new state: for losses by chunks."""
        return self.backbone(tokens, state=state, positions=positions, segment_ids=segment_ids)

    def logits(self, x: Float[Array, "... T E"]) -> Float[Array, "... T V"]:
        """Returns the head's float32 scores of vectors."""
        config = self.config
        if config.tie_embeddings:
            logits = self.backbone.embed.logits(x)
        else:
            logits = self.head(x).astype(jnp.float32)
        if config.logit_scale is not None:
            logits = logits * config.logit_scale
        if config.logit_cap is not None:
            logits = config.logit_cap * jnp.tanh(logits / config.logit_cap)
        return logits

    def embedded(
        self, tokens: Integer[Array, "B T"], positions: Integer[Array, "B T"]
    ) -> Float[Array, "B T E"]:
        """Returns what the first layer takes: for callers that run the layers one by one."""
        return self.backbone.embedded(tokens, positions)

    def scores(self, x: Float[Array, "B T E"]) -> Float[Array, "B T V"]:
        """Returns float32 logits of what the last layer gives: the last norm and the head."""
        return self.logits(self.backbone.final_norm(x))

    @nn.nowrap
    def output_spec(self, variables: Any, x: Array, y: Array) -> PartitionSpec:
        """Returns how y is sharded: logits along the vocabulary, where the head is."""
        entries = super().output_spec(variables, x, y)
        params = nn.unbox(variables["params"])
        vocab = spec(params["head"]["kernel"])[1] if "head" in params else None
        if self.config.tie_embeddings:
            vocab = spec(params["backbone"]["embed"]["embedding"])[0]
        if y.shape[-1] != self.config.vocab_size or len(entries) >= y.ndim or vocab in entries:
            return entries
        return PartitionSpec(*entries, *(None,) * (y.ndim - 1 - len(entries)), vocab)

    @nn.nowrap
    def init_state(self, batch: int, max_len: int) -> ModelState:
        """Returns the state before the first token, with room for `max_len` tokens."""
        one, repeats = init_state(self.config, batch, max_len), self.config.repeats
        layers = jax.tree.map(lambda a: jnp.broadcast_to(a[None], (repeats, *a.shape)), one)
        return ModelState(layers, jnp.zeros((batch,), jnp.int32), jnp.full((batch,), -1, jnp.int32))


class SequenceClassifier(Configured):
    """Scores of a whole sequence's classes, from the same backbone.

    Attributes:
      config: of the backbone; causal=False reads both ways.
      n_classes: how many.
      pooling: "mean" of all real tokens, or the "last" one.
    """

    config: LanguageModelConfig
    n_classes: int
    pooling: str = "mean"

    @nn.compact
    def __call__(
        self,
        tokens: Integer[Array, "B T"] | Float[Array, "B T F"],
        *,
        positions: Integer[Array, "B T"] | None = None,
        segment_ids: Integer[Array, "B T"] | None = None,
    ) -> Float[Array, "B n_classes"]:
        """Classifies one sequence per row; `segment_ids` is 0 at padding and 1 elsewhere.

        With `input_features` it is a sequence of vectors [B, T, F] of real numbers.

        Raises:
          ValueError: an unknown `pooling`, or shapes as `LanguageModel` refuses them.
        """
        if self.pooling not in ("mean", "last"):
            raise ValueError(f"pooling={self.pooling!r} is unknown; it can be 'mean' or 'last'")
        config = self.config
        x, _ = Backbone(config, name="backbone")(
            tokens, positions=positions, segment_ids=segment_ids
        )
        # Weights of tokens: equal for all real ones, or 1 for the last of them.
        real = jnp.ones(tokens.shape[:2], bool) if segment_ids is None else segment_ids > 0
        if self.pooling == "mean":
            weights = real.astype(jnp.float32)
        else:
            index = jnp.arange(tokens.shape[1])[None]
            last = jnp.max(jnp.where(real, index, -1), axis=1, keepdims=True)
            weights = (index == last).astype(jnp.float32)
        # The weighted mean, and the map to classes.
        total = jnp.maximum(jnp.sum(weights, axis=1, keepdims=True), 1.0)
        pooled = jnp.einsum("bte,bt->be", x.astype(jnp.float32), weights / total)
        head = linear(
            self.n_classes,
            ("embed", "classes"),
            use_bias=True,
            param_dtype=config.param_dtype,
            name="head",
        )
        return head(pooled)


def init_params(config: LanguageModelConfig, seed: int) -> Any:
    """Returns the parameters of a language model at the start of its training, without boxes."""
    tokens = jnp.zeros((1, 2), jnp.int32)
    init = jax.jit(LanguageModel(config).init)
    return nn.unbox(init(jax.random.key(seed), tokens))["params"]


def abstract_params(config: LanguageModelConfig) -> Any:
    """Returns the shapes and dtypes of a language model's parameters; nothing is allocated."""
    return jax.eval_shape(lambda: init_params(config, 0))


def count_params(params: Any) -> int:
    """Returns the number of scalars in a tree of parameters (or of their shapes)."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(nn.unbox(params)))


def unroll_params(config: LanguageModelConfig, params: Any) -> dict[str, Any]:
    """Returns the parameters of `scan_layers=True` as those of `scan_layers=False`."""
    backbone = dict(nn.unbox(params)["backbone"])
    stacked = backbone.pop("layers")
    for i in range(config.repeats):
        backbone[f"layers_{i}"] = jax.tree.map(lambda a, i=i: a[i], stacked)
    return {**nn.unbox(params), "backbone": backbone}


def _check_order(config: LanguageModelConfig) -> None:
    """Positions can't be counted where tokens are not in their order."""
    if config.sequence_balance != "contiguous" and sequence_devices() > 1:
        raise ValueError(
            f"sequence_balance={config.sequence_balance!r} needs positions, in the order of the "
            "tokens: see ops.sequence_parallel.layouts.order"
        )


def _check(config: LanguageModelConfig, tokens, **per_token) -> None:
    F = config.input_features
    if F is None and (tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer)):
        raise ValueError(
            f"tokens must be integers [batch, time], got {tokens.dtype} of shape {tokens.shape}"
        )
    if F is not None and (
        tokens.ndim != 3 or tokens.shape[2] != F or not jnp.issubdtype(tokens.dtype, jnp.floating)
    ):
        raise ValueError(
            f"with input_features={F}, tokens must be real numbers [batch, time, {F}], got "
            f"{tokens.dtype} of shape {tokens.shape}"
        )
    for name, value in per_token.items():
        if value is not None and value.shape != tokens.shape[:2]:
            raise ValueError(
                f"{name} must be [batch, time] = {tokens.shape[:2]} like tokens, got {value.shape}"
            )
        if value is not None and not jnp.issubdtype(value.dtype, jnp.integer):
            raise TypeError(f"{name} must be integers [batch, time], got {value.dtype}")
    if config.position == "learned" and tokens.shape[1] > config.max_len:
        raise ValueError(
            f"{tokens.shape[1]} tokens, but there are learned positions for max_len="
            f"{config.max_len}; raise max_len or shorten the rows"
        )
