"""What a measured row has to say about where it was measured."""

import os
import pathlib
import platform
import subprocess
import time

import jax
import jaxlib


def environment() -> dict:
    """Machine, versions, commit and date, as JSON values."""
    device = jax.devices()[0]
    return {
        "machine": {
            "cpu": _cpu(),
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
        "commit": commit(),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def commit() -> str | None:
    """The commit of the working tree, with "+changes" if it differs; None outside git."""
    root = pathlib.Path(__file__).parent

    def git(*arguments):
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else None

    try:
        head = git("rev-parse", "--short=12", "HEAD")
    except FileNotFoundError:
        return None
    changed = git("status", "--porcelain", "--untracked-files=no", "--", "..")
    return f"{head}+changes" if head and changed else head


def peak_memory_mb() -> float:
    """This process's peak resident memory in MB (10^6 bytes)."""
    try:
        status = pathlib.Path("/proc/self/status").read_text()
    except FileNotFoundError:
        import resource

        unit = 1 if platform.system() == "Darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6
    line = next(x for x in status.splitlines() if x.startswith("VmHWM"))
    return int(line.split()[1]) * 1024 / 1e6


def _cpu() -> str:
    info = pathlib.Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
