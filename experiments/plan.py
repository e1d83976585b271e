"""Compiles a training step for devices that need not be here, and tells what it needs."""

import os
import re
import time
from importlib.util import find_spec

ENVIRONMENT = {
    # libtpu compiles without a device when it is not asked to look for one.
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def topology_devices(topology: str):
    """Descriptions of the devices of a TPU slice, e.g. "v5e:2x4".

    Raises:
      ImportError: libtpu is not installed.
      ValueError: no such topology.
    """
    if find_spec("libtpu") is None:
        raise ImportError(
            f"topology={topology!r} needs the package libtpu (pip install libtpu), or leave "
            "--topology out to plan for this machine"
        )
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from jax.experimental import topologies

    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    except Exception as error:  # the plugin's error type is not part of JAX's interface
        raise ValueError(
            f"topology={topology!r} is unknown; it is a generation and a shape, e.g. v5e:2x4, "
            f"v5p:2x2x2 or v6e:4x4 ({error})"
        ) from error


def compile_step(config, topology: str | None = None) -> dict:
    """Compiles the training step of `config` without allocating or running anything.

    Args:
      config: of `training.config.default_config()`.
      topology: a TPU slice; None takes this machine's devices.

    Returns:
      {"devices", "device", "parameters", "tokens", "kernels", "seconds", "argument_bytes",
      "temp_bytes", "output_bytes", "donated_bytes"}; kernels are the names of the Pallas kernels in
      the compiled program, and bytes are per device, as the compiler says.

    Raises:
      ValueError, ImportError: as `topology_devices`; a batch or mesh that does not fit the devices.
    """
    devices = None if topology is None else topology_devices(topology)
    import jax
    import numpy as np
    from jax.sharding import NamedSharding

    from training import config as config_lib
    from training import inputs, sharding, steps, train
    from training.optimizers import make_optimizer

    c = config_lib.settings(config)
    mesh = sharding.make_mesh(c.mesh, devices)
    sharding.check_batch(mesh, c.data.batch_size, c.train.microbatches)
    model = inputs.make_model(c)
    tx, rate = make_optimizer(c.optimizer, c.train.steps)
    shape = (c.data.batch_size, c.data.seq_len)
    dtypes = dict.fromkeys(("tokens", "targets", "segment_ids", "positions"), np.int32)
    dtypes["weights"] = np.float32
    where = NamedSharding(mesh, sharding.BATCH)
    batch = {k: jax.ShapeDtypeStruct(shape, d, sharding=where) for k, d in dtypes.items()}
    example = {k: np.zeros((1, shape[1]), d) for k, d in dtypes.items()}
    shardings, state, _ = train.sharded_init(model, tx, example, c.seed, mesh)
    step = steps.make_train_step(
        steps.make_loss(model, c.task, c.train.z_loss), tx, rate, c.train.microbatches
    )
    out = (shardings, sharding.replicated(mesh))
    start = time.perf_counter()
    with sharding.use(mesh):
        traced = jax.jit(step, out_shardings=out, donate_argnums=0).trace(state, batch)
        platforms = None if topology is None else ("tpu",)
        compiled = traced.lower(lowering_platforms=platforms).compile()
    memory = compiled.memory_analysis()
    parameters = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(state.params))
    return {
        "devices": mesh.size,
        "device": mesh.devices.flat[0].device_kind,
        "parameters": parameters,
        "tokens": shape[0] * shape[1],
        "seconds": time.perf_counter() - start,
        "kernels": pallas_kernels(compiled.as_text()),
        "argument_bytes": memory.argument_size_in_bytes,
        "temp_bytes": memory.temp_size_in_bytes,
        "output_bytes": memory.output_size_in_bytes,
        "donated_bytes": memory.alias_size_in_bytes,
    }


def pallas_kernels(hlo: str) -> list[str]:
    """Names of the Pallas kernels that a compiled program calls, each once."""
    calls = re.findall(
        r'^ *(?:ROOT )?%(\S+) = .*custom_call_target="(?:tpu_custom_call|mosaic_gpu\w*)"', hlo, re.M
    )
    return sorted({re.sub(r"(\.\d+)+$", "", name) for name in calls})
