"""Brings a source's archive into the cache.

A file reaches the cache only whole and verified: the package client writes into a hidden folder
beside the target, the checksum is compared, the bytes are flushed to the disk, and one rename makes
the file visible. Two processes that fetch the same source at once both succeed; the last rename
wins with the same bytes.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import lzma
import os
import pathlib
import shlex
import shutil
import struct
import tempfile
import time
import zlib
from collections.abc import Iterator

from tilescan.data.archives import extract_member
from tilescan.data.clients import (
    Source,
    SourceError,
    client_command,
    full_disk_message,
    how_to_fetch,
    run_client,
    shell_command,
    size_text,
    source_dir,
)
from tilescan.data.documents import Document

_STALE_SECONDS = 24 * 3600
# What parsers meet in a damaged file: in its text, its structure or its compression.
_BAD_CONTENT = (
    ValueError,
    LookupError,
    EOFError,
    OSError,
    SyntaxError,  # of XML
    struct.error,
    zlib.error,
    lzma.LZMAError,
)


class ChecksumError(SourceError):
    """A file does not have its source's checksum; the file was removed."""


def offline_requested() -> bool:
    """Returns whether the environment turns downloads off (TILESCAN_OFFLINE)."""
    return os.environ.get("TILESCAN_OFFLINE", "").lower() not in ("", "0", "false", "no")


def digest_of(path: pathlib.Path) -> str:
    """Returns the SHA-256 of a file, in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest_note(path: pathlib.Path) -> pathlib.Path:
    return path.with_name(path.name + ".sha256")


def _expected_digest(source: Source, path: pathlib.Path) -> str | None:
    if source.member is not None and path.name == pathlib.PurePosixPath(source.member).name:
        return source.member_sha256
    if source.sha256 is not None:
        return source.sha256
    note = _digest_note(path)
    return note.read_text().strip() if note.exists() else None


_verified: dict[tuple[str, int, int], str] = {}


def _verify(source: Source, path: pathlib.Path) -> None:
    """Compares a file with its checksum; on a mismatch removes it and raises ChecksumError."""
    if path.is_dir():
        return
    stat = path.stat()
    key = (str(path), stat.st_mtime_ns, stat.st_size)
    if key not in _verified:
        _verified[key] = digest_of(path)
    expected, actual = _expected_digest(source, path), _verified[key]
    if expected is not None and actual != expected:
        path.unlink(missing_ok=True)
        raise ChecksumError(
            f"{source.name}: {path.name} has sha256 {actual}, expected {expected}; "
            f"the file ({size_text(stat.st_size)} of {size_text(source.size)}) was removed.\n"
            f"{how_to_fetch(source)}"
        )


def _candidates(source: Source, folder: pathlib.Path) -> list[pathlib.Path]:
    """Returns the files in a folder that satisfy the source, the best first."""
    patterns = [] if source.member is None else [pathlib.PurePosixPath(source.member).name]
    found: list[pathlib.Path] = []
    for pattern in [*patterns, source.archive]:
        hits = [path for path in folder.glob(pattern) if path.suffix != ".sha256"]
        # Where the version drifts, the newest download is the one that was asked for last.
        found += sorted(hits, key=lambda path: (path.stat().st_mtime_ns, path.name), reverse=True)
    return found


def cached(source: Source) -> pathlib.Path | None:
    """Returns the source's file if it is in the cache (or given by the user), unverified."""
    if source.kind == "installed":
        return pathlib.Path(source.archive)
    if source.kind == "file":
        given = _given_files().get(source.name)
        if given is not None:
            return given
    return next(iter(_candidates(source, source_dir(source))), None)


def _given_files() -> dict[str, pathlib.Path]:
    """Returns TILESCAN_DATA_FILES="imdb=/path/one.jsonl.xz:other=/path/two" as a table."""
    table = {}
    for entry in filter(None, os.environ.get("TILESCAN_DATA_FILES", "").split(os.pathsep)):
        name, separator, path = entry.partition("=")
        if not separator:
            raise SourceError(
                f"TILESCAN_DATA_FILES has the entry {entry!r}; each entry is NAME=PATH, separated "
                f"by {os.pathsep!r}"
            )
        table[name.strip()] = pathlib.Path(path).expanduser()
    return table


def fetch_source(source: Source, offline: bool = False) -> pathlib.Path:
    """Returns the path of the source's verified file, downloaded on first use.

    Raises:
        SourceError: offline, no client, a failing client, a wrong checksum, a full disk or an
            unwritable cache. The message holds the command that fetches the source.
    """
    # A file that is there already.
    path = cached(source)
    if source.kind == "installed":
        return path
    if path is not None and not path.exists():
        raise SourceError(f"{source.name}: TILESCAN_DATA_FILES names {path}, which does not exist")
    if path is not None:
        if source.kind == "file":
            return path
        try:
            _verify(source, path)
            return _with_member(source, path)
        except ChecksumError:  # the cache was damaged: fetch it anew if that is allowed
            if _off(offline):
                raise

    # One that is not.
    if source.kind == "file":
        given = ", ".join(_given_files())
        but = f" (it names only {given})" if given else ""
        raise SourceError(
            f"{source.name} is in no package: give its file with TILESCAN_DATA_FILES="
            f"{source.name}=PATH{but} or\n  {shell_command(source)}\n{source.description}"
        )
    if _off(offline):
        raise SourceError(
            f"{source.name} ({size_text(source.size)}) is not in the cache and downloads are off "
            f"(--offline or TILESCAN_OFFLINE=1). {how_to_fetch(source)}"
        )
    return _download(source)


