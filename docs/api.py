"""Builds the reference of what can be imported, from docstrings: `make docs`, into build/docs.

python docs/api.py [FOLDER]
"""

import importlib
import pathlib
import pkgutil
import sys

import pdoc

# What is imported from elsewhere, not run: neither the command line nor the papers themselves.
ROOMS = (
    "ops",
    "pallas_kernels",
    "models",
    "decoding",
    "data",
    "training",
    "planning",
    "experiments.harness",
    "experiments.measurements",
)
FOLDER = pathlib.Path(__file__).resolve().parents[1] / "build" / "docs"


def modules() -> list[str]:
    """Returns the names of the public modules: the packages above, and all that is below them."""
    names = []
    for room in ROOMS:
        package = importlib.import_module(f"tilescan.{room}")
        below = pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
        names += [package.__name__, *(found.name for found in below if "._" not in found.name)]
    return names


def page(name: str) -> str:
    """Returns the page of a module, HTML."""
    module = pdoc.doc.Module.from_name(name)
    return pdoc.render.html_module(module, all_modules={name: module})


def build(folder: pathlib.Path) -> None:
    """Writes a page of each module, an index and a search into a folder."""
    packages = [importlib.import_module(name) for name in modules()]
    # Where there is an `__all__`, pdoc would leave the modules of the package out.
    stated = {p: p.__all__ for p in packages if hasattr(p, "__path__") and hasattr(p, "__all__")}
    try:
        for package, names in stated.items():
            below = (found.name for found in pkgutil.iter_modules(package.__path__))
            package.__all__ = list(dict.fromkeys([*names, *below]))
        pdoc.pdoc(*(f"tilescan.{room}" for room in ROOMS), output_directory=folder)
    finally:
        for package, names in stated.items():
            package.__all__ = names


# Docstrings have sections "Args:", "Returns:" and "Raises:".
pdoc.render.configure(docformat="google")

if __name__ == "__main__":
    folder = pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER
    build(folder)
    print(f"open {folder / 'index.html'}")
