"""Notebooks are scripts (`NN_name.py`, jupytext's percent format), executed into .ipynb files.

    python notebooks/build.py                 # execute all at full size, write the .ipynb files
    python notebooks/build.py 01 --size=small

Needs the extra `dev`. Where the repository is published is read from `url` in setup.cfg: the badges
then open the notebooks in Colab, and they install from there. Without it the badges open Colab's
browser of repositories, and readers write the address themselves.
"""

import argparse
import configparser
import os
import pathlib
import sys

import jupytext
import nbclient
import nbformat
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpec

FOLDER = pathlib.Path(__file__).parent
SIZES = ("small", "full")
COLAB = "https://colab.research.google.com/github"
# Outputs are those of a CPU, without the messages of a TPU's library that looks for a TPU.
ENVIRONMENT = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "TF_CPP_MIN_LOG_LEVEL": "2"}


class ThisInterpreter(AsyncKernelManager):
    """Runs kernels in the Python that runs this script, whatever kernels are installed."""

    @property
    def kernel_spec(self) -> KernelSpec:
        """This interpreter's, whatever name is asked for."""
        argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        return KernelSpec(argv=argv, display_name="Python 3", language="python")


def scripts() -> list[pathlib.Path]:
    """Returns the notebooks' scripts, in order."""
    return sorted(FOLDER.glob("[0-9][0-9]_*.py"))


def published_at() -> str:
    """Returns the repository's address as setup.cfg states it, or ""."""
    settings = configparser.ConfigParser()
    settings.read(FOLDER.parent / "setup.cfg", encoding="utf-8")
    return settings.get("metadata", "url", fallback="").rstrip("/")


def read(script: pathlib.Path, address: str | None = None) -> nbformat.NotebookNode:
    """Returns the notebook that a script describes, without outputs.

    Args:
      script: of `scripts()`.
      address: of the repository, https://github.com/OWNER/NAME; `published_at()` when None.
    """
    notebook = jupytext.read(script)
    address = published_at() if address is None else address
    if address:
        direct = address.replace("https://github.com", COLAB)
        for cell in notebook.cells:
            cell.source = cell.source.replace(
                f"({COLAB})", f"({direct}/blob/main/notebooks/{script.stem}.ipynb)"
            ).replace('REPOSITORY = ""', f'REPOSITORY = "{address}"')
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"  # jupytext samples them: every build would differ
        cell.metadata.clear()
    kernel = dict(name="python3", display_name="Python 3", language="python")
    notebook.metadata = nbformat.from_dict({"kernelspec": kernel})
    return notebook


def execute(
    notebook: nbformat.NotebookNode, size: str, timeout: int = 900
) -> nbformat.NotebookNode:
    """Runs all cells in place; a cell that raises raises `nbclient.CellExecutionError`."""
    client = nbclient.NotebookClient(
        notebook,
        kernel_manager_class=ThisInterpreter,
        resources={"metadata": {"path": str(FOLDER.parent)}},
        record_timing=False,
        coalesce_streams=True,
        timeout=timeout,
    )
    client.execute(env={**os.environ, **ENVIRONMENT, "TILESCAN_NOTEBOOK_SIZE": size})
    notebook.metadata.pop("language_info", None)
    return notebook


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("which", nargs="*", help="beginnings of names, such as 01; default: all")
    parser.add_argument("--size", choices=SIZES, default="full")
    options = parser.parse_args()
    chosen = [s for s in scripts() if s.name.startswith(tuple(options.which or [""]))]
    if not chosen:
        names = ", ".join(s.name for s in scripts())
        parser.error(f"no notebook begins with {' or '.join(options.which)}; there are {names}")
    for script in chosen:
        target = script.with_suffix(".ipynb")
        nbformat.write(execute(read(script), options.size), target)
        print(f"{target.name}: {target.stat().st_size / 2**10:.0f} KiB")


if __name__ == "__main__":
    main()
