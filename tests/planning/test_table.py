"""The table of plans for long sequences: its meshes, its models, and going on where it stopped."""

import dataclasses
import json
import subprocess

import jax
import numpy as np
import pytest

from tilescan.configs import long_sequences
from tilescan.models import count_params
from tilescan.ops.sequence_parallel import layouts
from tilescan.planning import table as plan_table
from tilescan.planning.topologies import torus_axes
from tilescan.training import config as config_lib
from tilescan.training import inputs, sharding


def test_axes_of_a_torus_are_products_of_its_sides():
    assert torus_axes("v5p:4x4x4") == [1, 4, 16, 64]
    assert torus_axes("v5p:4x8x8") == [1, 4, 8, 32, 64, 256]
    assert torus_axes("v5e:2x4") == [1, 2, 4, 8]


@pytest.mark.parametrize("row", plan_table.ROWS, ids=lambda row: row.key)
def test_rows_fit_their_slices(row):
    axes = torus_axes(plan_table.TOPOLOGIES[row.chips])
    c = config_lib.settings(plan_table.config_of(row))
    assert c.mesh.sequence * c.mesh.fsdp == row.chips == max(axes)
    assert {c.mesh.sequence, c.mesh.fsdp} <= set(axes)
    assert c.data.batch_size == c.mesh.fsdp and c.data.seq_len == row.tokens
    layouts.check(row.tokens, c.mesh.sequence, c.balance)
    shorter = [n for n in axes if n < c.mesh.sequence]
    assert all(row.tokens / n > plan_table.AT_MOST for n in shorter)
    assert row.tokens / c.mesh.sequence <= plan_table.AT_MOST or c.mesh.sequence == row.chips


@pytest.mark.parametrize("name", long_sequences.MODELS)
def test_models_have_1_3_billion_parameters(name):
    c = config_lib.settings(long_sequences.get_config(name))
    model = inputs.make_model(c)
    tokens = jax.ShapeDtypeStruct((1, 64), np.int32)
    positions = dict(positions=tokens) if c.balance != "contiguous" else {}
    with sharding.use(sharding.make_mesh(c.mesh)):
        params = jax.eval_shape(model.init, jax.random.key(0), tokens, **positions)["params"]
    assert 1.2e9 < count_params(params) < 1.4e9
    with pytest.raises(ValueError, match="model='lstm' is unknown; it can be one of transformer"):
        long_sequences.get_config("lstm")


def made(row, **changes):
    """A row as its process answers."""
    chips, tokens = row.chips, row.tokens
    p = {
        "seq_len": tokens, "devices": chips, "mesh": {"sequence": row.sequence, "fsdp": 4},
        "fits": True, "at_least": False, "needs": 3 * 2**30, "seconds": 61.4,
        "bytes": {"parameters": 2**29, "optimizer": 2**30, "temporaries": 2**28},
        "step_operations": chips * 5e12, "bounds": {"compute": 0.25, "memory": 0.5, "links": 1.0},
        "sent": {"all-gather": {"bytes": 2**30}, "all-reduce": {"bytes": 2**31},
                 "reduce-scatter": {"bytes": 2**29}},
    } | changes  # fmt: skip
    return {
        "row": dataclasses.asdict(row),
        "plan": p,
        "logits_bytes": 2**30,
        "versions": {"x": "1"},
    }


def test_finished_rows_are_kept_and_refused_ones_say_so(tmp_path, monkeypatch, capsys):
    asked = []

    def run(command, **options):
        key = command[-1].removeprefix("--row=")
        asked.append(key)
        row = next(row for row in plan_table.ROWS if row.key == key)
        refused = dict(
            fits=False, at_least=True, needs=100 * 2**30, sent=None, bounds={"compute": 0.25}
        )
        refused["bytes"] = {"parameters": 2**29, "optimizer": 2**30}
        answer = "@" + json.dumps(made(row, **(refused if row.tokens == 2**22 else {})))
        died = row.model == "hybrid"
        return subprocess.CompletedProcess(command, int(died), "" if died else answer, "aborted")

    monkeypatch.setattr(subprocess, "run", run)
    command = [f"--folder={tmp_path}", "--only=-64"]
    assert plan_table.main([*command, "--limit=1"]) == 0 and len(asked) == 1
    assert plan_table.main(command) == 1
    assert len(asked) == 9 and len(set(asked)) == 9  # the first was not asked for again
    assert "hybrid-131072-64: ended with 1: aborted" in capsys.readouterr().out
    assert list(plan_table.load(tmp_path)) == [
        row.key for row in plan_table.ROWS if row.chips == 64 and row.model != "hybrid"
    ]
    text = (tmp_path / "plan.md").read_text()
    assert (
        "| transformer | 131,072 | 64 | 16 x 4 | yes | 3.00 | 1.50 | 0.25 | 1.00 | 5 | 0.00 | 1.00 "
        "| 2.50 | 0.00 | 0.25 | 0.5 | 1 |\n" in text
    )
    refused = "| mamba2 | 4,194,304 | 64 | 64 x 4 | no | at least 100.00 | 1.50 | - | 1.00 | 5 "
    assert f"{refused}| - | - | - | - | 0.25 | - | - |\n" in text
    assert "nothing here has run on a device" in text and "with x 1." in text


def test_committed_rows_are_of_the_rows_that_there_are():
    """The table is what its JSON says, and its configurations are still the same."""
    rows = plan_table.load(plan_table.FOLDER)
    keys = [row.key for row in plan_table.ROWS]
    assert rows and [key for key in keys if key in rows] == list(rows)
    text = (plan_table.FOLDER / "plan.md").read_text(encoding="utf-8")
    assert text == plan_table.markdown(list(rows.values()))
    for key, row in rows.items():
        config = plan_table.config_of(plan_table.Row(**row["row"]))
        mesh = row["plan"]["mesh"]
        assert (mesh["sequence"], mesh["fsdp"]) == (config.mesh.sequence, config.mesh.fsdp), key
        assert row["plan"]["fits"] == (row["plan"]["needs"] <= row["plan"]["memory"])
