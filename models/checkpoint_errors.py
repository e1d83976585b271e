"""Errors of published checkpoints."""

import reprlib


class CheckpointError(ValueError):
    """A checkpoint that can't be read: it names the file, the key or tensor, and what is wrong."""


class MissingFileError(CheckpointError, FileNotFoundError):
    """A file of a checkpoint that is not there."""


class _Short(reprlib.Repr):
    """repr() that ends early, whatever a file holds: long strings, deep lists, large integers."""

    def __init__(self):
        super().__init__(maxstring=100, maxother=100, maxlong=40)


short = _Short().repr
