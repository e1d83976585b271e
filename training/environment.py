"""What a run ran on, for whoever wonders later why two numbers differ."""

import importlib.metadata
import importlib.util
import os
import pathlib
import platform
import subprocess

import jax

from tilescan.ops.attention_gpu import is_hopper

PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "numpy",
    "ml_collections",
    "tilescan",
)


def package_versions() -> dict[str, str]:
    """Returns the versions of the packages that numbers depend on, of those that are installed."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def git(*arguments: str) -> str | None:
    """Returns what git says of this code's checkout; None where the code is not in one."""
    here = pathlib.Path(__file__).resolve().parent
    command = ["git", "-C", str(here), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def git_commit(digits: int = 40) -> str | None:
    """Returns the commit of this code, "+changes" if files differ from it; None outside git."""
    head = git("rev-parse", "HEAD")
    changed = git("status", "--porcelain", "--untracked-files=no")
    return head and head[:digits] + ("+changes" if changed else "")


def cores() -> int:
    """Returns how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def processor() -> str:
    """Returns the processor's marketing name where the system tells it, else its architecture."""
    try:
        for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def compiler_warning(platform: str | None) -> str | None:
    """Returns what is wrong with the compiler for the kernels of a platform, None if nothing is.

    With nvidia-nvjitlink, which jax[cuda13] brings, kernels are compiled as relocatable code, and
    ptxas then ignores setmaxnreg, by which warps of Hopper kernels share their registers.
    """
    return _nvjitlink_warning() if platform in ("gpu", "cuda") and is_hopper() else None


def expected_compiler_warning() -> str | None:
    """Returns `compiler_warning` of the GPU that JAX would take, without starting JAX.

    Which GPU it is, JAX would have to be started for.
    """
    cuda = importlib.util.find_spec("jax_cuda13_plugin") is not None
    asked = (jax.config.jax_platforms or "cuda").split(",")
    return _nvjitlink_warning() if cuda and {"cuda", "gpu"} & set(asked) else None


def _nvjitlink_warning() -> str | None:
    try:
        version = importlib.metadata.version("nvidia-nvjitlink")
    except importlib.metadata.PackageNotFoundError:
        return None
    return (
        f"with nvidia-nvjitlink {version} installed, kernels for Hopper GPUs spill registers "
        "(attention's backward pass above all): `pip uninstall nvidia-nvjitlink`, which only "
        "jax.numpy.linalg on GPUs needs"
    )


def environment() -> dict:
    """Returns versions, devices, flags and commit; no names of people, hosts or folders."""
    device = jax.devices()[0]
    return {
        "python": platform.python_version(),
        "packages": package_versions(),
        "platform": device.platform,
        "device_kind": device.device_kind,
        "devices": jax.device_count(),
        "processes": jax.process_count(),
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "commit": git_commit(),
    }
