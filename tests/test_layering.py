"""Imports go down only, in the order that ALLOWED states, and never in a circle."""

import ast
import functools
import pathlib
import re
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]

# What each package may import of the project's own packages (itself always).
ALLOWED = {
    "pallas_kernels": set(),
    "ops": {"pallas_kernels"},
    "data": set(),
    "models": {"ops"},
    "decoding": {"models", "ops", "data"},
    "training": {"decoding", "models", "data", "ops"},
    "configs": {"training"},
    "planning": {"configs", "training", "models", "data", "ops", "pallas_kernels"},
    "benchmarks": {"planning", "ops", "pallas_kernels", "models", "training"},
    "experiments": {
        "benchmarks", "planning", "configs", "training", "decoding", "models", "data", "ops",
        "pallas_kernels",
    },
    "cli": {
        "experiments", "benchmarks", "planning", "configs", "training", "decoding", "models",
        "data", "ops",
    },
}  # fmt: skip

# Libraries that a package must not see: kernels are JAX alone, ops are pure functions on arrays.
FORBIDDEN_LIBRARIES = {
    "pallas_kernels": {"flax", "optax", "ml_collections", "absl", "matplotlib", "rich", "grain"},
    "ops": {"flax", "optax", "ml_collections", "absl", "matplotlib", "rich", "grain"},
    "models": {"ml_collections", "grain", "absl", "optax"},
}


PAPERS = sorted(path.parent.name for path in ROOT.glob("experiments/papers/*/__init__.py"))


@functools.cache
def text(path):
    return path.read_text(encoding="utf-8")


@functools.cache
def tree(path):
    return ast.parse(text(path))


@functools.cache
def files(*folders):
    """The Python files below some folders, by their names of import."""
    found = {}
    for path in sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py")):
        parts = ["tilescan", *path.relative_to(ROOT).with_suffix("").parts]
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@functools.cache
def imports(path):
    """The import statements of a file, those in functions and conditions too."""
    found, blocks = [], [tree(path)]
    while blocks:
        node = blocks.pop()
        if isinstance(node, ast.Import | ast.ImportFrom):
            found.append(node)
        for field in ("body", "orelse", "finalbody", "handlers", "cases"):
            inner = getattr(node, field, None)
            blocks += inner if isinstance(inner, list) else []
    return found


def imported_names(path):
    """Yields the full name of every import in a file."""
    for node in imports(path):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}, line {node.lineno}: a relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imported_modules(path, modules):
    """The modules whose names a file imports: `from package import module` means the module alone.

    What a package's __init__ gives is the package's: a module that takes it from there depends on
    all that __init__ imports.
    """
    found = set()
    for node in imports(path):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            whole = {alias.name: f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in modules else node.module for name in whole.values()}
    return found & modules.keys()


def circles(graph):
    """The sets of nodes that reach each other, by repeated removal of nodes without an edge."""
    graph = dict(graph)
    for turned in (False, True):  # neither above a circle nor below one
        while True:
            if turned:
                used = set().union(*graph.values())
                ends = {name for name in graph if name not in used}
            else:
                ends = {name for name, edges in graph.items() if not edges & graph.keys()}
            if not ends:
                break
            graph = {name: edges - ends for name, edges in graph.items() if name not in ends}
    return graph


def room(name):
    """The project's package that an import names, e.g. "ops" of tilescan.ops.attention, or None."""
    parts = name.split(".")
    return parts[1] if parts[0] == "tilescan" and len(parts) > 1 and parts[1] in ALLOWED else None


@pytest.mark.parametrize("package", ALLOWED)
def test_imports_go_down_only(package):
    wrong = []
    for path in sorted((ROOT / package).rglob("*.py")):
        for name in imported_names(path):
            ours = room(name) not in (None, package, *ALLOWED[package])
            if ours or name.split(".")[0] in FORBIDDEN_LIBRARIES.get(package, ()):
                wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_every_import_goes_through_tilescan():
    """`ops.masks` beside `tilescan.ops.masks` would be two modules, with two classes of a mask."""
    tracked = [p for top in (*ALLOWED, "tests", "notebooks") for p in (ROOT / top).rglob("*.py")]
    # Only what may be such an import is parsed: half of all lines are those of tests.
    suspect = re.compile(rf"^\s*(from|import)\b.*[\s,]({'|'.join(ALLOWED)})\b", re.MULTILINE)
    assert suspect.search("import os, ops.masks") and not suspect.search("import tilescan.ops")
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in sorted(tracked)
        if suspect.search(text(path))
        for name in imported_names(path)
        if name.split(".")[0] in ALLOWED
    ]
    assert tracked and not wrong, "\n".join(wrong)


