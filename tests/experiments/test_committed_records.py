"""Committed records are those that configs ask for: same cells, same settings, same seeds."""

import json
import pathlib

import pytest

from tilescan.configs.common import SCALES
from tilescan.experiments.harness import records as records_lib
from tilescan.experiments.harness import registry

ROOT = pathlib.Path(__file__).resolve().parents[2] / "results"
PUBLISHED = [
    (name, scale)
    for name in registry.NAMES
    for scale in SCALES
    if (ROOT / name / scale / "config.json").exists()
]


@pytest.mark.parametrize(("name", "scale"), PUBLISHED)
def test_every_cell_of_the_config_has_its_record_and_no_other(name, scale):
    config = registry.load_config(name, scale)
    kept = json.loads((ROOT / name / scale / "config.json").read_text(encoding="utf-8"))
    assert kept["config"] == records_lib.plain(config.to_dict())
    wanted = {
        cell.id: records_lib.digest(name, cell.id, cell.settings, cell.seed)
        for cell in registry.load(name).cells(config)
    }
    found = {record.cell: record.digest for record in records_lib.load(ROOT / name / scale)}
    assert found == wanted
