"""What docs/learning_rates.md says of schedules, keys and stages is so."""

import dataclasses
import pathlib
import re

from tilescan.training import config as config_lib
from tilescan.training import stages
from tilescan.training.schedule_config import SCHEDULES, ScheduleConfig

TEXT = (pathlib.Path(__file__).resolve().parents[2] / "docs" / "learning_rates.md").read_text()


def test_the_table_has_every_schedule_and_fields_that_there_are():
    rows = re.findall(r"^\| (`.*) \| (.*) \|$", TEXT, re.M)
    named = [name for names, _ in rows for name in re.findall(r"`([\w:]+)`", names)]
    assert sorted(named) == sorted([*SCHEDULES, "file:PATH"])
    fields = {field.name for field in dataclasses.fields(ScheduleConfig)}
    assert {name for _, text in rows for name in re.findall(r"`(\w+)`", text)} <= fields


def test_every_key_of_its_commands_is_known():
    known = config_lib.known_keys()
    keys = re.findall(r"--config\.([\w.]+)=", TEXT)
    assert len(keys) > 15 and set(keys) <= set(known)
    sections = "data|train|optimizer"
    assert set(re.findall(rf"`((?:{sections})\.\w+)[`=]", TEXT)) <= set(known)


def test_its_stages_are_two_runs():
    [block] = re.findall(r"```python\n(.*?)```", TEXT, re.S)
    names: dict = {}
    exec(block, names)
    found = stages.stage_configs(names["get_config"](), "runs/both")
    assert list(found) == ["english", "german"]
    assert found["german"].train.start_from == "runs/both/english"
    assert found["german"].data.replay == 0.25 and found["english"].train.steps == 2000
