"""The header of a GGUF file: its metadata, and where its tensors are.

Reads versions 2 and 3 with lengths that are checked against the file's, whatever it claims. Values
are dequantized by the `gguf` package.
"""

import dataclasses
import functools
import math
import pathlib
import struct
from typing import Any

import gguf
import numpy as np

from tilescan.models.checkpoint_errors import CheckpointError, short
from tilescan.models.stored_tensors import StoredTensor

# Types of metadata, as struct has them.
_SCALARS = dict(enumerate("BbHhIif?")) | dict(zip((10, 11, 12), "Qqd", strict=True))
_STRING, _ARRAY = 8, 9
_MOST_DIMS = 4
_BLOCKS_OF_A_ROW = 256


@dataclasses.dataclass(frozen=True)
class GGUFFile:
    """A GGUF file without its values: metadata by key (arrays are lists, their strings bytes)."""

    metadata: dict[str, Any]
    tensors: dict[str, StoredTensor]


def read_gguf(file: pathlib.Path) -> GGUFFile:
    """Reads the header of a GGUF file.

    Raises:
      CheckpointError: for a file that is truncated or no GGUF file, and for tensors of a type that
        is not known, by name.
    """
    size = file.stat().st_size
    try:
        data = np.asarray(np.memmap(file, mode="r"))  # slices of a memmap cost much more
        return _Reader(file, data).read()
    except CheckpointError:
        raise
    except (ValueError, OSError, struct.error) as error:
        raise CheckpointError(
            f"{file} ({size} bytes) is truncated or no GGUF file: {error}"
        ) from error


class _Reader:
    """Walks through the header; every step stays inside the file, or raises ValueError."""

    def __init__(self, file: pathlib.Path, data: np.ndarray):
        self.file, self.data, self.at = file, data, 0
        self.bytes = memoryview(data)

    def read(self) -> GGUFFile:
        if self._take(4) != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        version = self._scalar("I")
        if version not in (2, 3):
            raise ValueError(f"version {version} is not read; little-endian 2 and 3 are")
        # The shortest tensor has 24 bytes here, the shortest key 13.
        n_tensors, n_keys = self._count(24), self._count(13)
        metadata = {}
        for _ in range(n_keys):
            key = self._name()
            if key in metadata:
                raise ValueError(f"the key {short(key)} stands there twice")
            metadata[key] = self._value(self._scalar("I"))
        infos = [self._tensor_info() for _ in range(n_tensors)]
        return GGUFFile(metadata, self._place(infos, metadata.get("general.alignment", 32)))

    def _take(self, n: int) -> bytes:
        if n > len(self.data) - self.at:
            raise ValueError(f"{n} bytes are missing at {self.at}")
        taken = self.bytes[self.at : self.at + n].tobytes()
        self.at += n
        return taken

    def _scalar(self, code: str) -> Any:
        return struct.unpack("<" + code, self._take(struct.calcsize("<" + code)))[0]

    def _count(self, least_bytes: int) -> int:
        """How many things follow, of at least so many bytes each."""
        n = self._scalar("Q")
        if n * least_bytes > len(self.data) - self.at:
            raise ValueError(f"{n} entries do not fit into the file at {self.at}")
        return n

    def _string(self) -> bytes:
        return self._take(self._count(1))

    def _name(self) -> str:
        return self._string().decode("utf-8")

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string().decode("utf-8", "replace")
        if kind in _SCALARS:
            return self._scalar(_SCALARS[kind])
        if kind != _ARRAY:
            raise ValueError(f"metadata have no type {kind}")
        of = self._scalar("I")
        if of == _STRING:
            return [self._string() for _ in range(self._count(8))]
        if of not in _SCALARS:
            raise ValueError(f"arrays of type {of} are not read")
        code = _SCALARS[of]
        n = self._count(struct.calcsize("<" + code))
        return list(struct.unpack(f"<{n}{code}", self._take(n * struct.calcsize("<" + code))))

    def _tensor_info(self) -> tuple[str, tuple[int, ...], int, int]:
        """Name, shape (as numpy has it), type and offset."""
        name, n_dims = self._name(), self._scalar("I")
        if n_dims > _MOST_DIMS:
            raise ValueError(f"tensor {short(name)} has {n_dims} dimensions")
        shape = tuple(self._scalar("Q") for _ in range(n_dims))
        return name, shape[::-1], self._scalar("I"), self._scalar("Q")

    def _place(self, infos, alignment: Any) -> dict[str, StoredTensor]:
        """Where each tensor's values are: one after the other, in the header's order."""
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
            raise ValueError(f"general.alignment={short(alignment)} must be a power of two")
        start = -(-self.at // alignment) * alignment
        tensors, expected = {}, 0
        for name, shape, number, offset in infos:
            if name in tensors:
                raise ValueError(f"tensor {short(name)} stands there twice")
            try:
                kind = gguf.GGMLQuantizationType(number)
            except ValueError as error:
                raise CheckpointError(
                    f"{self.file}: tensor {short(name)} has type {number}, which is not known"
                ) from error
            block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
            row = shape[-1] if shape else 1
            if row % block:
                raise ValueError(
                    f"rows of tensor {short(name)} are not whole blocks of {kind.name}"
                )
            n_bytes = math.prod(shape) // block * block_bytes
            if offset != expected or start + offset + n_bytes > len(self.data):
                raise ValueError(
                    f"tensor {short(name)} of {n_bytes} bytes can't be at {offset} of the values"
                )
            expected += -(-n_bytes // alignment) * alignment
            raw = self.data[start + offset : start + offset + n_bytes]
            read = functools.partial(_dequantized, raw, kind, shape)
            why = None if _is_read(kind) else "values of this type are not read"
            tensors[name] = StoredTensor(self.file, kind.name, shape, why, read)
        return tensors


def _dequantized(raw: np.ndarray, kind: Any, shape: tuple[int, ...]) -> np.ndarray:
    """Values as float32."""
    _, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    # gguf takes 16 rows at a time: of any number of blocks, so that they are worth a call of numpy.
    blocks = raw.reshape(-1, block_bytes)
    rows = blocks.reshape(-1, block_bytes * math.gcd(len(blocks), _BLOCKS_OF_A_ROW))
    return gguf.dequantize(rows, kind).reshape(shape)


@functools.cache
def _is_read(kind: Any) -> bool:
    _, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    try:
        gguf.dequantize(np.zeros((1, block_bytes), np.uint8), kind)
    except NotImplementedError:
        return False
    return True
