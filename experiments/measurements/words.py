"""The words of committed records for the keys of configs, which are those of training."""

from typing import Any

from ml_collections import ConfigDict

WORDS = {
    "batch_size": "batch",
    "seq_len": "length",
    "n_layers": "layers",
    "d_model": "width",
    "n_heads": "heads",
    "head_dim": "dim",
    "learning_rate": "rate",
    "strategies": "ways",
    "rounds": "repeats",
}


def recorded(section: ConfigDict, *keys: str, **more: Any) -> dict[str, Any]:
    """Returns these keys of a section of a config as settings of a cell, by their records' words.

    Digests of committed records depend on these words.

    Args:
      section: of a paper's config.
      *keys: of the section.
      **more: further settings.
    """
    return {WORDS.get(key, key): section[key] for key in keys} | more
