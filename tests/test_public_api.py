"""The public functions of every package state their types and say what they do."""

import ast
import collections
import pathlib
from collections.abc import Iterator

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
# Least shares of public functions that are typed in full, and documented; 0.95 is the bar.
FLOORS = {
    "benchmarks": (0.95, 0.95),
    "cli": (0.95, 0.95),
    "configs": (0.95, 0.95),
    "data": (0.95, 0.95),
    "decoding": (0.91, 0.91),
    "experiments": (0.95, 0.95),
    "models": (0.68, 0.83),
    "ops": (0.95, 0.95),
    "pallas_kernels": (0.95, 0.95),
    "planning": (0.95, 0.95),
    "training": (0.95, 0.95),
    "tilescan": (0.95, 0.95),
}


def public_functions(body: list[ast.stmt], prefix: str = "") -> Iterator[tuple[str, ast.AST]]:
    """Yields (name, definition) of the functions, and methods of classes, without underscores."""
    for node in body:
        if getattr(node, "name", "_").startswith("_"):
            continue
        if isinstance(node, ast.ClassDef):
            yield from public_functions(node.body, f"{prefix}{node.name}.")
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield f"{prefix}{node.name}", node


def untyped(function: ast.FunctionDef) -> list[str]:
    """Lists what of a function has no annotation: parameters by name, and "return"."""
    of = function.args
    parameters = [*of.posonlyargs, *of.args, *of.kwonlyargs, of.vararg, of.kwarg]
    named = [p for p in parameters if p is not None and p.arg not in ("self", "cls")]
    bare = [p.arg for p in named if p.annotation is None]
    return bare if function.returns is not None else [*bare, "return"]


def survey(package: str) -> tuple[int, dict[str, list[str]]]:
    """Returns how many public functions a package has, and {what is missing: where}."""
    files = ROOT.joinpath(package).glob("*.py" if package == "tilescan" else "**/*.py")
    count, missing = 0, collections.defaultdict(list)
    for path in sorted(files):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for name, function in public_functions(tree.body):
            count += 1
            where = f"{path.relative_to(ROOT)}:{function.lineno} {name}"
            if bare := untyped(function):
                missing["types"].append(f"{where}: {', '.join(bare)}")
            if ast.get_docstring(function) is None:
                missing["docstrings"].append(where)
    return count, missing


def test_every_package_has_a_floor():
    packages = {path.name for path in ROOT.joinpath("tilescan").iterdir() if path.is_dir()}
    assert packages - {"__pycache__"} | {"tilescan"} == set(FLOORS)


@pytest.mark.parametrize("package", FLOORS)
def test_public_functions_are_typed_and_documented(package):
    count, missing = survey(package)
    for what, floor in zip(("types", "docstrings"), FLOORS[package], strict=True):
        share = 1 - len(missing[what]) / count
        listed = "\n  ".join(missing[what])
        assert share >= floor, (
            f"{share:.1%} of the {count} public functions of {package} have {what}, fewer than "
            f"{floor:.0%}; without:\n  {listed}"
        )


def test_what_is_missing_is_found():
    code = (
        "def whole(a: int, *rest: int, b: str = '', **more: int) -> None: 'Does it.'\n"
        "def bare(a, *rest, b=1, **more): ...\n"
        "def _private(a): ...\n"
        "class Thing:\n"
        "    def method(self, a: int): 'Does it.'\n"
        "    def _private(self, a): ...\n"
        "class _Hidden:\n"
        "    def method(self, a): ...\n"
    )
    found = dict(public_functions(ast.parse(code).body))
    assert list(found) == ["whole", "bare", "Thing.method"]
    assert [untyped(function) for function in found.values()] == [
        [],
        ["a", "b", "rest", "more", "return"],
        ["return"],
    ]
