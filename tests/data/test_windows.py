"""Windows of long documents are rows of their split."""

import numpy as np
import pytest

from tilescan.data.windows import document_windows


def test_windows_are_of_documents_of_their_split():
    rows = document_windows("python_stdlib", 100)
    train, test = (rows(split, 3, 64, (0,)) for split in ("train", "test"))
    assert train["tokens"].shape == (3, 64) and train["weights"].min() == 1
    np.testing.assert_array_equal(train["tokens"][:, 1:], train["targets"][:, :-1])
    assert not np.array_equal(train["tokens"], test["tokens"])
    np.testing.assert_array_equal(rows("test", 3, 64, (0,))["tokens"], test["tokens"])
    assert not np.array_equal(rows("test", 3, 64, (1,))["tokens"], test["tokens"])
    with pytest.raises(ValueError, match="no document of more than 1000000000 bytes"):
        rows("test", 1, 10**9, (0,))
