"""Lets these tests, and the processes they start, share helpers and compiled programs."""

import os
import pathlib
import sys

import jax
import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parent))


@pytest.fixture
def float64(monkeypatch):
    """All of a model, of its loss and of an update in float64."""
    from streamed_models import WIDENED, Float64

    for module in WIDENED:
        monkeypatch.setattr(module, "jnp", Float64())
    with jax.enable_x64(True):
        yield


@pytest.fixture(autouse=True, scope="module")
def compile_once(tmp_path_factory):
    """The same small programs run dozens of times here; compiling them is nearly all the time."""
    folder = str(tmp_path_factory.getbasetemp() / "compiled")
    options = {
        "jax_compilation_cache_dir": folder,
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in options}
    for name, value in options.items():
        jax.config.update(name, value)
        os.environ[name.upper()] = str(value)
    # Programs that are compiled otherwise are others to the cache.
    quick = "JAX_DISABLE_MOST_OPTIMIZATIONS"
    os.environ[quick] = str(int(jax.config.read(quick.lower())))
    yield
    os.environ.pop(quick)
    for name, value in before.items():
        jax.config.update(name, value)
        os.environ.pop(name.upper())
