"""Passkeys: the vectorised rows are the plain texts, and the key can be read off them."""

import re

import numpy as np
import pytest

from tilescan.data import tasks
from tilescan.data.tasks import passkey
from tilescan.data.tokenizers import ByteTokenizer


def texts(batch):
    """Each row's whole text, the answer's last digit included."""
    rows = np.concatenate([batch["tokens"][:, :1], batch["targets"]], axis=1)
    return [bytes(row.astype(np.uint8)).decode() for row in rows]


@pytest.mark.parametrize("length", [200, 290, 1024])
def test_rows_are_the_published_text_and_ask_for_its_key(length):
    task = tasks.get("passkey", length=length)
    batch = task.rows("train", 60, (0,), hard=True)
    assert length - len(passkey.FILLER) <= task.seq_len + 1 <= length
    assert task.vocab_size == ByteTokenizer.vocab_size
    places = set()
    for text, weights in zip(texts(batch), batch["weights"], strict=True):
        key = re.search(r"The passkey is (\d{5})\. Remember it\. \1 is the passkey", text)[1]
        lines = text.split("\n")[2:-2]
        at = next(i for i, line in enumerate(lines) if key in line)
        assert text == passkey.prompt(key, len(lines), at) + " " + key
        assert np.flatnonzero(weights).tolist() == list(range(task.seq_len - 5, task.seq_len))
        places.add(at)
    assert places == set(range(len(lines)))


def test_depth_and_filler():
    rows = tasks.get("passkey", length=600, depth=1.0).rows("test", 3, (0,), hard=True)
    assert all("\nThe passkey is" in text.split("What")[0][-70:] for text in texts(rows))
    assert [passkey.line_at(depth, 5) for depth in (0, 0.3, 0.5, 1)] == [0, 1, 2, 4]
    random = tasks.get("passkey", length=600, random_filler=True).rows("train", 4, (0,), hard=False)
    for text in texts(random):
        key = re.search(r"passkey is (\d{5})", text)[1]
        assert text.endswith(key) and text.count(key) == 3 and "grass" not in text
    every = tasks.get("passkey", answer_only=False).rows("train", 2, (0,), hard=False)
    assert every["weights"].min() == 1


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="length=100 must be at least 193: no line fits"):
        tasks.get("passkey", length=100)
    with pytest.raises(ValueError, match=r"depth=1.5 must lie in 0..1"):
        tasks.get("passkey", depth=1.5)
    with pytest.raises(ValueError, match=r"at=3 must lie in 0..2"):
        passkey.prompt("12345", 3, 3)
