"""What ops take: arrays of JAX, arrays of NumPy (which become JAX's), and numbers."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

AnyArray = jax.Array | np.ndarray


def check_number(name: str, value: Any) -> None:
    """Checks an argument such as `scale` or `logit_cap`: None, or one finite real number.

    Of a traced number only shape and dtype are looked at.

    Raises:
      TypeError: no number; ValueError: several numbers, or NaN or inf.
    """
    if value is None:
        return
    array = isinstance(value, (jax.Array, np.ndarray, np.generic))
    real = array and any(jnp.issubdtype(value.dtype, kind) for kind in (np.floating, np.integer))
    if not (real or type(value) in (int, float)):
        raise TypeError(f"{name} must be a number or None, got {value!r}")
    if array and value.ndim:
        raise ValueError(f"{name} must be one number, got shape {value.shape}")
    known = not isinstance(value, jax.core.Tracer) and getattr(value, "is_fully_addressable", True)
    if known and not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")
