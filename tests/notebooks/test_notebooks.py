"""Notebooks run from top to bottom, and the committed ones are what their scripts say."""

import importlib.util
import pathlib
import re

import jax
import nbformat
import pytest

FOLDER = pathlib.Path(__file__).parents[2] / "notebooks"
SCRIPTS = sorted(FOLDER.glob("[0-9][0-9]_*.py"))


@pytest.fixture(scope="module")
def build():
    spec = importlib.util.spec_from_file_location("notebooks_build", FOLDER / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def images(notebook):
    outputs = [o for cell in notebook.cells for o in cell.get("outputs", [])]
    return [o for o in outputs if "image/svg+xml" in o.get("data", {})]


def with_solutions(notebook):
    """Runs the folded solution of each exercise before the cell that checks the reader's."""
    cells = []
    for cell in notebook.cells:
        if "<summary>Solution</summary>" in cell.source:
            (code,) = re.findall("```python\n(.*?)```", cell.source, re.DOTALL)
            cells.insert(-1, nbformat.v4.new_code_cell(code))
        cells.append(cell)
    notebook.cells = cells
    return notebook


def printed(notebook):
    outputs = [o for cell in notebook.cells for o in cell.get("outputs", [])]
    return "".join(o.text for o in outputs if o.output_type == "stream").splitlines()


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.stem)
def test_runs(build, script, monkeypatch):
    """At the small size; the asserts in the cells are the test, and solutions pass their checks."""
    quick = jax.config.read("jax_disable_most_optimizations")
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", str(int(quick)))
    notebook = build.execute(with_solutions(build.read(script)), "small", timeout=120)
    assert len(images(notebook)) >= 3
    assert printed(notebook).count("right") == 2


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.stem)
def test_committed_notebook_is_built_from_its_script(build, script):
    path = script.with_suffix(".ipynb")
    assert path.exists(), f"run: python notebooks/build.py {script.name[:2]}"
    committed = nbformat.read(path, as_version=4)
    nbformat.validate(committed)
    fresh = build.read(script)
    kinds_and_sources = lambda nb: [(c.cell_type, c.source) for c in nb.cells]
    assert kinds_and_sources(committed) == kinds_and_sources(fresh), (
        f"{path.name} is not what {script.name} says; run: python notebooks/build.py"
    )
    code = [c for c in committed.cells if c.cell_type == "code"]
    assert [c.execution_count for c in code] == list(range(1, 1 + len(code)))
    assert not any(o.output_type == "error" for c in code for o in c.outputs)
    assert not any(o.get("name") == "stderr" for c in code for o in c.outputs)
    assert sum(line.startswith("not yet") for line in printed(committed)) == 2  # the exercises
    assert len(images(committed)) >= 3
    assert path.stat().st_size < 2**20
    assert not re.search(r'"(/[a-z][\w.-]*){3,}', path.read_text()), "a path of some machine"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.stem)
def test_badge_and_installation_know_the_repository(build, script):
    first, install = build.read(script, "https://github.com/owner/name").cells[:2]
    assert f"{build.COLAB}/owner/name/blob/main/notebooks/{script.stem}.ipynb)" in first.source
    assert 'REPOSITORY = "https://github.com/owner/name"' in install.source
    first, install = build.read(script, "").cells[:2]
    assert f"({build.COLAB})" in first.source and 'REPOSITORY = ""' in install.source


def test_build_reports_unknown_names(build, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["build.py", "99"])
    with pytest.raises(SystemExit):
        build.main()
    assert (
        "no notebook begins with 99; there are 01_attention_as_tiles.py" in capsys.readouterr().err
    )
