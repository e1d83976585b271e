"""Counts what the devices of a compiled program send each other.

    compiled = jax.jit(step).lower(state, batch).compile()
    for c in collectives(compiled.as_text()):
        print(c.kind, c.times, c.sent_bytes)
    print(table(collectives(compiled.as_text())))

Exact counts of what the program says, loops included: no model of links, and no time. Of a choice
among programs all count, as if each ran, but for `models.stream_chunks.in_turn`'s, whose loop runs
each once.
"""

import dataclasses
import math
import re
from collections.abc import Iterable, Sequence

from tilescan.models.stream_chunks import IN_TURN

KINDS = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-broadcast",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
)
REMOTE = "remote-copy"
_BITS = {
    "pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "f16": 16, "bf16": 16,
    "s32": 32, "u32": 32, "f32": 32, "s64": 64, "u64": 64, "f64": 64, "c64": 64, "c128": 128,
}  # fmt: skip
_SHAPE = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
_HEAD = re.compile(r"^(ENTRY )?%?(\S+) \(.*\) -> .* \{$")
_DEFINITION = re.compile(r"^\s*(?:ROOT )?%?(\S+) = (.*)$")
_TRIPS = re.compile(r"known_trip_count\W+n\W+(\d+)")
_WHILE = re.compile(r" while\(%([^)]+)\), condition=%([^\s,]+), body=%([^\s,]+)")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One instruction of a program, for one device.

    Attributes:
      kind: of KINDS, or REMOTE.
      times: how often it runs, as loops around it say; None in a loop whose length the program
        does not know.
      operand_bytes: what a device puts in, each time.
      devices: that take part with it; of a permutation, the pairs of sender and receiver.
      name: where it comes from: the JAX operation, or "".
    """

    kind: str
    times: int | None
    operand_bytes: int
    devices: int
    name: str = ""

    @property
    def sent_bytes(self) -> float | None:
        """What a device sends in all runs, by the algorithms that need least.

        Of n operand bytes and g devices: all-gather n (g - 1); reduce-scatter and all-to-all
        n (g - 1) / g; all-reduce twice that; a permutation n, for a device that sends.
        """
        if self.times is None:
            return None
        g = self.devices
        share = {
            "all-gather": g - 1,
            "all-reduce": 2 * (g - 1) / g if g else 0,
            "reduce-scatter": (g - 1) / g if g else 0,
            "all-to-all": (g - 1) / g if g else 0,
            "ragged-all-to-all": (g - 1) / g if g else 0,
        }.get(self.kind, 1)
        return self.times * self.operand_bytes * share


def collectives(hlo: str) -> list[Collective]:
    """Returns the collectives of a compiled program (its `as_text()`), in the program's order.

    Raises:
      ValueError: the text is not that of a compiled program.
    """
    return [c for c in _all(hlo) if c.kind != REMOTE]


def remote_kernels(hlo: str) -> list[Collective]:
    """Returns the Pallas kernels that copy to other devices themselves, of kind REMOTE.

    A program does not say what they send. Their operand_bytes are those of the result. All-Scan
    sends its state, which is its result, to one other device. A ring's kernels return what they
    compute beside what has arrived: for them it is too much.
    """
    return [c for c in _all(hlo) if c.kind == REMOTE]


def _all(hlo: str) -> list[Collective]:
    computations, entry = _computations(hlo)
    found: list[Collective] = []
    _visit(computations, entry, 1, found, _partitions(hlo))
    return found


def sent_bytes(found: Iterable[Collective]) -> dict[str, float]:
    """Sums the bytes that a device sends, by kind.

    Raises:
      ValueError: a collective in a loop of unknown length.
    """
    total: dict[str, float] = {}
    for c in found:
        if c.sent_bytes is None:
            raise ValueError(f"{c.kind} {c.name!r} is in a loop whose length is not known")
        total[c.kind] = total.get(c.kind, 0.0) + c.sent_bytes
    return total


def table(found: Iterable[Collective]) -> str:
    """Formats a line per kind: how many instructions, runs and bytes sent by a device."""
    found = list(found)
    lines = [f"{'collective':<20} {'instructions':>12} {'runs':>8} {'MiB sent':>10}"]
    for kind in sorted({c.kind for c in found}):
        ours = [c for c in found if c.kind == kind]
        known = [c for c in ours if c.times is not None]
        mark = "" if len(known) == len(ours) else " + loops of unknown length"
        runs, sent = sum(c.times for c in known), sum(c.sent_bytes for c in known)
        lines.append(f"{kind:<20} {len(ours):>12} {runs:>8} {sent / 2**20:>10.2f}{mark}")
    return "\n".join(lines)


def _computations(hlo: str) -> tuple[dict[str, list[str]], str]:
    """Returns {name: its instructions} and the name of the one that runs."""
    computations, entry, lines = {}, None, None
    for line in hlo.splitlines():
        if head := _HEAD.match(line):
            lines = computations.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        elif line == "}" or line.startswith("}, "):
            lines = None
        elif lines and not _DEFINITION.match(line):
            lines[-1] += line  # what a kernel says of itself goes over several lines
        elif lines is not None:
            lines.append(line)
    if entry is None:
        raise ValueError("no ENTRY computation: give the text of a compiled program, as_text()")
    return computations, entry


def _visit(computations, name, times, found, partitions, begun=None):
    """Adds the collectives of a computation that runs `times` times, and of what it calls.

    Libtpu splits an asynchronous collective into parts that lie in several fusions and share a
    channel; `begun` has the channels that were met in the loop body, or the program, around.
    """
    sizes, begun = {}, set() if begun is None else begun
    for line in computations[name]:
        # The instruction, and the bytes of its result: later ones name it as an operand.
        definition = _DEFINITION.match(line)
        if definition is None:
            continue
        result, body = definition[1], definition[2]
        kind, operands = _operation(body)
        sizes[result] = _bytes(body[: body.find(f" {kind}(")]) if kind else 0

        # A collective, counted once however many parts it has.
        base = kind.removesuffix("-start") if kind else None
        if base in KINDS:
            channel = re.search(r"channel_id=(\d+)", body)
            if channel and "async_collective_fusion_config" in body:
                if channel[1] in begun:
                    continue
                begun.add(channel[1])
            if base == "all-reduce" and name.startswith("all-reduce-scatter"):
                base = "reduce-scatter"  # libtpu's fusion: an all-reduce of which a part is kept
            found.append(
                Collective(
                    base,
                    times,
                    sum(sizes.get(operand, 0) for operand in operands),
                    _devices(base, body, partitions),
                    _op_name(body),
                )
            )
            continue
        if kind == "custom-call" and '"mesh_axes"' in body:
            devices = _devices(REMOTE, body, partitions)
            found.append(Collective(REMOTE, times, sizes[result], devices, _op_name(body)))
        if kind is None or kind.endswith("-done"):
            continue

        # What it calls: a loop's body runs as often as the loop does, of IN_TURN's branches one.
        inside = times
        if kind == "while":
            trips = _trips(computations, name, body)
            inside = None if trips is None or times is None else times * trips
        if kind == "conditional" and times is not None and IN_TURN in _op_name(body):
            inside = times // len(_called(body))
        for called in _called(body):
            if called in computations:
                shared = begun if kind == "fusion" else None
                _visit(computations, called, inside, found, partitions, shared)


def _trips(computations, name: str, body: str) -> int | None:
    """Returns how often a loop in a computation runs: as the program says, or as its counter does.

    Libtpu does not say. There the counter is the tuple's first element: it starts at a constant, is
    compared with one, and grows by one.
    """
    if said := _TRIPS.search(body):
        return int(said[1])
    loop = _WHILE.search(f" {body}")
    if loop is None or not {loop[2], loop[3]} <= set(computations):
        return None
    around, condition, inside = (_definitions(computations[c]) for c in (name, *loop.groups()[1:]))
    compared = re.search(r" compare\(%([^,]+), %([^)]+)\), direction=LT", condition["ROOT"])
    counter = compared and re.search(r"\), index=(\d+)", condition.get(compared[1], ""))
    if not counter:
        return None
    index = int(counter[1])
    grown = _constant(inside, _element(inside["ROOT"], index), grows=True)
    bounds = (
        _constant(around, _element(around.get(loop[1], ""), index)),
        _constant(condition, compared[2]),
    )
    return None if grown != 1 or None in bounds else max(0, bounds[1] - bounds[0])


def _definitions(lines: list[str]) -> dict[str, str]:
    """Returns {name: right-hand side}, of the instruction that is the result also as "ROOT"."""
    made = {m[1]: m[2] for line in lines if (m := _DEFINITION.match(line))}
    roots = [
        m[2]
        for line in lines
        if line.lstrip().startswith("ROOT") and (m := _DEFINITION.match(line))
    ]
    return made | {"ROOT": roots[0] if roots else ""}


def _element(body: str, index: int) -> str:
    """Returns the name of an operand of a tuple."""
    kind, operands = _operation(body)
    return operands[index] if kind == "tuple" and index < len(operands) else ""


def _constant(definitions: dict[str, str], name: str, grows: bool = False) -> int | None:
    """Returns the value of a constant; with `grows`, the constant that is added in it."""
    body = definitions.get(name, "")
    kind, operands = _operation(body)
    if kind == "copy":
        return _constant(definitions, operands[0], grows)
    if grows and kind == "add":
        values = [_constant(definitions, operand) for operand in operands]
        return next((v for v in values if v is not None), None)
    value = re.search(r" constant\((-?\d+)\)", body)
    return int(value[1]) if value and not grows else None


def _operation(body: str) -> tuple[str | None, Sequence[str]]:
    """Returns (opcode, names of operands) of an instruction's right-hand side."""
    depth, start = 0, 0
    for i, c in enumerate(body):  # the result's type may be a tuple, with spaces and parentheses
        depth += (c in "([{") - (c in ")]}")
        if c == " " and depth == 0:
            start = i + 1
            break
    match = re.match(r"([\w-]+)\(", body[start:])
    if match is None:
        return None, ()
    end = _closing(body, start + match.end() - 1)
    inner = body[start + match.end() : end]
    return match[1], re.findall(r"%([\w.\-]+)", inner)


