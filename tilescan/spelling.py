"""The known name that a mistyped one means."""

import difflib
from collections.abc import Iterable

# What others call it, and the word in our names.
SYNONYMS = {
    "d_state": "state_dim",
    "state_size": "state_dim",
    "ssm_state_size": "state_dim",
    "d_conv": "conv_width",
    "conv_kernel": "conv_width",
    "n_layers": "repeats",
    "n_layer": "repeats",
    "num_layers": "repeats",
    "num_hidden_layers": "repeats",
    "depth": "repeats",
    "hidden_size": "d_model",
    "n_embd": "d_model",
    "dim": "d_model",
    "intermediate_size": "mlp_dim",
    "d_ff": "mlp_dim",
    "n_head": "n_heads",
    "num_heads": "n_heads",
    "num_attention_heads": "n_heads",
    "num_key_value_heads": "n_kv_heads",
    "max_position_embeddings": "max_len",
    "n_positions": "max_len",
    "lr": "learning_rate",
    "beta1": "b1",
    "beta2": "b2",
    "grad_clip": "clip_norm",
    "max_grad_norm": "clip_norm",
    "gradient_accumulation_steps": "microbatches",
    "max_steps": "steps",
    "num_steps": "steps",
    "sequence_length": "seq_len",
    "context_length": "seq_len",
    "block_size": "seq_len",
}


def synonym(name: object, known: Iterable[str]) -> str | None:
    """Returns the known name that means what others call `name`, None where there is none."""
    ours = SYNONYMS.get(str(name))
    return ours if ours in set(known) else None


def nearest(name: object, known: Iterable[str], cutoff: float = 0.4) -> str | None:
    """Returns the known name that means the same as `name` or is spelled most like it.

    Args:
      name: what was given, of any type.
      known: the names that there are.
      cutoff: between 0, which always finds one, and 1, which finds equal names alone.

    Returns:
      One of `known`, or None if none is like it.
    """
    known = list(known)
    meant = synonym(name, known)
    if meant is not None:
        return meant
    return next(iter(difflib.get_close_matches(str(name), known, 1, cutoff)), None)


def did_you_mean(name: object, known: Iterable[str], cutoff: float = 0.4) -> str:
    """Returns "did you mean 'x'? ", for the middle of a message, or "" if no known name is near."""
    near = nearest(name, known, cutoff)
    return "" if near is None else f"did you mean {near!r}? "
