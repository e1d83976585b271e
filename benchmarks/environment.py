"""What a measured row has to say about where it was measured."""

import pathlib
import platform
import time

import jax
import jaxlib

from tilescan.training.environment import cores, git_commit, processor


def environment() -> dict:
    """Returns machine, versions, commit and date, as JSON values."""
    device = jax.devices()[0]
    return {
        "machine": {
            "cpu": processor(),
            "cores": cores(),
            "device": device.device_kind,
            "platform": device.platform,
            "system": platform.system(),
        },
        "versions": {
            "python": platform.python_version(),
            "jax": jax.__version__,
            "jaxlib": jaxlib.__version__,
        },
        "commit": git_commit(digits=12),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def peak_memory_mb() -> float:
    """Returns this process's peak resident memory in MB (10^6 bytes)."""
    try:
        status = pathlib.Path("/proc/self/status").read_text()
    except FileNotFoundError:
        import resource

        unit = 1 if platform.system() == "Darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6
    line = next(x for x in status.splitlines() if x.startswith("VmHWM"))
    return int(line.split()[1]) * 1024 / 1e6
