"""Work folders in buckets and by URL: what can be written is, all else is refused by name."""

import importlib.machinery
import importlib.util
import json
import pathlib

import fsspec
import pytest
from etils import epath
from etils.epath import backend
from tiny_training import TinyModel, tiny_config, tiny_datasets

from tilescan.experiments import run
from tilescan.training import train
from tilescan.training import workdir as work
from tilescan.training.checkpoints import Checkpoints
from tilescan.training.metrics import JsonLines, read_rows
from tilescan.training.paths import BUCKETS, writable_path, write_whole

MODULES = [module for modules in BUCKETS.values() for module in modules]


@pytest.fixture
def bucket(monkeypatch):
    """s3://bucket in memory, by the library that reaches a real one."""
    memory = fsspec.filesystem("memory")
    memory.store.clear()
    memory.pseudo_dirs[:] = [""]
    monkeypatch.setattr(backend._FileSystemSpecBackend, "fs", lambda self, path: _Memory(memory))
    _install(monkeypatch, importlib.machinery.ModuleSpec("s3fs", None))
    return epath.Path("s3://bucket")


def _install(monkeypatch, spec):
    """Makes the packages of buckets seem to be there, or not."""
    others = importlib.util.find_spec
    found = lambda name, *rest: spec if name in MODULES else others(name, *rest)
    monkeypatch.setattr("importlib.util.find_spec", found)


class _Memory:
    """A file system in memory whose paths begin with s3://."""

    def __init__(self, memory):
        self.memory = memory

    def __getattr__(self, name):
        method = getattr(self.memory, name)
        plain = lambda x: "/" + str(x).removeprefix("s3://") if "://" in str(x) else x
        return lambda *args, **options: method(*map(plain, args), **options)


def test_rows_and_files_in_a_bucket(bucket):
    folder = work.prepare("s3://bucket/first")
    assert str(folder) == "s3://bucket/first" and not list(folder.iterdir())
    write_whole(folder / "config.json", "{}\n")
    assert (folder / "config.json").read_text() == "{}\n"
    lines = JsonLines(folder / "metrics.jsonl", None)
    lines.write({"step": 1})
    lines.write({"step": 2})
    lines.sync()
    assert read_rows(folder / "metrics.jsonl") == [{"step": 1}, {"step": 2}]
    lines.write({"step": 3})
    lines.close()
    assert [row["step"] for row in read_rows(folder / "metrics.jsonl")] == [1, 2, 3]
    resumed = JsonLines(folder / "metrics.jsonl", 2)
    resumed.close()
    assert [row["step"] for row in read_rows(folder / "metrics.jsonl")] == [1, 2]


@pytest.mark.slow
def test_a_run_keeps_its_records_in_a_bucket(bucket, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = tiny_config("train.steps=4", "train.checkpoint_every=0", "train.tensorboard=True")
    final = train.train(config, "s3://bucket/run", model=TinyModel(0.1), datasets=tiny_datasets())
    rows = read_rows(bucket / "run" / "metrics.jsonl")
    assert final["step"] == 4 and rows[-1]["step"] == 4
    assert json.loads((bucket / "run" / "config.json").read_text())["train"]["steps"] == 4
    assert not list(tmp_path.iterdir())  # no folder that is called gs:


def test_a_file_url_is_the_folder(tmp_path):
    folder = work.prepare(f"file://{tmp_path}/run")
    assert str(folder) == f"{tmp_path}/run" and folder.is_dir()
    assert str(writable_path("runs/first", "workdir")) == str(pathlib.Path("runs/first").absolute())


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("", "workdir is empty; give a folder"),
        ("ftp://host/run", "ftp:// can't be written; use a folder, or a bucket by gs://, s3://"),
        ("hdfs://host/run", "hdfs:// can't be written"),
        ("gs://bucket/run", "needs packages: pip install gcsfs google-cloud-storage"),
        ("s3://bucket/run", "needs packages: pip install s3fs"),
    ],
)
def test_what_cannot_be_written_is_refused_at_the_start(path, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _install(monkeypatch, None)
    with pytest.raises(ValueError, match=message):
        train.train(tiny_config(), path)
    with pytest.raises(ValueError, match=message.replace("workdir", "directory")):
        Checkpoints(path)
    assert not list(tmp_path.iterdir())


def test_records_of_papers_need_a_disk():
    config = tiny_config()
    with pytest.raises(ValueError, match="workdir='gs://bucket/h3': records are kept on a disk"):
        run.measure(config, "gs://bucket/h3")
