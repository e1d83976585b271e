"""A wheel of the project works far from the checkout, beside a user's own folders of our names."""

import glob
import os
import pathlib
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]


def run(command, folder, path, timeout=300):
    """Runs Python in `folder`, which holds what a user may have, with the installed wheel first."""
    environment = {**os.environ, "PYTHONPATH": str(path), "JAX_PLATFORMS": "cpu"}
    return subprocess.run(
        [sys.executable, "-P", *command],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def interpreters():
    """Yields (path, version) of the Pythons from 3.12 on beside this one, and of this one."""
    beside = pathlib.Path(sys.base_prefix).parent.glob("*/bin/python3")
    found = {sys.executable, *map(str, beside), *glob.glob("/usr/bin/python3.[1-9][0-9]")}
    for path in sorted(found):
        asked = [path, "-c", "import sys; print(*sys.version_info[:2])"]
        version = tuple(map(int, subprocess.check_output(asked, text=True, timeout=60).split()))
        if version >= (3, 12):
            yield path, version


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The folder that the wheel was unpacked to, and another one to work in."""
    pytest.importorskip("setuptools", minversion="77")
    top = tmp_path_factory.mktemp("wheel")
    source = top / "source"
    shutil.copytree(
        ROOT,
        source,
        symlinks=True,
        ignore=shutil.ignore_patterns(".*", "results", "tests", "notebooks", "runs", "build"),
    )
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", f"--wheel-dir={top}", str(source)]
    subprocess.run(build, check=True, capture_output=True, timeout=300)
    (wheel,) = top.glob("*.whl")
    unpack = [*pip, "install", "--no-deps", f"--target={top / 'site'}", str(wheel)]
    subprocess.run(unpack, check=True, capture_output=True, timeout=300)
    for name in ("data", "models", "ops", "configs"):
        (top / "work" / name).mkdir(parents=True)
        (top / "work" / name / "__init__.py").write_text(f"mine = {name!r}\n")
    return top / "site", top / "work"


def test_a_wheel_is_imported_beside_folders_of_the_same_names(installed):
    site, work = installed
    code = (
        "import sys; sys.path.insert(0, '.')\n"
        "import data, models, ops\n"
        "import tilescan.ops.attention, tilescan.models, tilescan.data.tasks\n"
        "import tilescan.planning.topologies as topologies\n"
        "assert (data.mine, models.mine, ops.mine) == ('data', 'models', 'ops')\n"
        "assert topologies.H100_TARGET.is_file()\n"
        "print(tilescan.__file__)"
    )
    done = run(["-c", code], work, site)
    assert done.returncode == 0, done.stderr
    assert pathlib.Path(done.stdout.strip()).is_relative_to(site)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("list",), "flash_attention"),
        (("run", "flash_attention", "--scale=smoke", "--only=io-M"), "Records, tables and figures"),
        (("plan", "--config.model.d_model=64", "--config.data.seq_len=64"), "Nothing ran"),
    ],
)
def test_commands_of_a_wheel_work_from_another_folder(installed, arguments, said):
    site, work = installed
    done = run(["-m", "tilescan.cli.main", *arguments], work, site)
    assert done.returncode == 0 and said in done.stdout, done.stdout[-2000:] + done.stderr[-2000:]


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [("rerun", "h3", "text-h3-seed2"), ("report",)], ids=str)
def test_commands_that_need_results_say_where_there_are_some(installed, arguments):
    site, work = installed
    done = run(["-m", "tilescan.cli.main", *arguments], work, site)
    assert done.returncode == 1 and "checkout" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_wheel_installs_and_compiles_under_every_python_that_is_there(installed, tmp_path):
    (wheel,) = installed[0].parent.glob("*.whl")
    for number, (python, version) in enumerate(interpreters()):
        site = tmp_path / str(number)
        pip = [python, "-m", "pip", "--quiet", "--disable-pip-version-check"]
        install = [*pip, "install", "--no-deps", "--no-compile", f"--target={site}", str(wheel)]
        done = subprocess.run(install, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, (version, done.stderr[-2000:])
        compiling = [python, "-m", "compileall", "-q", str(site / "tilescan")]
        done = subprocess.run(compiling, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, (version, done.stdout[-2000:])
