"""The tensors of a folder of safetensors files: one file, or shards and their index."""

import functools
import pathlib
import struct
from collections.abc import Callable
from typing import Any

import numpy as np
import safetensors

from tilescan.models.checkpoint_errors import CheckpointError, MissingFileError, short
from tilescan.models.config_keys import Keys
from tilescan.models.json_files import MOST_BYTES, parse_json, read_json
from tilescan.models.stored_tensors import StoredTensor

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_FLOATS = ("F64", "F32", "F16", "BF16")
# Who wrote the file; all of them store PyTorch's names and orders of axes.
_FORMATS = ("pt", "np", "mlx")


def read_folder(
    path: pathlib.Path, is_buffer: Callable[[str], bool]
) -> tuple[dict[str, StoredTensor], pathlib.Path]:
    """Finds the tensors of a folder, without their values.

    Args:
      path: the folder.
      is_buffer: whether a tensor is not a parameter; the index need not list it.

    Returns:
      The tensors by name, and the file that says which there are: the index if there is one.

    Raises:
      MissingFileError: for absent files.
      CheckpointError: for an index that is not one, that names files elsewhere or that the shards
        contradict; and for files that are not safetensors files.
    """
    index = path / INDEX
    if not index.exists():
        return _tensors_of(_existing(path, [SINGLE])[0]), path / SINGLE
    assigned = _weight_map(index)
    shards = _existing(path, sorted(set(assigned.values())))
    if (path / SINGLE).exists() and SINGLE not in assigned.values():
        raise CheckpointError(
            f"{path} holds {SINGLE} beside {INDEX}, which does not name it; keep one of the two"
        )
    tensors: dict[str, StoredTensor] = {}
    for shard in shards:
        for name, tensor in _tensors_of(shard).items():
            if is_buffer(name):
                tensors.setdefault(name, tensor)
            elif assigned.get(name) != shard.name:
                where = f"assigns it to {assigned[name]}" if name in assigned else "doesn't list it"
                raise CheckpointError(f"{shard} holds tensor {short(name)}, but {index} {where}")
            else:
                tensors[name] = tensor
    for name, shard in assigned.items():
        if name not in tensors and not is_buffer(name):
            raise CheckpointError(
                f"{index} assigns tensor {short(name)} to {shard}, which does not hold it"
            )
    return tensors, index


def _weight_map(index: pathlib.Path) -> dict[str, str]:
    """Which shard, a file of this folder, holds which tensor."""
    wrong = "has no readable weight_map"
    keys = Keys(read_json(index, wrong), index)
    assigned = keys.get("weight_map")
    keys.finish(("metadata",).__contains__)
    if not isinstance(assigned, dict) or not assigned:
        raise CheckpointError(f"{index} {wrong}: it must be an object, not {short(assigned)}")
    for name, shard in assigned.items():
        if not isinstance(shard, str):
            raise CheckpointError(
                f"{index} {wrong}: tensor {short(name)} must be in a file, not in {short(shard)}"
            )
        # Separators of every system, a drive, and what no system takes for a name.
        outside = any(character in shard for character in "/\\:\0") or shard in ("", ".", "..")
        if outside or len(shard.encode("utf-8", "replace")) > 255:
            raise CheckpointError(
                f"{index} {wrong}: tensor {short(name)} must be in a file of this folder, not in "
                f"{short(shard)}"
            )
    return assigned


def _existing(folder: pathlib.Path, names: list[str]) -> list[pathlib.Path]:
    absent = [name for name in names if not (folder / name).exists()]
    if absent:
        raise MissingFileError(f"{folder} lacks {', '.join(absent)}")
    for name in names:
        # A link may lead elsewhere: that is how download caches store files.
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder / name} is not a file")
    return [folder / name for name in names]


def _tensors_of(file: pathlib.Path) -> dict[str, StoredTensor]:
    size = file.stat().st_size
    wrong = f"{file} ({size} bytes) is truncated or no safetensors file"
    # The library checks that the tensors fill the file; it takes the last of two of one name.
    header = _header(file, size, wrong)
    try:
        opened = safetensors.safe_open(file, framework="numpy")
        names = opened.keys()
    except (safetensors.SafetensorError, OSError) as error:
        raise CheckpointError(f"{wrong}: {short(str(error))}") from error
    metadata = header.pop("__metadata__", None)
    kind = None if metadata is None else metadata.get("format")
    if kind is not None and kind not in _FORMATS:
        raise CheckpointError(
            f"{file}: __metadata__.format={short(kind)} is not supported; {', '.join(_FORMATS)} are"
        )
    return {name: _stored(file, opened, name, header[name]) for name in names}


def _stored(file: pathlib.Path, opened: Any, name: str, entry: dict[str, Any]) -> StoredTensor:
    unreadable = None
    if entry["dtype"] not in _FLOATS:
        unreadable = f"only {', '.join(_FLOATS)} are read; quantized weights need their scales"
    read = functools.partial(_values, opened, name)
    return StoredTensor(file, entry["dtype"], tuple(entry["shape"]), unreadable, read)


def _values(opened: Any, name: str) -> np.ndarray:
    return np.asarray(opened.get_tensor(name))


def _header(file: pathlib.Path, size: int, wrong: str) -> dict[str, Any]:
    with file.open("rb") as opened:
        start = opened.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if length > min(size - 8, MOST_BYTES):
            raise CheckpointError(f"{wrong}: its header has {length} bytes")
        return parse_json(opened.read(length), wrong)
