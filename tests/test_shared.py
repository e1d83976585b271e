"""What every package may import: names that are meant, files written whole or not at all."""

import pytest

from tilescan.files import write_atomically
from tilescan.spelling import did_you_mean, nearest


def test_the_nearest_name():
    known = ("attention", "mamba", "mamba2")
    assert nearest("atention", known) == "attention" and nearest("xyz", known) is None
    assert nearest("mamba3", iter(known)) in known and nearest("xyz", known, cutoff=0) in known
    assert did_you_mean("atention", known) == "did you mean 'attention'? "
    assert did_you_mean(3, known) == "" == did_you_mean("a", ())


def test_a_file_is_old_or_new_and_never_half(tmp_path):
    path = tmp_path / "new" / "file.txt"
    write_atomically(path, "old\n")
    write_atomically(str(path), "new\nä\n")
    assert path.read_bytes() == "new\nä\n".encode()
    with pytest.raises(UnicodeEncodeError):
        write_atomically(path, "half \ud800")
    with pytest.raises(OSError):
        write_atomically(path / "below", "")
    assert path.read_text(encoding="utf-8") == "new\nä\n"
    assert [p.name for p in path.parent.iterdir()] == ["file.txt"]
