"""The residual block around each mixer, and the repetition of a pattern of blocks."""

import dataclasses
from typing import Any

from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Integer

from tilescan.models.config import LanguageModelConfig
from tilescan.models.layers import NORMS
from tilescan.models.mixers import MIXERS, attends, base_name

# What remat="offload" keeps of each repetition, by this name and in the host's memory.
REPEAT_INPUT = "repeat_input"


def make_mixer(config: LanguageModelConfig, block: str, name: str | None = None) -> nn.Module:
    """Returns the mixer of a block, with the options that the configuration gives it.

    Args:
      config: of the model.
      block: a name that `config.pattern` can hold, such as "mamba2" or "local_attention:512".
      name: of the module.
    """
    mixer = MIXERS[base_name(block)]
    shared = dict(
        d_model=config.d_model,
        norm_eps=config.norm_eps,
        out_scale=config.n_blocks**-0.5,
        dtype=config.dtype,
        param_dtype=config.param_dtype,
        sequence_parallel=config.scan_sequence_parallel,
        sequence_balance=config.sequence_balance,
    )
    if attends(block):
        shared["sequence_parallel"] = config.attention_sequence_parallel
    fields = {field.name for field in dataclasses.fields(mixer)}
    shared = {key: value for key, value in shared.items() if key in fields}
    return mixer(**shared, **config.options(block), name=name)


def make_norm(config: LanguageModelConfig, name: str | None) -> nn.Module:
    """Returns a norm of the kind that the configuration names."""
    return NORMS[config.norm](
        eps=config.norm_eps, dtype=config.dtype, param_dtype=config.param_dtype, name=name
    )


class Block(nn.Module):
    """x + mixer(norm(x)), or x + norm(mixer(norm(x))) with post_norm.

    Attributes:
      config: of the model.
      kind: the block's name in `config.pattern`.
    """

    config: LanguageModelConfig
    kind: str

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T E"],
        *,
        state: Any = None,
        positions: Integer[Array, "B T"] | None = None,
        segment_ids: Integer[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T E"], Any]:
        """Adds to T vectors what the mixer makes of them; arguments as `models.mixers` says."""
        config = self.config
        mixer = make_mixer(config, self.kind, "mixer")
        y, state = mixer(
            make_norm(config, "norm")(x), state=state, positions=positions, segment_ids=segment_ids
        )
        if config.post_norm:
            y = make_norm(config, "post_norm")(y)
        return x + y, state


class Repeat(nn.Module):
    """One repetition of the pattern; the body of the scan over layers."""

    config: LanguageModelConfig

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T E"],
        state: tuple[Any, ...] | None,
        positions: Integer[Array, "B T"] | None,
        segment_ids: Integer[Array, "B T"] | None,
    ) -> tuple[Float[Array, "B T E"], tuple[Any, ...] | None]:
        """Applies the pattern's blocks in order; `state` holds one entry per block."""
        x = checkpoint_name(x, REPEAT_INPUT)
        states = (None,) * len(self.config.pattern) if state is None else state
        new = []
        for i, kind in enumerate(self.config.pattern):
            block = Block(self.config, kind, name=block_name(i, kind))
            x, s = block(x, state=states[i], positions=positions, segment_ids=segment_ids)
            new.append(s)
        return x, None if state is None else tuple(new)


def init_state(config: LanguageModelConfig, batch: int, max_len: int) -> tuple[Any, ...]:
    """Returns the state of one `Repeat` before the first token, one entry per block."""
    return tuple(make_mixer(config, kind).init_state(batch, max_len) for kind in config.pattern)


def block_name(index: int, kind: str) -> str:
    """Returns a block's name in the tree of parameters, "attention_0" of any variant of it."""
    return f"{base_name(kind)}_{index}"
