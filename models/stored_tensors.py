"""Tensors of a checkpoint before they are read: all checks happen on names, dtypes and shapes."""

import concurrent.futures
import dataclasses
import math
import pathlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from tilescan.models.checkpoint_errors import CheckpointError, short
from tilescan.models.config import LanguageModelConfig
from tilescan.models.weight_names import Entry, file_names

_ALIGNMENT = 64  # bytes
_THREADS = 2  # as memory's bandwidth is worth
_COLUMNS = 64  # of a transpose, at a time


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor of a file.

    Attributes:
      file: where it is.
      dtype: its name there.
      shape: of its values.
      unreadable: why its values aren't taken, or None.
      read: returns its values, floats.
    """

    file: pathlib.Path
    dtype: str
    shape: tuple[int, ...]
    unreadable: str | None
    read: Callable[[], np.ndarray]


def read_params(
    config: LanguageModelConfig,
    entries: list[Entry],
    leaves: Callable[[], dict[str, jax.ShapeDtypeStruct]],
    tensors: dict[str, StoredTensor],
    source: str,
) -> dict[str, np.ndarray]:
    """Returns all parameters by path, stacked over layers; nothing is read before all is checked.

    Args:
      config: of the model.
      entries: which tensor is which parameter.
      leaves: returns shapes and dtypes of all parameters by path; called once the names are right.
      tensors: all that the checkpoint holds.
      source: the file, for errors about what is missing.

    Raises:
      CheckpointError: for missing, unknown, unreadable or mis-shaped tensors, named, and for
        values beyond the range of the parameter's dtype.
    """
    wanted = _check_names(config, entries, tensors, source)
    for name in wanted:
        check_readable(name, tensors[name])
    shapes = leaves()
    groups = list(file_names(entries, config.repeats))
    for entry, names in groups:
        expected = entry.file_shape(_shapes_of_one(entry, shapes))
        for name in names:
            if tensors[name].shape != expected:
                raise CheckpointError(
                    f"{tensors[name].file}: tensor {name!r} has shape "
                    f"{short(tensors[name].shape)}, but the configuration asks for {expected}"
                )

    params = {p: _aligned(shapes[p]) for entry, _ in groups for p in entry.paths}

    def store(entry: Entry, i: int, name: str) -> None:
        values = entry.read(tensors[name].read(), _shapes_of_one(entry, shapes))
        for path, value in zip(entry.paths, values, strict=True):
            into = params[path][i : i + 1] if entry.per_layer else params[path][None]
            _store(into[0, ...], value, name, tensors[name])

    # numpy converts and copies without the interpreter's lock.
    jobs = [(entry, i, name) for entry, names in groups for i, name in enumerate(names)]
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        for done in [pool.submit(store, *job) for job in jobs]:
            done.result()
    return params


def _aligned(leaf: jax.ShapeDtypeStruct) -> np.ndarray:
    """An array at an address that lets JAX take it on a CPU as it is, without a copy."""
    size = math.prod(leaf.shape) * leaf.dtype.itemsize
    room = np.empty(size + _ALIGNMENT, np.uint8)
    start = -room.ctypes.data % _ALIGNMENT
    return room[start : start + size].view(leaf.dtype).reshape(leaf.shape)


def check_readable(name: str, tensor: StoredTensor) -> None:
    """Raises CheckpointError for a tensor whose values aren't taken."""
    if tensor.unreadable:
        raise CheckpointError(
            f"{tensor.file}: tensor {short(name)} has type {tensor.dtype}: {tensor.unreadable}"
        )


def merge_tied_head(tensors: dict[str, StoredTensor], embedding: str, head: str) -> None:
    """Makes one tensor, `embedding`, of those that a tied model holds of both.

    Raises:
      CheckpointError: if the head differs from the embedding.
    """
    if head not in tensors:
        return
    theirs = tensors.pop(head)
    ours = tensors.setdefault(embedding, theirs)
    check_readable(head, theirs)
    check_readable(embedding, ours)
    same = ours.shape == theirs.shape
    if not same or not np.array_equal(ours.read(), theirs.read(), equal_nan=True):
        raise CheckpointError(
            f"{theirs.file}: tensor {head!r} differs from {embedding!r}, but the configuration "
            "ties them; tie_word_embeddings=false would keep both"
        )


def _shapes_of_one(entry: Entry, shapes) -> list[tuple[int, ...]]:
    """Shapes of an entry's parameters, of one layer."""
    return [shapes[path].shape[1 if entry.per_layer else 0 :] for path in entry.paths]


def _check_names(config, entries, tensors, source) -> list[str]:
    # A number of layers beyond the file's tensors would make as many names.
    if config.repeats > len(tensors):
        raise CheckpointError(
            f"{source}: {len(tensors)} tensors are too few for the {config.repeats} layers of the "
            "configuration"
        )
    wanted = [name for _, group in file_names(entries, config.repeats) for name in group]
    missing, extra = [n for n in wanted if n not in tensors], sorted(set(tensors) - set(wanted))
    if not missing and not extra:
        return wanted
    parts = []
    if missing:
        parts.append(f"{len(missing)} tensors are missing: {_some(missing)}")
    if extra:
        source = str(tensors[extra[0]].file)
        parts.append(f"{len(extra)} tensors are not of this architecture: {_some(extra)}")
    raise CheckpointError(f"{source}: {'; '.join(parts)}")


def _store(into: np.ndarray, value: np.ndarray, name: str, tensor: StoredTensor) -> None:
    """Copies with a change of dtype, in which finite values stay finite."""
    with np.errstate(over="ignore"):
        _copy(into, value)
    if jnp.finfo(value.dtype).max <= jnp.finfo(into.dtype).max:
        return
    if not np.array_equal(np.isfinite(into), np.isfinite(value)):
        raise CheckpointError(
            f"{tensor.file}: tensor {name!r} has values beyond the range of {into.dtype}; load it "
            "with another param_dtype"
        )


def _copy(into: np.ndarray, value: np.ndarray) -> None:
    """into[...] = value; a transpose by columns that fit into the processor's cache."""
    if value.ndim not in (2, 3) or value.flags.c_contiguous:
        into[...] = value
    elif value.ndim == 3:
        axis = int(value.strides[0] < value.strides[1])
        for part, values in zip(*(np.moveaxis(a, axis, 0) for a in (into, value)), strict=True):
            _copy(part, values)
    else:
        for i in range(0, value.shape[1], _COLUMNS):
            into[:, i : i + _COLUMNS] = value[:, i : i + _COLUMNS]


def _some(names: list[str], at_most: int = 5) -> str:
    more = f", and {len(names) - at_most} more" if len(names) > at_most else ""
    return ", ".join(short(name).strip("'\"") for name in names[:at_most]) + more
