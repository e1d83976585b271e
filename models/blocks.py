"""The residual block around each mixer, and the repetition of a pattern of blocks."""

import dataclasses
from collections.abc import Callable
from typing import Any

from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from tilescan.models.attention import Attention
from tilescan.models.config import LanguageModelConfig
from tilescan.models.layers import MLP, NORMS
from tilescan.models.mixers import MIXERS
from tilescan.ops import masks


def _attention(config: LanguageModelConfig, mask: masks.Mask, name: str | None) -> Attention:
    return Attention(
        n_heads=config.n_heads,
        n_kv_heads=config.n_kv_heads,
        head_dim=config.head_dim,
        mask=mask,
        position=config.position,
        rope_theta=config.rope_theta,
        rope_scaling=config.rope_scaling,
        qk_norm=config.qk_norm,
        norm_eps=config.norm_eps,
        scale=config.attention_scale,
        logit_cap=config.attention_logit_cap,
        use_bias=config.attention_bias,
        out_scale=config.n_blocks**-0.5,
        implementation=config.attention_implementation,
        sequence_parallel=config.sequence_parallel,
        sequence_balance=config.sequence_balance,
        dtype=config.dtype,
        param_dtype=config.param_dtype,
        name=name,
    )


def _mlp(config: LanguageModelConfig, name: str | None) -> MLP:
    return MLP(
        kind=config.mlp,
        dim=config.mlp_dim,
        use_bias=config.mlp_bias,
        out_scale=config.n_blocks**-0.5,
        dtype=config.dtype,
        param_dtype=config.param_dtype,
        name=name,
    )


# What remat="offload" keeps of each repetition, by this name and in the host's memory.
REPEAT_INPUT = "repeat_input"

# The blocks of `models.mixers.OTHER_BLOCKS`.
BLOCKS: dict[str, Callable[[LanguageModelConfig, str | None], nn.Module]] = {
    "attention": lambda config, name=None: _attention(config, config.attention_mask, name),
    "local_attention": lambda config, name=None: _attention(config, config.local_mask, name),
    "mlp": lambda config, name=None: _mlp(config, name),
}


def make_mixer(config: LanguageModelConfig, kind: str, name: str | None = None) -> nn.Module:
    """The mixer of a block, with the options that the configuration gives it."""
    if kind in BLOCKS:
        return BLOCKS[kind](config, name)
    mixer = MIXERS[kind]
    shared = dict(
        d_model=config.d_model,
        norm_eps=config.norm_eps,
        out_scale=config.n_blocks**-0.5,
        dtype=config.dtype,
        param_dtype=config.param_dtype,
        sequence_parallel=config.sequence_parallel,
    )
    fields = {field.name for field in dataclasses.fields(mixer)}
    shared = {key: value for key, value in shared.items() if key in fields}
    return mixer(**shared, **config.mixers.get(kind, {}), name=name)


def make_norm(config: LanguageModelConfig, name: str) -> nn.Module:
    return NORMS[config.norm](
        eps=config.norm_eps, dtype=config.dtype, param_dtype=config.param_dtype, name=name
    )


class Block(nn.Module):
    """x + mixer(norm(x)), or x + norm(mixer(norm(x))) with post_norm."""

    config: LanguageModelConfig
    kind: str

    @nn.compact
    def __call__(self, x, *, state=None, positions=None, segment_ids=None) -> tuple[Any, Any]:
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
    def __call__(self, x, state, positions, segment_ids):
        x = checkpoint_name(x, REPEAT_INPUT)
        states = (None,) * len(self.config.pattern) if state is None else state
        new = []
        for i, kind in enumerate(self.config.pattern):
            block = Block(self.config, kind, name=block_name(i, kind))
            x, s = block(x, state=states[i], positions=positions, segment_ids=segment_ids)
            new.append(s)
        return x, None if state is None else tuple(new)


def init_state(config: LanguageModelConfig, batch: int, max_len: int) -> tuple[Any, ...]:
    """The state of one `Repeat` before the first token, one entry per block of the pattern."""
    return tuple(make_mixer(config, kind).init_state(batch, max_len) for kind in config.pattern)


def block_name(index: int, kind: str) -> str:
    """Name of the pattern's block in the tree of parameters, e.g. "attention_0"."""
    return f"{kind}_{index}"
