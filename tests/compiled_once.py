"""Compiles a program once in a process, however many functions come to it.

Tests make the same small models again and again, each with functions of its own, so that JAX's
caches, which go by the function, miss; compiling is most of the suite's time. Executables are kept
here by the program itself. Nothing is written to a file: JAX's persistent cache has aborted the
interpreter on CPUs.
"""

import functools
import hashlib
import pathlib

import jax
from jax._src import cache_key, compiler

# Programs. Each holds pages of machine code, of which a process may map 65,530.
KEPT = 200
_MAPS, _MANY = pathlib.Path("/proc/self/maps"), 30_000
_EVERY = 100  # programs after which to count the pages: one for eight devices maps about 90


def install():
    """Keeps what JAX compiles in this process from now on."""
    compiler.backend_compile_and_load = once(compiler.backend_compile_and_load)


def forget_if_many():
    """Lets go of all that is compiled, JAX's too, before the process has no page to map.

    Between tests: programs that run are not let go of.
    """
    global _new
    if _new < _EVERY:
        return
    _new = 0
    if _MAPS.exists() and _MAPS.read_bytes().count(b"\n") > _MANY:
        _known.clear()
        jax.clear_caches()


_known, _new = {}, 0  # programs; how many were compiled since the pages were counted


def once(compile_program):
    """Returns JAX's function from a program to an executable, which remembers its results."""
    known = _known

    @functools.wraps(compile_program)
    def call(backend, module, devices, options, host_callbacks):
        def compiled():
            global _new
            _new += 1
            return compile_program(backend, module, devices, options, host_callbacks)

        if host_callbacks:  # they are this call's own
            return compiled()
        digest = hashlib.sha256(options.SerializeAsString())
        cache_key._hash_computation(digest, module, False)  # not the lines it was written in
        key = (id(backend), tuple(device.id for device in devices), digest.digest())
        # The backend is kept, so that no other can have its id.
        known[key] = known.pop(key, None) or (compiled(), backend)
        if len(known) > KEPT:
            del known[next(iter(known))]  # what was not asked for longest
        return known[key][0]

    return call
