"""Checkpoints: parameters, optimizer state, RNG, step and data iterator, written by Orbax while
training goes on.

A checkpoint is one folder named by its step; it appears under that name in one rename when all of
it is on disk, so a kill at any moment leaves the earlier ones. Beside the arrays it holds `meta`:
the configuration, the iterator's state, and for every array its shape, dtype and a fingerprint, so
that damage is found when it is read and is named.
"""

import contextlib
import errno
import functools
import logging
import os
import shutil
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath
from jaxtyping import PyTree

from tilescan.files import is_on_disk
from tilescan.training.optimizers import path_name
from tilescan.training.paths import writable_path

FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
FULL_DISK_WORDS = ("No space left", "File too large", "quota exceeded", "RESOURCE_EXHAUSTED")

_LEAST_SLICE = 2**22  # bytes of an array that one of its replicas writes


@runtime_checkable
class DataIterator(Protocol):
    """What a checkpoint needs of a data iterator: a state, JSON-able and the same on every process.

    The iterators of data.pipelines have one: the number of processes may change between save and
    restore.
    """

    def get_state(self) -> Any:
        """Returns where the iterator stands."""

    def set_state(self, state: Any) -> None:
        """Goes back, or on, to where a state was taken."""


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or read; the message says what still stands."""


class UnusableCheckpoint(CheckpointError):
    """A checkpoint that is damaged, or of another model or configuration: not to be continued."""


@functools.cache
def _write_small_arrays_whole() -> None:
    """Lets replicas share the writing of large arrays alone.

    What a replica writes is sliced by a program for each shape and device: seconds of compiling.
    """
    handler = ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=_LEAST_SLICE)
    log = logging.getLogger("absl")  # where Orbax warns of every handler that takes another's place
    level = log.level
    log.setLevel(logging.ERROR)
    ocp.type_handlers.register_type_handler(jax.Array, handler, override=True)
    log.setLevel(level)


def is_full_disk(error: BaseException | None) -> bool:
    """Returns whether an exception, or one that caused it, says that the disk is full."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in FULL_DISK:
            return True
        if any(words.lower() in str(error).lower() for words in FULL_DISK_WORDS):
            return True
        error = error.__cause__ or error.__context__
    return False


@jax.jit
def _fingerprints(leaves):
    def one(x):
        bits = jnp.ravel(x)
        if bits.dtype == jnp.bool_:
            bits = bits.astype(jnp.uint8)
        width = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}[bits.dtype.itemsize]
        bits = jnp.ravel(jax.lax.bitcast_convert_type(bits, width)).astype(jnp.uint32)
        odd = 2 * jax.lax.iota(jnp.uint32, bits.size) + 1
        return jnp.sum(bits * odd, dtype=jnp.uint32)

    return [one(x) for x in leaves]


def describe(state: PyTree) -> dict[str, list]:
    """Returns {path: [shape, dtype, fingerprint]} of every array.

    The fingerprint is sum_i bits_i * (2 i + 1) mod 2^32. The factors are odd, so that one wrong
    element always changes it, and integer sums do not depend on order, so that it is the same on
    every mesh.
    """
    leaves = jax.tree.leaves_with_path(state)
    prints = jax.device_get(_fingerprints([leaf for _, leaf in leaves]))
    return {
        path_name(path): [list(leaf.shape), str(leaf.dtype), int(value)]
        for (path, leaf), value in zip(leaves, prints, strict=True)
    }


