"""Time of a generated token against the context: a recurrence's state, or a Transformer's cache."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from tilescan.experiments.measurements import timing
from tilescan.experiments.measurements import training as measurements
from tilescan.models import LanguageModel
from tilescan.training import config as config_lib


def decode(settings: Mapping[str, Any], seed: int) -> dict:
    """Times decoding after a context, all models in turn.

    Settings: "models", {name: keys of the training config}; "context", random tokens read before;
    "tokens", how many are then generated, greedily, by one program, as `decoding.generate` does;
    "batch", sequences at once; "repeats".

    Returns:
      {name: what `timing.compare` has, of all the tokens, with "params" and "state_bytes" (of the
      whole batch) beside}.
    """
    context, batch, tokens = (settings[k] for k in ("context", "batch", "tokens"))
    functions, arguments, sizes = {}, {}, {}
    for name, keys in settings["models"].items():
        config = measurements.training_config(keys, seed)
        model = LanguageModel(config_lib.settings(config).model_config(keys["model.vocab_size"]))
        prompt = np.random.default_rng(seed).integers(
            model.config.vocab_size, size=(batch, context)
        )
        prompt = jnp.asarray(prompt, jnp.int32)
        params = nn.unbox(jax.jit(model.init)(jax.random.key(seed), prompt[:, :8]))

        def read(params, token, state, model=model):
            x, state = model.apply(params, token, state=state, method="hidden")
            logits = model.apply(params, x[:, -1:], method="logits")
            return jnp.argmax(logits, -1).astype(jnp.int32), state

        def write(params, token, state, read=read):
            def step(carry, _):
                token, state = read(params, *carry)
                return (token, state), token[:, 0]

            return jax.lax.scan(step, (token, state), length=tokens)[1]

        room = model.init_state(batch, context + tokens)
        functions[name] = lambda arguments, name=name, write=write: write(*arguments[name])
        arguments[name] = (params, *jax.jit(read)(params, prompt, room))
        leaves = jax.tree.leaves(arguments[name][2])
        sizes[name] = {
            "params": measurements.parameters(config),
            "state_bytes": sum(leaf.size * leaf.dtype.itemsize for leaf in leaves),
        }
    timed = timing.compare(functions, (arguments,), repeats=settings["repeats"])
    return {name: {**timed[name], **sizes[name]} for name in functions}
