"""Checks the shapes in annotations while tests run: jaxtyping's import hook with beartype.

Every call of a function that states what it returns checks its arguments and its result against
those annotations that hold a jaxtyping shape, with one meaning of a letter within the call. The
check comes after the call: where a function validates its own arguments, its error is raised, and
what it accepts has to be what its annotations say. Annotations without a shape are not checked, and
neither are the fields of dataclasses, which JAX also builds of leaves that are not arrays.
"""

import functools
import inspect
import types
import typing

import beartype
import jax
import jaxtyping
import numpy as np

# An int is a float, as in static checks.
_NUMBERS = beartype.BeartypeConf(is_pep484_tower=True)
PACKAGES = ("data", "decoding", "models", "ops", "pallas_kernels", "training")


def install():
    """Installs the hook; modules that are imported before it are not checked."""
    jaxtyping.jaxtyped = _only_shapes(jaxtyping.jaxtyped)
    jaxtyping.install_import_hook([f"tilescan.{name}" for name in PACKAGES], "shape_checks.check")


def _only_shapes(jaxtyped):
    """Returns the decorator that the hook applies, without its cost where nothing is checked."""

    def decorate(function, **options):
        if not inspect.isfunction(function):  # checked by no annotation, see above
            return function
        shaped = any(map(_holds_shape, function.__annotations__.values()))
        return jaxtyped(function, **options) if shaped else function

    return lambda function=None, **options: (
        functools.partial(decorate, **options)
        if function is None
        else decorate(function, **options)
    )


def check(function):
    """Returns `function`, checked against those of its annotations that hold a shape.

    jaxtyping calls this for a copy of each function's signature whose result is Any, which it
    checks before a call, and for one whose result is the real one, which it checks after.
    """
    annotations = function.__annotations__
    if annotations.get("return") is typing.Any or function.__name__ == "__init__":
        return function
    shapes = {name: _admit_numpy(a) for name, a in annotations.items() if _holds_shape(a)}
    function.__annotations__ = shapes
    return beartype.beartype(function, conf=_NUMBERS)


def _holds_shape(annotation) -> bool:
    if inspect.isclass(annotation) and issubclass(annotation, jaxtyping.AbstractArray):
        return True
    return any(map(_holds_shape, typing.get_args(annotation)))


def _admit_numpy(annotation):
    """Returns `annotation` with NumPy's arrays and scalars, which become JAX's, beside JAX's."""
    if inspect.isclass(annotation) and issubclass(annotation, jaxtyping.AbstractArray):
        admitted = jax.Array | np.ndarray | np.generic
        is_jax = annotation.array_type is jax.Array
        return annotation.dtype[admitted, annotation.dim_str] if is_jax else annotation
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
        return typing.Union[tuple(map(_admit_numpy, typing.get_args(annotation)))]  # noqa: UP007
    return annotation
