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


def imported_names(path):
    """Yields the full name of every import in a file, nested ones included."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


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
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in sorted(tracked)
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


def test_every_package_is_linked_under_the_import_name():
    links = {
        path.name: path.readlink().as_posix()
        for path in (ROOT / "tilescan").iterdir()
        if path.is_symlink()
    }
    assert links == {package: f"../{package}" for package in ALLOWED}