def test_nobody_imports_private_jax():
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for package in ALLOWED
        for path in sorted((ROOT / package).rglob("*.py"))
        for name in imported_names(path)
        if name.startswith("jax._src")
    ]
    assert not wrong, "\n".join(wrong)


def test_what_all_may_import_imports_nothing():
    """Modules of tilescan itself lie below every package, and need Python alone."""
    modules = [path for path in (ROOT / "tilescan").glob("*.py") if path.name != "__init__.py"]
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in modules
        for name in imported_names(path)
        if name.split(".")[0] not in sys.stdlib_module_names
    ]
    assert modules and not wrong, "\n".join(wrong)


def test_every_package_is_linked_under_the_import_name():
    links = {
        path.name: path.readlink().as_posix()
        for path in (ROOT / "tilescan").iterdir()
        if path.is_symlink()
    }
    assert links == {package: f"../{package}" for package in ALLOWED}


def test_no_circle_of_files():
    """Each file can be read after those that it imports, wherever in it the import stands."""
    modules = files(*ALLOWED)
    graph = {name: imported_modules(path, modules) - {name} for name, path in modules.items()}
    assert not circles(graph)
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": set()}) == {
        "b": {"c"},
        "c": {"b"},
    }


def test_rooms_of_experiments():
    """papers -> measurements -> harness; no paper imports another, and nobody imports a paper."""
    wrong = []
    for path in files("experiments").values():
        where = path.relative_to(ROOT / "experiments").parts
        floor = where[0] if len(where) > 1 else "entry"
        allowed = {
            "harness": ("harness",),
            "measurements": ("measurements", "harness"),
            "papers": ("measurements", "harness", f"papers.{where[1]}" if where[1:] else ""),
            "entry": ("harness", "options", "report", "rerun", "run"),
        }[floor]
        for name in imported_names(path):
            inside = name.removeprefix("tilescan.experiments.")
            if inside == name or any(f"{inside}.".startswith(f"{a}.") for a in allowed):
                continue
            # The catalogue lists the folder of papers; the registry imports what a user names.
            if where != ("harness", "catalogue.py") or inside != "papers":
                wrong.append(f"experiments/{'/'.join(where)} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_only_notebooks_import_papers_and_nobody_imports_commands():
    outside = files(*(package for package in ALLOWED if package != "experiments"), "notebooks")
    wrong = []
    for path in outside.values():
        where = path.relative_to(ROOT).parts[0]
        lower = ["tilescan.experiments.papers"] * (where != "notebooks")
        lower += ["tilescan.cli"] * (where != "cli")
        names = [name for name in imported_names(path) if name.startswith(tuple(lower))]
        wrong += [f"{path.relative_to(ROOT)} imports {name}" for name in names]
    assert not wrong, "\n".join(wrong)


def test_mocks_are_for_tests():
    """Code that measures another op or other tiles asks the op or the model for them."""
    wrong = [
        path.relative_to(ROOT).as_posix()
        for path in files(*ALLOWED, "notebooks").values()
        if {name.split(".")[0] for name in imported_names(path)} & {"unittest", "mock"}
    ]
    assert not wrong, f"import unittest.mock: {', '.join(wrong)}"


def test_no_shared_code_lists_the_papers():
    """A new paper is a folder and a config, and nothing else names it."""
    assert len(PAPERS) >= 10
    entry = [p for p in (ROOT / "experiments").glob("*.py")] + [ROOT / "configs" / "common.py"]
    mentioned = lambda path: sum(f'"{name}"' in text(path) for name in PAPERS)
    naming = [
        f"{path.relative_to(ROOT)}, line {node.lineno}: {node.value!r}"
        for path in (*files("experiments/harness", "cli", "planning").values(), *entry)
        if mentioned(path)
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Constant) and node.value in PAPERS
    ]
    listing = [
        f"{path.relative_to(ROOT)}, line {node.lineno}"
        for path in files(*ALLOWED).values()
        if "papers" not in path.parts and mentioned(path) > 2
        for node in ast.walk(tree(path))
        if isinstance(node, ast.List | ast.Tuple | ast.Set | ast.Dict)
        and len({c.value for c in ast.walk(node) if isinstance(c, ast.Constant)} & set(PAPERS)) > 2
    ]
    assert not naming and not listing, "\n".join(naming + listing)
