"""What every test shares: eight virtual CPU devices, strict ranks, checked shapes, executables."""

import gc
import os
import pathlib
import sys

os.environ.setdefault("JAX_PLATFORMS", "cpu")
_DEVICES = "--xla_force_host_platform_device_count=8"
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_DEVICES}".strip()

import hypothesis  # noqa: E402
import jax  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")

# Before any module of the packages is imported.
sys.path.insert(0, str(pathlib.Path(__file__).parent))
import compiled_once  # noqa: E402
import shape_checks  # noqa: E402

compiled_once.install()
shape_checks.install()

# Deadlines measure the machine, not the code: a first call compiles.
hypothesis.settings.register_profile("default", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("default")


def pytest_runtest_logfinish():
    compiled_once.forget_if_many()


def pytest_configure(config):
    """Programs here are compiled for seconds and run for milliseconds, so LLVM optimises nothing.

    XLA's own passes stay, and with them fusion and the plan of buffers. Other `-m` than the default
    one, as in `make test-slow` or `-m "slow or not slow"`, compiles as users do.
    """
    quick = config.getoption("markexpr") == "not slow"
    jax.config.update("jax_disable_most_optimizations", quick)
    # JAX starts here, with eight devices: measurements ask for 256 where it has not started yet.
    jax.devices()


def pytest_collection_finish():
    """Programs that JAX traces are millions of objects, few of which die: looked at less often."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 50, 100)
