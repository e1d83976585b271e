"""Read members of the archives that package clients deliver: wheels, tarballs and .deb files."""

from __future__ import annotations

import contextlib
import fnmatch
import io
import lzma
import pathlib
import shutil
import subprocess
import tarfile
import zipfile
import zlib
from collections.abc import Iterator

_DAMAGED = (zlib.error, lzma.LZMAError, subprocess.CalledProcessError)


class ArchiveError(ValueError):
    """An archive does not hold what its reader needs."""


def members(path: pathlib.Path, pattern: str) -> Iterator[tuple[str, bytes]]:
    """Yields (name, content) of the members that match a glob, sorted by name.

    A `*` also matches across folders. Nothing is written to the disk.

    Raises:
        ArchiveError: no member matches, or the archive cannot be read.
    """
    try:
        found = sorted(_read(path, pattern))
    except (zipfile.BadZipFile, tarfile.TarError, EOFError, OSError, *_DAMAGED) as error:
        raise ArchiveError(f"{path} cannot be read as an archive: {error}") from error
    if not found:
        raise ArchiveError(f"{path} has no member that matches {pattern!r}")
    yield from found


def _read(path: pathlib.Path, pattern: str) -> Iterator[tuple[str, bytes]]:
    """Yields the same, unsorted."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                if fnmatch.fnmatchcase(name, pattern):
                    yield name, archive.read(name)
        return
    with _open_tar(path) as archive:
        for entry in archive:
            if entry.isfile() and fnmatch.fnmatchcase(entry.name, pattern):
                yield entry.name, archive.extractfile(entry).read()


@contextlib.contextmanager
def _open_tar(path: pathlib.Path) -> Iterator[tarfile.TarFile]:
    if path.suffix != ".deb":
        with tarfile.open(path) as archive:
            yield archive
        return
    with tarfile.open(fileobj=io.BytesIO(_deb_data(path))) as archive:
        yield archive


def _deb_data(path: pathlib.Path) -> bytes:
    """Returns the data tarball of a Debian package, an `ar` archive of three files (deb(5))."""
    for name, content in _ar_members(path):
        if name.startswith("data.tar"):
            if not name.endswith(".zst"):
                return content
            # Ubuntu compresses with zstd, which this Python cannot read; dpkg can.
            if shutil.which("dpkg-deb") is None:
                raise ArchiveError(f"{path} is compressed with zstd: install dpkg to read it")
            command = ["dpkg-deb", "--fsys-tarfile", str(path)]
            return subprocess.run(command, check=True, capture_output=True).stdout
    raise ArchiveError(f"{path} has no data.tar: it is not a Debian package")


def _ar_members(path: pathlib.Path) -> Iterator[tuple[str, bytes]]:
    with open(path, "rb") as file:
        if file.read(8) != b"!<arch>\n":
            raise ArchiveError(f"{path} is not an ar archive")
        while len(header := file.read(60)) == 60:
            size = int(header[48:58])
            yield header[:16].decode("ascii").strip().rstrip("/"), file.read(size)
            file.seek(size % 2, 1)  # members start at even offsets


def extract_member(path: pathlib.Path, member: str, folder: pathlib.Path) -> pathlib.Path:
    """Writes one member (its base name only) of a wheel or zip into a folder.

    Raises:
        ArchiveError: there is no such member.
    """
    target = folder / pathlib.PurePosixPath(member).name
    with zipfile.ZipFile(path) as archive:
        if member not in archive.namelist():
            raise ArchiveError(f"{path} has no member {member!r}")
        with archive.open(member) as source, open(target, "wb") as output:
            shutil.copyfileobj(source, output, 1 << 20)
    return target
