"""Lets these tests share helpers, and the processes that they start compile as they do."""

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
def processes_compile_as_quickly():
    """Those that a test starts, too."""
    quick = "JAX_DISABLE_MOST_OPTIMIZATIONS"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(quick, str(int(jax.config.read(quick.lower()))))
        yield
