"""The Python blocks of README.md run as they stand, each by itself."""

import pathlib
import re

import pytest

README = pathlib.Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```", README.read_text(), flags=re.M | re.S)


def name_of(block: str) -> str:
    """What a block is about: the first thing that it imports from here."""
    return re.search(r"from tilescan\.[\w.]+ import (\w+)", block).group(1)


@pytest.mark.parametrize("block", BLOCKS, ids=name_of)
def test_a_block_runs_as_it_stands(block):
    names = {"__name__": "__main__"}
    exec(compile(block, "README.md", "exec"), names)
    for name in ("o", "y2", "logits"):
        if name in names:
            assert names[name].size and bool((abs(names[name]) < 1e9).all())
            return
    raise AssertionError("the block computes nothing that this test knows")


def test_there_are_blocks_of_an_op_a_recurrence_a_model_and_devices():
    assert {"attention", "ssd", "LanguageModel", "Causal"} <= set(map(name_of, BLOCKS))
