"""The check of sizes that all ops begin with: a batch may be empty, nothing else."""

from typing import Any


def check_sizes(**arrays: tuple[Any, str]) -> None:
    """Checks that no axis of an array is empty but its batch.

    Args:
      **arrays: by its name, an array (None passes) and the names of its axes, as in
        q=(q, "B, T, H, D").

    Raises:
      ValueError: an empty axis other than B.
    """
    for name, (x, letters) in arrays.items():
        if x is not None and 0 in x.shape[letters.startswith("B, ") :]:
            raise ValueError(
                f"{name} must be [{letters}] with no empty axis but B, got shape {tuple(x.shape)}"
            )
