"""Where a cell may keep files while it is measured, and the trained models that cells share."""

import dataclasses
import pathlib


@dataclasses.dataclass(frozen=True)
class Workspace:
    """A cell's folders.

    Attributes:
      folder: the cell's own scratch space, kept when the cell fails or is interrupted, so that
        training can resume in it; removed when the cell is done.
    """

    folder: pathlib.Path
