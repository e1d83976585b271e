"""What a fresh machine installs is what the files say."""

import configparser
import pathlib
import re

import pytest
import yaml

import tilescan

ROOT = pathlib.Path(__file__).resolve().parents[1]
LOCKS = ["requirements.lock", "requirements-dev.lock", "requirements-aot.lock"]


def pins(name):
    return [line for line in (ROOT / name).read_text().splitlines() if line.strip()]


@pytest.mark.parametrize("lock", LOCKS)
def test_locks_are_plain_pins(lock):
    for line in pins(lock):
        assert re.fullmatch(r"[A-Za-z0-9_.-]+==[A-Za-z0-9_.+!-]+", line), line


def test_no_package_is_pinned_twice():
    names = [re.split("==", line)[0].lower() for lock in LOCKS for line in pins(lock)]
    assert len(names) == len(set(names))


def normal(requirement):
    return re.split(r"[<>=!\[; ]", requirement)[0].lower().replace("-", "_")


def test_locks_hold_every_declared_requirement():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    declared = setup["options"]["install_requires"].split("\n")
    declared += setup["options.extras_require"]["dev"].split("\n")
    locked = {normal(line) for lock in LOCKS for line in pins(lock)}
    missing = {normal(line) for line in declared if line} - locked
    assert not missing


def test_readme_names_only_targets_that_make_knows():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    named = set(re.findall(r"`?make ([a-z-]+)`?", (ROOT / "README.md").read_text()))
    assert {"reproduce", "test"} <= named <= targets


def test_the_citation_names_this_version_and_license():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    assert cited["cff-version"] == "1.2.0" and cited["authors"]
    assert cited["version"] == tilescan.__version__
    assert cited["license"] == setup["metadata"]["license"]
