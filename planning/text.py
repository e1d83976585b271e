"""A `Plan` in words: what `tilescan plan` prints."""

import re

from tilescan.planning.chips import CHIPS, GIB
from tilescan.planning.report import Plan
from tilescan.planning.topologies import generation
from tilescan.training.collectives import REMOTE

CAVEATS = (
    "Nothing ran. Bytes are the compiler's and hold for it; FLOPs are formulas, links ideal.",
    "Each bound is what no step can go below, not its time: waiting and overlap are not in it.",
)
_KINDS = (
    ("parameters", "parameters"),
    ("optimizer", "optimizer state"),
    ("batch", "batch"),
    ("temporaries", "temporaries (activations, gradients, buffers)"),
)


def text(p: Plan) -> str:
    """Formats all of a plan."""
    axes = ", ".join(f"{axis} {size}" for axis, size in p.mesh.items() if size > 1) or "data 1"
    part = p.seq_len // p.mesh["sequence"]
    lines = [
        f"devices        {p.devices} x {p.device}",
        f"mesh           {axes}",
        f"parameters     {p.parameters:,}",
        f"dtypes         {', '.join(f'{name} {dtype}' for name, dtype in p.dtypes.items())}",
        f"tokens a step  {p.tokens:,}",
        f"               {p.batch:,} x {p.seq_len:,}; a device holds {part:,} of a sequence",
        f"Pallas kernels {', '.join(p.kernels) or 'none'}",
        *_choices(p),
        *(f"warning: {warning}" for warning in p.warnings),
        *_bytes(p),
        "FLOPs of a step, by formulas (6 x weights x tokens, scores, states):",
        f"  {p.model_operations:>12.4g}  of the model, on sequences of full length",
        f"  {p.step_operations:>12.4g}  with what the backward pass computes again",
        f"  {p.step_operations / p.devices:>12.4g}  of these by a device, if all have equal work",
        *_sent(p),
        *_bounds(p),
        f"compiled in {p.seconds:.1f} s",
        *CAVEATS,
    ]
    return "\n".join(lines)


def verdict(p: Plan) -> str:
    """Says whether it fits, in a few words."""
    if p.memory is None:
        return f"needs {size(p.needs)}; how much a device has is not known (--memory=GIB)"
    more = "at least " if p.at_least else ""
    word = "fits: needs" if p.fits else "does not fit: needs"
    return f"{word} {more}{p.needs / GIB:,.2f} of {p.memory / GIB:,.2f} GiB"


def size(count: float) -> str:
    """Formats bytes in the unit that leaves a few digits."""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= scale / 10:
            return f"{count / scale:,.2f} {unit}"
    return f"{count:,.0f} bytes"


def _choices(p: Plan) -> list[str]:
    """Formats what each op is computed by, and why it is not a kernel."""
    # The reasons end with what to ask for instead, which is what was chosen here.
    lines = ["ops that have a choice:"] if p.choices else []
    for op, chosen in sorted(p.choices.items()):
        for implementation, why in chosen.items():
            why = re.sub(r"[,;]( and| or use)? implementation=.*", "", why or "", flags=re.S)
            lines.append(f"  {op}: " + (f"XLA ({why})" if implementation == "xla" else "kernel"))
    return lines


def _bytes(p: Plan) -> list[str]:
    """Formats what a device holds, and the verdict."""
    lines = ["bytes of a device:"]
    for name, words in _KINDS:
        if name in p.bytes:
            lines.append(f"  {size(p.bytes[name]):>12}  {words}")
    if p.refusal is None:
        new, donated = p.bytes["outputs"], p.bytes["donated"]
        rest = p.needs - sum(p.bytes[name] for name, _ in _KINDS)
        lines.append(f"  {size(rest):>12}  code, padding, results that take no old array's place")
        lines.append(f"  (of {size(new)} of results, {size(donated)} take the old state's place)")
        if p.bytes["peak"] >= p.bytes["temporaries"]:  # on CPUs it lacks them
            lines.append(f"  {size(p.bytes['peak']):>12}  at the same time, as the compiler says")
    if p.bytes.get("host"):
        lines.append(f"  {size(p.bytes['host']):>12}  temporaries in the host's memory, besides")
    lines.append(f"  {verdict(p)}")
    if p.refusal is not None:
        lines.append(f"  the compiler refused: {p.refusal.splitlines()[0]}")
    return lines


def _sent(p: Plan) -> list[str]:
    """Formats what a device sends, by kind."""
    if p.sent is None:
        return []
    lines = ["bytes that a device sends in a step, loops included:"]
    for kind, of in sorted(p.sent.items()):
        more = f", and {of['unknown']} in loops of unknown length" if "unknown" in of else ""
        kind = {REMOTE: "remote copies by kernels, their results once"}.get(kind, kind)
        lines.append(f"  {size(of['bytes']):>12}  {kind}, {of['runs']} runs{more}")
    return lines if p.sent else ["bytes that a device sends in a step: none"]


def _bounds(p: Plan) -> list[str]:
    """Formats the bounds on the time of a step."""
    if not p.bounds:
        return []
    chip = CHIPS[generation(p.topology)]
    words = {
        "compute": f"FLOPs at {chip.flops / 1e12:,.0f} TFLOP/s (dense bfloat16)",
        "memory": f"state, batch and temporaries once at {chip.bandwidth / 1e9:,.0f} GB/s",
        "links": f"bytes sent at {(chip.links or 0) / 1e9:,.0f} GB/s, all links of a chip together",
    }
    lines = [f"bounds of a step by the figures of {chip.name}'s vendor:"]
    lines += [f"  {seconds:>10.4g} s  {words[name]}" for name, seconds in p.bounds.items()]
    if p.compiler_seconds is not None:
        lines.append(f"  {p.compiler_seconds:>10.4g} s  the compiler's own roofline, without links")
    return lines
