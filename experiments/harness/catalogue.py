"""What is known of papers without importing them: names, titles, and what was measured.

An import of a paper brings JAX and all that it measures with; a list of papers needs none of it.
"""

import ast
import dataclasses
import json
import pathlib
import pkgutil
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from tilescan.experiments import papers

NAMES = tuple(sorted(module.name for module in pkgutil.iter_modules(papers.__path__)))
# In the order in which results list them.
FAMILIES = (
    "kernels",
    "state space models",
    "sequence parallelism",
    "architectures",
    "training dynamics",
    "decoding",
    "retrieval",
    "memorization",
    "speech",
    "translation",
    "proteins",
)


class Titled:
    """What follows of the texts of a paper."""

    title: str
    family: str
    short: str

    def __post_init__(self):
        if self.family not in FAMILIES:
            raise ValueError(f"family={self.family!r} is not one of {', '.join(FAMILIES)}")

    @property
    def short_title(self) -> str:
        """What tables of many papers call it."""
        return self.short or self.title.partition(":")[0].partition("(")[0].strip()

    @property
    def arxiv(self) -> str:
        """The paper's number at arXiv, which stands in its title; "" without one."""
        found = re.search(r"arXiv (\d{4}\.\d{4,5})", self.title)
        return found[1] if found else ""


@dataclasses.dataclass(frozen=True)
class About(Titled):
    """The texts of a paper, as of `cells.Paper`."""

    title: str
    summary: str
    family: str = "kernels"
    short: str = ""


def about(name: str) -> About:
    """Returns the texts of the paper `name`, read from what its folder gives `Paper.of`."""
    path = pathlib.Path(papers.__path__[0]) / name / "__init__.py"
    calls = (n for n in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(n, ast.Call))
    texts = {keyword.arg: keyword.value for call in calls for keyword in call.keywords}
    fields = [field.name for field in dataclasses.fields(About)]
    return About(**{key: ast.literal_eval(texts[key]) for key in fields if key in texts})


def claims(root: pathlib.Path | None, name: str) -> dict[str, Counter[str]]:
    """Returns {scale: how many claims have which status} of what was measured under `root`.

    A status that needs a larger scale counts as "needs scale", whichever that is, and what is shown
    but follows by construction as "by construction".
    """
    found = {}
    for path in sorted(root.glob(f"{name}/*/tables.json")) if root else []:
        listed = json.loads(path.read_text("utf-8"))["claims"]
        found[path.parent.name] = Counter(map(_counted, listed))
    return found


def _counted(claim: Mapping[str, Any]) -> str:
    status = claim["status"].partition(":")[0]
    return "by construction" if claim.get("by_construction") and status == "shown" else status