class Checkpoints:
    """The checkpoints of one run in one folder.

    Args:
        directory: made if absent; must be on a disk that all processes share.
        keep: how many of the newest stay.
        config: JSON-able; saved with each checkpoint and handed back by `config_at`.
        read_only: leave the folder as it is, another process may be writing there.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        keep: int = 2,
        config: dict | None = None,
        read_only: bool = False,
    ):
        self.directory = writable_path(directory, "directory")
        self.config = config
        self._saving: int | None = None
        if not read_only:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._remove_unfinished()
        _write_small_arrays_whole()
        self._manager = ocp.CheckpointManager(
            self.directory,
            item_names=("state", "meta"),
            # A folder that is only read is not made, and nothing in it is deleted or cleaned:
            # Orbax's own read_only does no more, and warns.
            options=ocp.CheckpointManagerOptions(
                max_to_keep=None if read_only else keep,
                enable_async_checkpointing=not read_only,
                create=not read_only,
                cleanup_tmp_directories=False,
            ),
        )

    def _remove_unfinished(self) -> None:
        """Removes what a killed run left half-written.

        Orbax's own cleaning goes on in a thread that close() does not wait for.
        """
        if jax.process_index() == 0:
            for path in self.directory.iterdir():
                if path.is_dir() and ocp.utils.is_tmp_checkpoint(path):
                    path.rmtree()

    def steps(self) -> list[int]:
        """Returns the steps with a complete checkpoint, ascending."""
        return sorted(self._manager.all_steps())

    def path(self, step: int) -> epath.Path:
        """Returns the folder of a step's checkpoint, whether it exists or not."""
        return self.directory / str(step)

    def save(self, step: int, state: PyTree, iterator: DataIterator) -> None:
        """Starts writing and returns once the arrays are copied; an earlier save's errors surface.

        Raises:
            CheckpointError: the disk is full, or the write failed; earlier checkpoints stand.
        """
        meta = {
            "arrays": describe(state),
            "iterator": iterator.get_state(),
            "config": self.config,
        }
        self.wait()
        self._check_space(step, state)
        args = ocp.args.Composite(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta))
        self._guard(lambda: self._manager.save(step, args=args, force=True), step)
        self._saving = step

    def wait(self) -> None:
        """Returns when the last save is complete on disk. Raises CheckpointError if it failed."""
        self._guard(self._manager.wait_until_finished, self._saving)

    def _guard(self, call: Callable[[], Any], step: int | None) -> None:
        try:
            call()
            self._manager.check_for_errors()
        except Exception as error:
            what = "the disk is full" if is_full_disk(error) else f"{type(error).__name__}: {error}"
            raise CheckpointError(
                f"could not write the checkpoint of step {step} to {self.directory}: {what}. "
                f"{self.standing(failed=step)}"
            ) from error

    def _check_space(self, step: int, state: PyTree) -> None:
        if not is_on_disk(self.directory):
            return
        need = sum(leaf.nbytes for leaf in jax.tree.leaves(state)) // jax.process_count()
        free = shutil.disk_usage(self.directory).free
        if free < need:
            raise CheckpointError(
                f"the disk of {self.directory} is full: the checkpoint of step {step} needs "
                f"{need / 2**20:.1f} MiB and {free / 2**20:.1f} MiB are free. {self.standing()}"
            )

    def standing(self, failed: int | None = None) -> str:
        """Says what remains after a failed write, of step `failed` if a save failed; what to do."""
        # A save that is under way counts as a step until it fails.
        with contextlib.suppress(Exception):
            self._manager.wait_until_finished()
        steps = [step for step in self.steps() if step != failed]
        if not steps:
            return "There is no earlier checkpoint: free space or choose another workdir"
        return (
            f"The last good checkpoint is {self.path(steps[-1])}: free space, then run the same "
            "command to continue"
        )

    def _meta(self, step: int) -> dict:
        args = ocp.args.Composite(meta=ocp.args.JsonRestore())
        return self._manager.restore(step, args=args)["meta"]

    def config_at(self, step: int) -> dict:
        """Returns the configuration that a checkpoint was made with.

        Raises:
            UnusableCheckpoint: it cannot be read.
        """
        return self._read(step, lambda: self._meta(step)["config"])

    def restore(
        self, step: int, abstract_state: PyTree, iterator: DataIterator | None = None
    ) -> PyTree:
        """Returns the state of `step`, placed as the shardings of `abstract_state` say.

        The mesh may differ from the one that saved. `iterator` is set to where it stood.

        Raises:
            UnusableCheckpoint: truncated or changed files, or arrays that the model does not have;
                the message names the path, the cause and the newest earlier checkpoint that can
                be read.
        """
        meta = self._read(step, lambda: self._meta(step))
        self._check_structure(step, meta["arrays"], abstract_state)
        state = self._read(step, lambda: self._read_state(step, meta["arrays"], abstract_state))
        if iterator is not None:
            iterator.set_state(meta["iterator"])
        return state

    def _read_state(self, step: int, saved: dict, abstract_state: PyTree) -> PyTree:
        args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract_state))
        state = self._manager.restore(step, args=args)["state"]
        for path, found in describe(state).items():
            if found != saved[path]:
                raise ValueError(f"the values of {path} are not the ones that were saved")
        return state

    def _check_structure(self, step: int, saved: dict, abstract_state: PyTree) -> None:
        ours = {
            path_name(path): [list(leaf.shape), str(leaf.dtype)]
            for path, leaf in jax.tree.leaves_with_path(abstract_state)
        }
        theirs = {path: row[:2] for path, row in saved.items()}
        wrong = [p for p in sorted(ours | theirs) if ours.get(p) != theirs.get(p)]
        if wrong:
            first = wrong[0]
            raise UnusableCheckpoint(
                f"{self.path(step)} holds another model or optimizer: {len(wrong)} arrays differ, "
                f"the first is {first}: "
                f"{theirs.get(first, 'absent')} there, {ours.get(first, 'absent')} here. Use "
                "another workdir, or the "
                "code and configuration that wrote it"
            )

    def _read(self, step: int, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except Exception as error:
            cause = str(error).strip().splitlines()[0][:300] if str(error).strip() else ""
            intact = self._intact_before(step)
            advice = (
                "No earlier checkpoint can be read: move the folder away to start from step 0."
                if intact is None
                else f"Step {intact} is intact: set train.resume_step={intact} to continue from it."
            )
            raise UnusableCheckpoint(
                f"{self.path(step)} is damaged ({type(error).__name__}: {cause}). {advice}"
            ) from error

    def _intact_before(self, step: int) -> int | None:
        """Returns the newest step before `step` whose every array reads back as it was saved."""
        for earlier in reversed([s for s in self.steps() if s < step]):
            try:
                saved = self._meta(earlier)["arrays"]
                args = ocp.args.Composite(state=ocp.args.StandardRestore())
                if describe(self._manager.restore(earlier, args=args)["state"]) == saved:
                    return earlier
            except Exception:  # whatever the failure: not this one
                continue
        return None

    def drop_after(self, step: int) -> None:
        """Deletes checkpoints later than `step`: the run goes on from there."""
        for later in [s for s in self.steps() if s > step]:
            self._manager.delete(later)

    def close(self) -> None:
        """Waits for a save that is under way and releases the folder."""
        self._manager.close()
