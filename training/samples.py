"""Text that a language model writes while it trains: one compiled program, of a prompt."""

from collections.abc import Callable, Iterable

import jax
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh
from jaxtyping import PyTree

from tilescan.data import tokenizers
from tilescan.decoding.sampling import Generation, generate
from tilescan.models import LanguageModel
from tilescan.training import sharding
from tilescan.training.settings import ConfigError, Settings

# Of parameters and the step.
Sampler = Callable[[PyTree, int], str]


def make_sampler(
    model: nn.Module, c: Settings, dataset: Iterable, mesh: Mesh, params: PyTree
) -> Sampler | None:
    """Returns a function from parameters and a step to a text that begins with the prompt.

    The random numbers are those of the run's seed and the step. The program is compiled when the
    first sample is written.

    Args:
        model: a `LanguageModel`.
        c: the run's settings.
        dataset: the batches of training, whose fingerprint says what tokenized them.
        mesh: where the parameters lie. Devices that share a sequence share its parameters here.
        params: shapes of the model's parameters.

    Returns:
        The function; None where train.sample_every is 0.

    Raises:
        ConfigError: train.sample_every for another model, or for data that are no text; more
            tokens than the model has positions.
    """
    if not c.train.sample_every:
        return None
    asked = f"train.sample_every = {c.train.sample_every}"
    if not isinstance(model, LanguageModel) or model.config.input_features is not None:
        raise ConfigError(f"{asked} needs a LanguageModel that reads tokens; set it to 0")
    tokenizer = tokenizers.get_tokenizer(c.data.tokenizer)
    found = getattr(dataset, "fingerprint", {}).get("tokenizer")
    if found != tokenizer.name:
        raise ConfigError(
            f"{asked} needs text that data.tokenizer = {c.data.tokenizer!r} made tokens of; these "
            f"data {'have no tokenizer' if found is None else f'have {found!r}'}: set it to 0"
        )
    prompt = tokenizer.encode(c.train.sample_prompt)

    # One row cannot be shared by the devices that share the rows of training.
    data, fsdp, sequence, tensor = mesh.devices.shape
    whole = Mesh(mesh.devices.reshape(data, fsdp * sequence, 1, tensor), mesh.axis_names)

    def continue_prompt(params: PyTree, step: jax.Array) -> Generation:
        return generate(
            model,
            params,
            prompt[None],
            max_new_tokens=c.train.sample_tokens,
            temperature=c.train.sample_temperature,
            key=jax.random.fold_in(jax.random.key(c.seed), step),
            eos=[end for end in tokenizer.end_ids if end < model.config.vocab_size],
        )

    program = jax.jit(continue_prompt, out_shardings=sharding.replicated(whole))
    try:
        with sharding.use(whole):
            program.eval_shape(params, np.int32(0))
    except ValueError as error:
        raise ConfigError(
            f"{asked}, train.sample_tokens = {c.train.sample_tokens}: {error}"
        ) from error

    def sample(params: PyTree, step: int) -> str:
        with sharding.use(whole):
            written = jax.device_get(program(params, np.int32(step)))
        new = written.tokens[0, : written.lengths[0]]
        known = (new < tokenizer.vocab_size) & ~np.isin(new, tokenizer.end_ids)
        return tokenizer.decode(np.concatenate([prompt, new[known]]))

    return sample
