"""Imports go down only, in the order that ALLOWED states."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]

# What each package may import of the project's own packages (itself always).
ALLOWED = {
    "pallas_kernels": set(),
    "ops": {"pallas_kernels"},
    "data": set(),
    "models": {"ops"},
    "decoding": {"models", "ops", "data"},
    "training": {"models", "data", "ops"},
    "configs": {"training"},
    "benchmarks": {"ops", "pallas_kernels", "models", "training"},
    "experiments": {
        "benchmarks", "configs", "training", "decoding", "models", "data", "ops", "pallas_kernels",
    },
}  # fmt: skip

# Libraries that a package must not see: kernels are JAX alone, ops are pure functions on arrays.
FORBIDDEN_LIBRARIES = {
    "pallas_kernels": {"flax", "optax", "ml_collections", "absl", "matplotlib", "rich", "grain"},
    "ops": {"flax", "optax", "ml_collections", "absl", "matplotlib", "rich", "grain"},
    "models": {"ml_collections", "grain", "absl", "optax"},
}


def imported_names(path):
    """Yields the top-level name of every import in a file, nested ones included."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module


@pytest.mark.parametrize("package", ALLOWED)
def test_imports_go_down_only(package):
    wrong = []
    for path in sorted((ROOT / package).rglob("*.py")):
        for name in imported_names(path):
            top = name.split(".")[0]
            ours = top in ALLOWED and top != package and top not in ALLOWED[package]
            if ours or top in FORBIDDEN_LIBRARIES.get(package, ()):
                wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_nobody_imports_private_jax():
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for package in ALLOWED
        for path in sorted((ROOT / package).rglob("*.py"))
        for name in imported_names(path)
        if name.startswith("jax._src")
    ]
    assert not wrong, "\n".join(wrong)


def test_every_package_is_named_in_setup_cfg():
    """A package that setup.cfg forgets imports here, from the root, and nowhere else."""
    setup = (ROOT / "setup.cfg").read_text()
    listed = set(setup.split("packages =")[1].split("install_requires")[0].split())
    found = {
        str(path.parent.relative_to(ROOT)).replace("/", ".")
        for package in ALLOWED
        for path in (ROOT / package).rglob("__init__.py")
    }
    assert listed == found
