"""What tests of recurrences share: values and gradients by one program for an op and its shapes.

An op here is a function of a module, called with a dict of arrays, that returns outputs
[B, T, ...] and the state after the last step. Compiling takes far longer than running, so that
tests of one file use the same shapes.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np


@functools.partial(jax.jit, static_argnums=0)
def _values_and_gradients(op, arrays, steps, with_state, segments):
    values, pull = jax.vjp(lambda arrays: op(**arrays, **segments), arrays)
    rng = np.random.default_rng(7)
    weights = [jnp.asarray(rng.integers(-3, 4, x.shape), x.dtype) for x in values]
    keep = steps.reshape(1, -1, *(1 for _ in weights[0].shape[2:]))
    weights = jnp.where(keep, weights[0], 0), jnp.where(with_state, weights[1], 0)
    return values, pull(weights)[0]


def results(op, arrays, steps=None, **segments):
    """Returns outputs `y`, the last state `h`, and the gradients `d...` of a weighted sum of both.

    They are NumPy arrays.

    Args:
      op: a function of a module, or a partial that stays the same, since programs are kept by it.
      arrays: its arrays by name; None where it is called without.
      steps: which outputs are in the sum, bool [T], without the last state; all, and the state, by
        default.
      segments: arrays that are not differentiated, as segment ids are.
    """
    with_state = steps is None
    if with_state:
        steps = np.ones(next(iter(arrays.values())).shape[1], bool)
    (y, h), gradients = _values_and_gradients(op, arrays, steps, with_state, segments)
    found = dict(y=y, h=h) | {f"d{n}": g for n, g in gradients.items() if g is not None}
    return {n: np.asarray(x) for n, x in found.items()}  # a slice of a jax.Array is a program


def expected(op, arrays, **segments):
    """Returns the `results` of float64 copies of the arrays, as NumPy arrays."""
    wide = lambda a: None if a is None else np.asarray(a, np.float64)
    with jax.enable_x64(True):
        exact = {name: wide(a) for name, a in arrays.items()}
        return results(op, exact, **segments)


def assert_close(got, want, tolerance, least=1e-6):
    """Errors are at most tolerance times the largest entry, or times `least` if that is larger."""
    for name, y in want.items():
        assert got[name].shape == y.shape, name
        error = np.max(np.abs(np.asarray(got[name], np.float64) - y))
        bound = tolerance * max(np.max(np.abs(y)), least)
        assert error <= bound, f"{name}: error {error:.2e} above {bound:.2e}"


def piece(arrays, start, stop, time, state, **idle):
    """Returns the steps start to stop and then idle ones, so that the length stays the same.

    Args:
      arrays: by name, of which those named in `time` are [B, T, ...].
      state: initial_state of the piece.
      idle: what an array has in idle steps, which must leave the state as it is; 0 by default.
    """
    out = dict(arrays) | dict(initial_state=state)
    for name in time:
        if arrays[name] is not None:
            a = np.full_like(arrays[name], idle.get(name, 0))
            a[:, : stop - start] = np.asarray(arrays[name])[:, start:stop]
            out[name] = a
    return out


def in_pieces(op, arrays, bounds, time, segments=None, **idle):
    """Returns y and h of consecutive pieces between bounds, each from the last one's state."""
    ys, state = [], arrays["initial_state"]
    for start, stop in zip(bounds[:-1], bounds[1:], strict=True):
        out = results(op, piece(arrays, start, stop, time, state, **idle), **(segments or {}))
        ys.append(out["y"][:, : stop - start])
        state = out["h"]
    return dict(y=np.concatenate(ys, 1), h=state)
