"""The arrays that ops take: JAX's, and NumPy's, which become JAX's."""

import jax
import numpy as np

AnyArray = jax.Array | np.ndarray