def _closing(text: str, start: int) -> int:
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if depth == 0:
            return i
    return len(text)


def _bytes(shapes: str) -> int:
    bits = 0
    for dtype, dims in _SHAPE.findall(shapes):
        size = _BITS.get(dtype, 8 if dtype.startswith("f8") else 0)
        bits += size * math.prod(int(n) for n in dims.split(",") if n)
    return bits // 8


def _called(body: str) -> list[str]:
    """Returns the computations that an instruction runs: loop bodies, branches, calls, fusions."""
    names = re.findall(
        r"(?:body|calls|to_apply|true_computation|false_computation|called_computations)="
        r"\{?%?([\w.\-]+)",
        body,
    )
    for branches in re.findall(r"branch_computations=\{([^}]*)\}", body):
        names += re.findall(r"%?([\w.\-]+)", branches)
    return names


def _devices(kind: str, body: str, partitions: int) -> int:
    """Returns how many devices take part together."""
    if kind == "collective-permute":
        pairs = re.search(r"source_target_pairs=\{((?:\{[^}]*\},?)*)\}", body)
        return pairs[1].count("{") if pairs else 0
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\] ?\{([^}]*)\}", body):
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", named[1]))
        size = 1
        for axis in re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", named[2]):
            size *= int(axis[1] or sizes[axis[0]])
        return size
    if iota := re.search(r"replica_groups=\[\d+,(\d+)\]", body):
        return int(iota[1])
    if groups := re.search(r"replica_groups=\{\{([\d,]*)\}", body):
        return len(groups[1].split(","))
    return partitions


def _partitions(hlo: str) -> int:
    found = [int(n) for n in re.findall(r"(?:num_partitions|replica_count)=(\d+)", hlo)]
    return max(found, default=1)


def _op_name(body: str) -> str:
    match = re.search(r'op_name="([^"]*)"', body)
    return match[1] if match else ""
