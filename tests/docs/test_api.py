"""The API reference: docstrings become pages, with their sections, for every public module."""

import importlib.util
import pathlib
import warnings

import pytest

FILE = pathlib.Path(__file__).resolve().parents[2] / "docs" / "api.py"


@pytest.fixture(scope="module")
def api():
    spec = importlib.util.spec_from_file_location("api", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_module_is_a_page_of_its_docstrings(api):
    html = api.page("tilescan.decoding.filters")
    assert '<section id="filter_logits">' in html and "<h6" in html
    assert "<strong>top_k:</strong>" in html and "<strong>ValueError:</strong>" in html


def test_the_public_modules_are_those_of_the_rooms(api):
    names = api.modules()
    assert {"tilescan.ops.attention", "tilescan.data.tasks.listops", "tilescan.training"} < {*names}
    assert not [name for name in names if "papers" in name or name.startswith("tilescan.cli")]


@pytest.mark.slow
def test_every_public_module_has_a_page_without_a_warning(api, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        api.build(tmp_path)
    pages = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.html")}
    wanted = {f"{name.replace('.', '/')}.html" for name in api.modules()}
    assert wanted <= pages and (tmp_path / "search.js").exists()
    assert "decoding/sampling.html" in (tmp_path / "tilescan" / "decoding.html").read_text()
