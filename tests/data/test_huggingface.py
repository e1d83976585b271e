"""Data sets at Hugging Face, by a stand-in of the library: what is asked of it, what comes back."""

import sys
import types

import pytest

from tilescan.data import huggingface, sources
from tilescan.data.clients import SourceError
from tilescan.data.documents import Document


class Rows:
    """The few members of datasets.Dataset that are used."""

    def __init__(self, columns, names=None):
        self.columns, self.column_names = columns, list(columns)
        self.features = {"label": types.SimpleNamespace(names=names)} if names else {}

    def select_columns(self, names):
        return Rows({name: self.columns[name] for name in names})

    def __iter__(self):
        for values in zip(*self.columns.values(), strict=True):
            yield dict(zip(self.columns, values, strict=True))


@pytest.fixture
def hub(monkeypatch):
    """{(repository, subset): its splits}; anything else fails as the library does."""
    known = {}

    def load_dataset(repository, subset=None):
        if (repository, subset) not in known:
            raise FileNotFoundError(f"Dataset '{repository}' doesn't exist on the Hub")
        return known[repository, subset]

    library = types.ModuleType("datasets")
    library.load_dataset = load_dataset
    library.config = types.SimpleNamespace(HF_HUB_OFFLINE=False)
    monkeypatch.setitem(sys.modules, "datasets", library)
    monkeypatch.delenv("TILESCAN_OFFLINE", raising=False)
    return known


def test_splits_and_classes_are_kept(hub):
    reviews = Rows({"text": ["fine", "", "bad"], "label": [1, 0, 0]}, ["neg", "pos"])
    other = Rows({"text": ["who knows"], "label": [-1]}, ["neg", "pos"])
    hub["stanfordnlp/imdb", None] = {"train": reviews, "dev": reviews, "unsupervised": other}
    assert sources.load("hf:stanfordnlp/imdb") == [
        Document("train:1", "fine", "pos", "train"),
        Document("train:3", "bad", "neg", "train"),
        Document("dev:1", "fine", "pos", "validation"),
        Document("dev:3", "bad", "neg", "validation"),
        Document("unsupervised:1", "who knows", None, None),
    ]


def test_subset_and_column(hub):
    hub["owner/name", "en"] = {"test": Rows({"body": ["one"], "text": [2]})}
    assert sources.load("hf:owner/name/en:body") == [Document("test:1", "one", None, "test")]
    for name, message in {
        "hf:owner/name/en:bdy": r"no column 'bdy' in split 'test', but body, text; name one of",
        "hf:owner/name/en": r"hf:owner/name/en, test row 1: the field 'text' must be a text",
        "hf:owner/name": "hf:owner/name cannot be loaded: FileNotFoundError: .*doesn't exist",
    }.items():
        with pytest.raises(SourceError, match=message):
            sources.load(name)
    hub["none", None] = {"train": Rows({"text": [" "]})}
    with pytest.raises(SourceError, match="hf:none holds no text in column 'text'"):
        sources.load("hf:none")


@pytest.mark.parametrize("name", ["hf:", "hf:a b", "hf:/x", "hf:a//b", "hf:a/b/c/d", "hf:a/b:"])
def test_other_forms_are_named(name):
    with pytest.raises(ValueError, match="is not of the form hf:OWNER/NAME"):
        sources.load(name)


def test_two_columns_of_one_data_set_are_two_sources(hub):
    hub["a/b", None] = {"train": Rows({"x": ["one"], "y": ["two"]})}
    ids = [d.id for d in sources.load_all(["hf:a/b:x", "hf:a/b:y"])]
    assert ids == ["train:1", "hf:a/b:y/train:1"]
    with pytest.raises(ValueError, match="named twice"):
        sources.load_all(["hf:a/b", "hf:a/b:text"])


def test_no_network_where_none_is_wanted(hub, monkeypatch):
    hub["a", None] = {"train": Rows({"text": ["one"]})}
    with pytest.raises(SourceError, match="hf:a: downloads are off .*HF_HUB_OFFLINE=1"):
        sources.load("hf:a", offline=True)
    monkeypatch.setenv("TILESCAN_OFFLINE", "1")
    with pytest.raises(SourceError, match="downloads are off"):
        sources.load("hf:a")
    sys.modules["datasets"].config.HF_HUB_OFFLINE = True  # its own cache alone
    assert len(sources.load("hf:a")) == 1


def test_without_the_library_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(SourceError, match=r"hf:a/b needs .*run `pip install datasets`"):
        list(huggingface.read("hf:a/b"))
