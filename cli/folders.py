"""Where commands look for results."""

import pathlib


def results_folder() -> pathlib.Path | None:
    """Returns results/ of the current folder or else of this checkout; None without either."""
    folders = (pathlib.Path("results"), pathlib.Path(__file__).resolve().parents[1] / "results")
    return next((folder for folder in folders if folder.is_dir()), None)
