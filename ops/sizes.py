"""The check of sizes that all ops begin with: a batch may be empty, nothing else."""


def check_sizes(**arrays):
    """Raises ValueError for an array of which an axis other than its batch is empty.

    Args:
      **arrays: by its name, an array (None passes) and the letters of its axes, as in
        q=(q, "B, T, H, D").
    """
    for name, (x, letters) in arrays.items():
        if x is not None and 0 in x.shape[letters.startswith("B, ") :]:
            raise ValueError(
                f"{name} must be [{letters}] with no empty axis but B, got shape {tuple(x.shape)}"
            )