def _off(offline: bool) -> bool:
    return offline or offline_requested()


def _with_member(source: Source, path: pathlib.Path) -> pathlib.Path:
    """Extracts the wanted member of an archive that a person put into the cache."""
    if source.member is None or path.name == pathlib.PurePosixPath(source.member).name:
        return path
    with _staging(source) as staging:
        member = extract_member(path, source.member, staging)
        _verify(source, member)
        return _publish(member, source_dir(source))


def _download(source: Source) -> pathlib.Path:
    with _staging(source) as staging:
        free = shutil.disk_usage(staging).free
        if free < 2 * source.size:
            raise SourceError(full_disk_message(source, f"{size_text(free)} are free"))
        run_client(source, client_command(source), staging)
        found = _candidates(source, staging)
        if not found:
            raise SourceError(
                f"{source.name}: {shlex.join(client_command(source))} wrote no {source.archive}, "
                f"but {sorted(p.name for p in staging.iterdir() if not p.name.startswith('.'))}"
            )
        path = found[0]
        _verify(source, path)
        if source.member is not None:
            path = extract_member(path, source.member, staging)
            _verify(source, path)
        elif source.sha256 is None and path.is_file():
            # The note comes first: a file without its note must not exist.
            note = _digest_note(path)
            note.write_text(digest_of(path) + "\n")
            _publish(note, source_dir(source))
        return _publish(path, source_dir(source))


def read_documents(source: Source, path: pathlib.Path) -> list[Document]:
    """Parses the source's file.

    Raises:
        SourceError: the file is not what the parser knows, or holds no documents.
    """
    try:
        documents = source.parse(path)
    except _BAD_CONTENT as error:
        raise SourceError(
            f"{source.name}: {path} is not what its parser knows: {error}.\n{_replace(source)}"
        ) from error
    if not documents:
        raise SourceError(f"{source.name}: {path} holds no documents. {source.description}")
    return documents


def _replace(source: Source) -> str:
    """Says what to do about a damaged file."""
    if source.kind in ("installed", "file"):
        return f"{source.description}. {how_to_fetch(source)}"
    return f"Remove it: it is then downloaded again. {how_to_fetch(source)}"


def add_file(source: Source, given: str | os.PathLike) -> pathlib.Path:
    """Copies a file that the user has into the cache, as the source's file.

    Raises:
        SourceError: the source is not of kind file, or the file does not exist or does not parse.
    """
    given = pathlib.Path(given).expanduser()
    if source.kind != "file":
        raise SourceError(
            f"{source.name} is of kind {source.kind}, not file. {how_to_fetch(source)}"
        )
    if not given.is_file():
        raise SourceError(f"{source.name}: there is no file {given}")
    if source.parse is not None:
        read_documents(source, given)
    with _staging(source) as staging:
        copy = staging / (source.name + "".join(given.suffixes[-2:]))
        shutil.copyfile(given, copy)
        return _publish(copy, source_dir(source))


@contextlib.contextmanager
def _staging(source: Source) -> Iterator[pathlib.Path]:
    """Makes a hidden folder on the cache's own file system, gone afterward whatever happens."""
    folder = source_dir(source)
    staging = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _sweep(folder)
        staging = pathlib.Path(tempfile.mkdtemp(prefix=".partial-", dir=folder))
        yield staging
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise SourceError(full_disk_message(source, str(error))) from error
        raise SourceError(
            f"{source.name}: the cache folder {folder} cannot be used: {error}. "
            f"Set TILESCAN_CACHE to a folder that can be written."
        ) from error
    finally:
        if staging is not None:
            shutil.rmtree(staging, ignore_errors=True)


def _sweep(folder: pathlib.Path) -> None:
    """Removes what killed processes have left; younger folders may be in use."""
    for partial in folder.glob(".partial-*"):
        with contextlib.suppress(OSError):
            if time.time() - partial.stat().st_mtime > _STALE_SECONDS:
                shutil.rmtree(partial, ignore_errors=True)


def _publish(path: pathlib.Path, folder: pathlib.Path) -> pathlib.Path:
    """Flushes a finished file (or folder) to the disk and renames it into the cache."""
    target = folder / path.name
    if path.is_dir():
        with contextlib.suppress(OSError):  # another process was first: its copy is as good
            os.rename(path, target)
        return target
    with open(path, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(path, target)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return target
