"""What a compiled training step needs: every figure is a compiler's, a count, or a vendor's."""

import dataclasses
import math
import re
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp

from tilescan.planning import chips, counts, topologies
from tilescan.planning.compiled import memory as program_memory
from tilescan.planning.step import compile_step
from tilescan.training.collectives import Collective, collectives, remote_kernels
from tilescan.training.config import Config
from tilescan.training.environment import compiler_warning


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a training step needs. Bytes are those of one device, sums those of a whole step.

    Attributes:
      topology, device, devices: as asked for (None: this machine); the kind and number of devices.
      mesh: sizes of the axes.
      batch, seq_len, parameters: rows, tokens of a row, entries of all parameters.
      bytes: "parameters", "optimizer", "batch" by their shardings; "outputs" the compiler's (the
        new state, of which "donated" takes the place of the old), "temporaries" (activations,
        gradients, buffers), "code", "peak" where it says one, and "host" (temporaries in the
        host's memory, not in needs). Refused: the first three alone.
      needs: bytes in all; of a refused program what the compiler says, without "at_least" of which
        it would be all.
      memory: bytes of the chip, None if not known; fits: whether needs are within it.
      refusal: the compiler's own words, if it refused for lack of memory.
      model_operations, step_operations: FLOPs of all devices, by formulas (`counts`); the second
        with what the backward pass computes again.
      sent: {kind: {"instructions", "runs", "bytes"}} that a device sends, by the kinds of
        `training.collectives`, "unknown" (loops of unknown length) among them if there are; None
        if refused.
      bounds: {"compute", "memory", "links"}: seconds, each less than any step takes.
      compiler_seconds: its own estimate, where it makes one that means something.
      kernels: names of the Pallas kernels.
      dtypes: of "parameters", "computation" and "moments" (and "masters", where there are some).
      choices: {op: {"pallas" or "xla": why there is no kernel for it, None of a kernel}}, of ops
        that were asked for neither.
      warnings: what is wrong with the compiler for these devices.
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
    dtypes: dict[str, str]
    choices: dict[str, dict[str, str | None]]
    warnings: tuple[str, ...]
    seconds: float

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.batch * self.seq_len

    @property
    def sent_bytes(self) -> float | None:
        """Bytes that a device sends in a step, None if refused."""
        return None if self.sent is None else sum(kind["bytes"] for kind in self.sent.values())


def report(config: Config, topology: str | None, memory: float | None = None) -> Plan:
    """Compiles the step in this process; see `plan.plan`."""
    # The program, and its FLOPs by formulas.
    step = compile_step(config, topologies.devices(topology), topology)
    c, B, T = step.settings, step.settings.data.batch_size, step.settings.data.seq_len

    counted = step.model
    if c.train.stream_chunks:  # computes again what remat="full" does
        counted = dataclasses.replace(counted, remat="full")
    flops = counts.flops(counted, step.state.params, B, T)

    # Bytes of a device by the shardings.
    state = step.state
    parts = {
        "parameters": state.params,
        "optimizer": (state.opt_state, state.masters),
        "batch": step.batch,
    }
    sizes = {name: _bytes_of_a_device(tree) for name, tree in parts.items()}

    # What the compiler adds, and what the program sends; a refusal says less.
    chip = chips.CHIPS.get(topologies.generation(topology))
    memory = memory if memory is not None else chip and chip.memory
    hlo, sent, refusal = "", None, step.refusal
    if refusal is not None:
        needs = refusal.needs
        memory = min(filter(None, (memory, refusal.available)))
    else:
        hlo, found = step.compiled.as_text(), program_memory(step.compiled)
        sizes |= {
            "outputs": found.outputs,
            "donated": found.donated,
            "temporaries": found.temporaries,
            "code": found.code,
            "peak": found.peak,
            "host": found.host,
        }
        needs = found.total + found.code
        sent = _sent([*collectives(hlo), *remote_kernels(hlo)])

    plan = Plan(
        topology=topology,
        device=step.mesh.devices.flat[0].device_kind,
        devices=step.mesh.size,
        mesh=dict(step.mesh.shape),
        batch=B,
        seq_len=T,
        parameters=sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(state.params)),
        bytes=sizes,
        needs=needs,
        at_least=refusal is not None and "temporaries" in refusal.text,
        memory=memory,
        fits=None if memory is None else refusal is None and needs <= memory,
        refusal=None if refusal is None else refusal.text,
        model_operations=flops.model,
        step_operations=flops.step,
        sent=sent,
        bounds={},
        compiler_seconds=None if step.compiled is None else _own_estimate(step.compiled, hlo),
        kernels=tuple(pallas_kernels(hlo)),
        dtypes={
            "parameters": _dtypes(state.params),
            "computation": jnp.dtype(step.model.dtype).name,
            "moments": _dtypes(state.opt_state),
            **({"masters": _dtypes(state.masters)} if state.masters is not None else {}),
        },
        choices=step.choices,
        warnings=tuple(filter(None, [compiler_warning(topologies.platform(topology))])),
        seconds=step.seconds,
    )
    return dataclasses.replace(plan, bounds=_bounds(plan, chip))


def pallas_kernels(hlo: str) -> list[str]:
    """Returns the names of the Pallas kernels that a compiled program calls, each once."""
    calls = re.findall(
        r'^ *(?:ROOT )?%(\S+) = (.*custom_call_target="(?:tpu_custom_call|mosaic_gpu\w*)".*)',
        hlo,
        re.M,
    )
    # Mosaic GPU's calls are all named mpmd_map; the kernel is the scope around it.
    scopes = ((name, re.search(r'op_name="[^"]*?(\w+)/mpmd_map"', call)) for name, call in calls)
    names = (scope[1] if scope else name for name, scope in scopes)
    return sorted({re.sub(r"(\.\d+|\.refs_\d+_)+$", "", name) for name in names})


def _dtypes(tree: Any) -> str:
    """Returns the floating dtypes of a tree, in words."""
    dtypes = {leaf.dtype for leaf in jax.tree.leaves(tree)}
    floating = sorted(d.name for d in dtypes if jnp.issubdtype(d, jnp.inexact))
    return " and ".join(floating) or "none"


def _bytes_of_a_device(tree: Any) -> int:
    """Sums the bytes that one device holds of a tree, by its shardings."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def _sent(found: Iterable[Collective]) -> dict[str, dict[str, float]]:
    """Sums instructions, runs and bytes sent by kind; see `Plan.sent`."""
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


def _bounds(p: Plan, chip: chips.Chip | None) -> dict[str, float]:
    """Returns seconds that no step can go below, by the vendor's figures.

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


def _own_estimate(compiled: jax.stages.Compiled, hlo: str) -> float | None:
    """Returns the compiler's roofline, which counts loops once; None where it is no figure."""
    try:
        cost = compiled.cost_analysis() or {}
    except Exception:  # a compiler without such an analysis says so by several types
        return None
    seconds = cost.get("optimal_seconds", 0)
    return seconds if seconds > 0 and " while(" not in hlo else None
