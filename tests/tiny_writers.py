"""A tiny random model that writes bytes, for tests of what is around it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from tilescan.data.tokenizers import get_tokenizer
from tilescan.decoding.chat_templates import ChatTemplate
from tilescan.decoding.writers import Writer
from tilescan.models import LanguageModel, LanguageModelConfig

# Turns end with "\n": the byte 10.
TURNS = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}\n{% endfor %}{{ 'a:' }}"


@functools.cache
def tiny_writer(*pattern: str, **fields) -> Writer:
    """Returns a writer of few channels; a recurrent one compiles fastest."""
    config = LanguageModelConfig(
        vocab_size=get_tokenizer("byte").vocab_size,
        d_model=16,
        repeats=2,
        n_heads=2,
        mlp_dim=32,
        pattern=pattern or ("gla",),
        **fields,
    )
    model = LanguageModel(config)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 2), int))["params"]
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), nn.unbox(shapes))
    return Writer(model, params, get_tokenizer("byte"), (10,), ChatTemplate(TURNS, {}, "tiny"))
