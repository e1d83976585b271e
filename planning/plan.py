"""Compiles a training step for devices that need not be here, and tells what it needs.

    plan(config, "v5p:8x8x8")                      one compilation, as a Plan
    plan_longest.longest(config, "v5p:8x8x8")      the longest sequence that fits, by compiling
    print(plan_text.text(plan(config)))

The step is the one that `training.train` runs, with its shardings and its cut of the batch. Nothing
runs and no parameter is allocated: every figure is a compiler's, a count, or a vendor's.
"""

import dataclasses
import re
import time

from tilescan.planning import child as plan_child
from tilescan.planning import machines

# A compiler's refusal, as libtpu words it: what it needs and what there is.
_REFUSALS = (
    r"\(([\d.]+)([KMGT]?)\) exceeds available HBM \(([\d.]+)([KMGT]?)\)",
    r"Used ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) hbm",
)
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a training step needs. Bytes are those of one device, sums those of a whole step.

    Attributes:
      topology, device, devices: as asked for (None: this machine); the kind and number of devices.
      mesh: sizes of the axes.
      batch, seq_len, parameters: rows, tokens of a row, numbers in the model.
      bytes: "parameters", "optimizer", "batch" by their shardings; "outputs" the compiler's (the
        new state, of which "donated" takes the place of the old), "temporaries" (activations,
        gradients, buffers), "code", "peak" where it says one, and "host" (temporaries in the
        host's memory, not in needs). Refused: the first three alone.
      needs: bytes in all; of a refused program what the compiler says, without "at_least" of which
        it would be all.
      memory: bytes of the chip, None if not known; fits: whether needs are within it.
      refusal: the compiler's own words, if it refused for lack of memory.
      model_operations, step_operations: of all devices, by formulas (`plan_counts`); the second
        with what the backward pass computes again.
      sent: {kind: {"instructions", "runs", "bytes"}} that a device sends, by the kinds of
        `training.collectives`, "unknown" (loops of unknown length) among them if there are; None
        if refused.
      bounds: {"compute", "memory", "links"}: seconds, each less than any step takes.
      compiler_seconds: its own estimate, where it makes one that means something.
      kernels: names of the Pallas kernels.
      seconds: that compiling took.
    """

    topology: str | None
    device: str
    devices: int
    mesh: dict[str, int]
    batch: int
    seq_len: int
    parameters: int
    bytes: dict[str, int]
    needs: float
    at_least: bool
    memory: float | None
    fits: bool | None
    refusal: str | None
    model_operations: float
    step_operations: float
    sent: dict[str, dict[str, float]] | None
    bounds: dict[str, float]
    compiler_seconds: float | None
    kernels: tuple[str, ...]
    seconds: float

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.batch * self.seq_len

    @property
    def sent_bytes(self) -> float | None:
        return None if self.sent is None else sum(kind["bytes"] for kind in self.sent.values())


def plan(config, topology: str | None = None, *, memory: float | None = None) -> Plan:
    """Compiles the training step of `config` without allocating or running anything.

    Args:
      config: of `training.config.default_config()`, or what `training.config.as_dict` gives.
      topology: a TPU slice ("v5e:2x4") or H100s ("h100:64"); None takes this machine's devices.
      memory: bytes of a device, instead of the vendor's figure.

    Raises:
      ValueError, ImportError: an unknown topology, libtpu missing; a batch, a length or a mesh that
        does not fit the devices.
      RuntimeError: no interpreter with XLA's CUDA plugin, or its process died.
    """
    if machines.platform(topology) == "cuda" and not plan_child.inside():
        return Plan(**plan_child.ask(config, topology, memory))
    devices = machines.devices(topology)
    import jax
    import numpy as np

    from tilescan.planning import counts as plan_counts
    from tilescan.training import config as config_lib
    from tilescan.training import inputs, sharding, steps, train
    from tilescan.training.collectives import collectives, remote_kernels
    from tilescan.training.optimizers import make_optimizer

    c = config_lib.settings(config)
    try:
        mesh = sharding.make_mesh(c.mesh, devices)
    except NotImplementedError as error:  # JAX lays no other axis on a torus
        raise ValueError(
            f"{c.mesh} does not lie on topology={topology!r}: there each axis must be one of "
            f"{', '.join(map(str, machines.torus_axes(topology)))}, products of the slice's sides"
        ) from error
    sharding.check_batch(mesh, c.data.batch_size, c.train.microbatches)
    model = inputs.make_model(c)
    tx, rate = make_optimizer(c.optimizer, c.train.steps)
    B, T = c.data.batch_size, c.data.seq_len
    batch = _batch(c, mesh)
    example = {k: np.zeros((1, *v.shape[1:]), v.dtype) for k, v in batch.items()}
    shardings, state, _ = train.sharded_init(
        model, tx, example, c.seed, mesh, sharding.rules(c.mesh)
    )
    step = steps.make_train_step(train.make_loss(model, c), tx, rate, c.train.microbatches)
    counted = model.config
    if c.train.stream_chunks:  # computes again what remat="full" does
        counted = dataclasses.replace(counted, remat="full")
    counts = plan_counts.operations(counted, state.params, B, T)
    sizes = {
        name: _bytes_of_a_device(tree)
        for name, tree in (
            ("parameters", state.params),
            ("optimizer", (state.opt_state, state.masters)),
            ("batch", batch),
        )
    }
    chip = machines.CHIPS.get(machines.generation(topology))
    memory = memory if memory is not None else chip and chip.memory
    compiled, refusal, start = None, None, time.perf_counter()
    try:
        with sharding.use(mesh):
            out = (shardings, sharding.replicated(mesh))
            traced = jax.jit(step, out_shardings=out, donate_argnums=0).trace(state, batch)
            platform = machines.platform(topology)
            lowered = traced.lower(lowering_platforms=platform and (platform,))
            compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        refusal = str(error)
        needs, available = _refused(refusal)
        if needs is None:
            raise
        memory = min(filter(None, (memory, available)))
    seconds, hlo, sent = time.perf_counter() - start, "", None
    if compiled is not None:
        hlo, analysis = compiled.as_text(), compiled.memory_analysis()
        sizes |= {
            "outputs": analysis.output_size_in_bytes,
            "donated": analysis.alias_size_in_bytes,
            "temporaries": analysis.temp_size_in_bytes,
            "code": analysis.generated_code_size_in_bytes,
            "peak": getattr(analysis, "peak_memory_in_bytes", 0),
            "host": analysis.host_temp_size_in_bytes,
        }
        needs = analysis.argument_size_in_bytes + sizes["outputs"] - sizes["donated"]
        needs += sizes["temporaries"] + sizes["code"]
        sent = _sent([*collectives(hlo), *remote_kernels(hlo)])
    found = Plan(
        topology=topology,
        device=devices[0].device_kind,
        devices=mesh.size,
        mesh=dict(mesh.shape),
        batch=B,
        seq_len=T,
        parameters=sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(state.params)),
        bytes=sizes,
        needs=needs,
        at_least="temporaries" in (refusal or ""),
        memory=memory,
        fits=None if memory is None else refusal is None and needs <= memory,
        refusal=refusal,
        model_operations=counts.model,
        step_operations=counts.step,
        sent=sent,
        bounds={},
        compiler_seconds=None if compiled is None else _own_estimate(compiled, hlo),
        kernels=tuple(pallas_kernels(hlo)),
        seconds=seconds,
    )
    return dataclasses.replace(found, bounds=_bounds(found, chip))


def pallas_kernels(hlo: str) -> list[str]:
    """Names of the Pallas kernels that a compiled program calls, each once."""
    calls = re.findall(
        r'^ *(?:ROOT )?%(\S+) = .*custom_call_target="(?:tpu_custom_call|mosaic_gpu\w*)"', hlo, re.M
    )
    return sorted({re.sub(r"(\.\d+|\.refs_\d+_)+$", "", name) for name in calls})


def _batch(c, mesh) -> dict:
    """Shapes of a batch of `training.inputs.make_datasets`, cut as `training.sharding.put_batch`
    cuts it."""
    import jax
    import numpy as np
    from jax.sharding import NamedSharding

    from tilescan.training import sharding

    B, T = c.data.batch_size, c.data.seq_len
    made = dict.fromkeys(("tokens", "segment_ids", "positions"), ((B, T), np.int32))
    if c.task == "language_model":
        made |= {"targets": ((B, T), np.int32), "weights": ((B, T), np.float32)}
    else:
        made |= {"labels": ((B,), np.int32), "weights": ((B,), np.float32)}
    place = lambda shape: NamedSharding(mesh, sharding.batch_spec(len(shape)))
    return {k: jax.ShapeDtypeStruct(s, d, sharding=place(s)) for k, (s, d) in made.items()}


def _bytes_of_a_device(tree) -> int:
    import jax
    import numpy as np

    return sum(
        int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def _refused(text: str) -> tuple[float | None, float | None]:
    """(bytes that a program needs, bytes that there are) of a refusal for lack of memory."""
    for pattern in _REFUSALS:
        if found := re.search(pattern, text):
            return tuple(float(found[i]) * _UNITS[found[i + 1]] for i in (1, 3))
    return None, None


def _sent(found) -> dict[str, dict[str, float]]:
    made = {}
    for c in found:
        kind = made.setdefault(c.kind, {"instructions": 0, "runs": 0, "bytes": 0.0})
        kind["instructions"] += 1
        if c.times is None:
            kind["unknown"] = kind.get("unknown", 0) + 1
        else:
            kind["runs"] += c.times
            kind["bytes"] += c.sent_bytes
    return made


def _bounds(p: Plan, chip: machines.Chip | None) -> dict[str, float]:
    """Seconds that no step can go below, by the vendor's figures.

    Memory: the state and the batch are read, the new state is written, and what the temporaries
    hold is written and read, each once at the least.
    """
    if chip is None:
        return {}
    bounds = {"compute": p.step_operations / p.devices / chip.flops}
    if p.sent is not None:
        read = sum(p.bytes[name] for name in ("parameters", "optimizer", "batch", "outputs"))
        bounds["memory"] = (read + 2 * p.bytes["temporaries"]) / chip.bandwidth
        if chip.links:
            bounds["links"] = p.sent_bytes / chip.links
    return bounds


def _own_estimate(compiled, hlo: str) -> float | None:
    """The compiler's roofline, which counts loops once and is negative where it knows no cost."""
    try:
        cost = compiled.cost_analysis() or {}
    except Exception:  # a compiler without such an analysis says so in several ways
        return None
    seconds = cost.get("optimal_seconds", 0)
    return seconds if seconds > 0 and " while(" not in hlo else None
