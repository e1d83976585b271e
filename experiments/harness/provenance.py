"""What a number hangs on besides its settings: the code, the data, and how training went."""

import ast
import functools
import hashlib
import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import tilescan
from tilescan.data import sources

ROOT = pathlib.Path(tilescan.__file__).parents[1]
_POINTS = 50  # of a training curve that a record keeps


def code_of(measure: Callable[..., Any]) -> dict[str, str]:
    """Returns {file: short hash} of a measurement's own file and of all of ours that it imports.

    Comments, docstrings and layout do not count. Files are relative to the folder of the package.
    """
    found: dict[str, str] = {}
    module = getattr(measure, "func", measure).__module__
    pending = [module] if module.startswith("tilescan") else []
    while pending:
        path = _file(pending.pop())
        if path is None or str(path.relative_to(ROOT)) in found:
            continue
        found[str(path.relative_to(ROOT))], imported = _read(path)
        pending += imported
    return dict(sorted(found.items()))


def digest(code: Mapping[str, str]) -> str:
    """Returns a short hash of what `code_of` found."""
    return hashlib.sha256(json.dumps(code, sort_keys=True).encode()).hexdigest()[:16]


def data_checksums(settings: Mapping[str, Any]) -> dict[str, str | None]:
    """Returns {source: SHA-256} of the built-in sources that a cell trains on, None: not pinned."""
    train = settings.get("train")
    names = train.get("data.sources", ()) if isinstance(train, Mapping) else ()
    known = [sources.SOURCES[name] for name in names if name in sources.SOURCES]
    return {source.name: source.member_sha256 or source.sha256 for source in known}


def training_curve(folder: pathlib.Path) -> dict[str, list[float]] | None:
    """Returns {"steps", "loss"} of the training run in a cell's folder, thinned; None without one.

    Of a run of many steps `_POINTS` are kept, the first and the last among them.
    """
    try:
        lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    rows = [row for row in map(json.loads, lines) if row.get("split") == "train" and "loss" in row]
    if not rows:
        return None
    last, most = len(rows) - 1, min(len(rows), _POINTS)
    chosen = sorted({round(i * last / max(1, most - 1)) for i in range(most)})
    kept = [rows[i] for i in chosen]
    return {"steps": [row["step"] for row in kept], "loss": [row["loss"] for row in kept]}


def _file(module: str) -> pathlib.Path | None:
    """Returns the file of one of our modules."""
    path = ROOT.joinpath(*module.split("."))
    candidates = (path.with_suffix(".py"), path / "__init__.py")
    return next((file for file in candidates if file.is_file()), None)


@functools.cache
def _read(path: pathlib.Path) -> tuple[str, tuple[str, ...]]:
    """Returns a hash of a file's code, and what it imports of ours."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    imported = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            imported += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and _is_text(body[0]):
            body[0] = ast.Expr(ast.Constant(None))
    text = hashlib.sha256(ast.dump(tree).encode()).hexdigest()[:8]
    return text, tuple(sorted(name for name in set(imported) if name.startswith("tilescan.")))


def _is_text(node: ast.AST) -> bool:
    value = getattr(node, "value", None)
    return isinstance(node, ast.Expr) and isinstance(getattr(value, "value", None), str)
