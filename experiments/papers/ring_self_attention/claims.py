"""What RSA's paper says, as predicates on the records."""

from tilescan.experiments.harness.claims import Claim, at_most, claim, every, judge, near
from tilescan.experiments.harness.records import Records
from tilescan.experiments.measurements.exactness import worst
from tilescan.experiments.measurements.sharded_training import parity
from tilescan.experiments.measurements.traffic import sent_bytes
from tilescan.experiments.papers.ring_self_attention import tables as t
from tilescan.experiments.papers.ring_self_attention.published import LARGEST, MEMORY, SPARSE, SPEED

EXACT = 1e-12
FORMULA = 0.01
FLAT = 0.05
CROSSING = 32
NEAR = 0.1  # of the published crossing
PARITY = 1e-4
GROWTH = 1.44  # published, tensor parallelism's from one to four devices
# Of the published ratios of largest batches and lengths, how much must be reached.
SHARE = 0.5


def claims(records: Records) -> list[Claim]:
    """Returns what the paper says of exactness, volume, memory, largest sizes, and training."""
    return [
        _exact(records),
        _formula(records),
        _reduce_scatter(records),
        _flat(records),
        _tensor_grows(records),
        _long_sequences(records),
        _crossover(records, "kept", "what lies between the passes, counted in the traced program"),
        _crossover(records, "total", "all that the compiler plans, gradients of inputs included"),
        _larger(records, "batch", "batches"),
        _larger(records, "length", "texts"),
        _sparse_grows(records),
        _converges(records),
        _fast(),
    ]


def _exact(records: Records) -> Claim:
    found = worst(
        (name, r.result[key])
        for r in records.select(kind="exactness")
        for key, name in t.NAMES.items()
        if key in r.result
    )
    criterion = (
        f"float64 outputs and gradients differ by at most {EXACT:g} of the largest value, for both "
        "reductions and any number of devices"
    )
    says = "Ring self-attention computes what dense attention computes."
    return claim("RSA is exact", says, at_most(criterion, found, EXACT))


def _formula(records: Records) -> Claim:
    traffic = records.select(kind="traffic")
    off = {
        t.NAMES[name]: max(abs(sent_bytes(r, name, "both") / t.formula(r, name) - 1) for r in found)
        for name in ("rsa_all_reduce", "tensor")
        if (found := [r for r in traffic if name in r.result])
    }
    criterion = f"bytes of the compiled layers are within {FORMULA:.0%} of that"
    return claim(
        "RSA sends what tensor parallelism sends",
        "Both send 8 (N - 1) B Z (L / N) A elements for a layer, forward and backward.",
        at_most(criterion, off if len(off) == 2 else {}, FORMULA, "{} at most {:.2%} off"),
    )


def _reduce_scatter(records: Records) -> Claim:
    names = ("rsa_reduce_scatter", "rsa_all_reduce")
    sent = [[sent_bytes(r, n, "both") for n in names] for r in records.select(kind="traffic")]
    shares = [scattered / reduced for scattered, reduced in sent]
    return judge(
        "a reduce-scatter saves a quarter",
        "Not in the paper: gradients of keys and values need no all-reduce.",
        f"bytes with reduce-scatters / with all-reduces are 6 / 8 within {FORMULA:.0%}",
        near(shares, 0.75, FORMULA),
        f"{min(shares):.4g} to {max(shares):.4g}" if shares else "",
    )


def _flat(records: Records) -> Claim:
    growth = t.over_one_device(t.weak(records, "batch", t.RSA))
    return judge(
        "RSA's memory stays flat when batches grow",
        "Memory of a device stays constant when batches grow with the devices (Table 4).",
        f"over one device's it stays within {FLAT:.0%}",
        near(growth.values(), 1, FLAT) if len(growth) > 1 else None,
        _listed(growth),
    )


def _tensor_grows(records: Records) -> Claim:
    growth = t.over_one_device(t.weak(records, "batch", t.TENSOR))
    return judge(
        "tensor parallelism's memory grows with batches",
        f"From one to four devices it grows {GROWTH} times (Table 4).",
        "from one to four devices it grows by at least half of that",
        growth[4] >= 1 + (GROWTH - 1) / 2 if max(growth, default=0) >= 4 else None,
        _listed(growth),
        needs="cpu",
    )


def _long_sequences(records: Records) -> Claim:
    ours, theirs = (t.over_one_device(t.weak(records, "length", s)) for s in (t.RSA, t.TENSOR))
    both = [n for n in ours if n in theirs and n > 1]
    published = {s: t.over_one_device(sizes)[4] for s, sizes in MEMORY["length"].items()}
    return judge(
        "RSA's memory grows less when texts grow",
        f"From one to four devices {published[t.RSA]:.2f} times, and {published[t.TENSOR]:.2f} "
        "times with tensor parallelism (Table 4).",
        "at every number of devices RSA's memory has grown less",
        every(ours[n] < theirs[n] for n in both),
        f"RSA {_listed(ours)}; tensor parallelism {_listed(theirs)}" if both else "",
    )


def _crossover(records: Records, what: str, words: str) -> Claim:
    found = t.crossings(records, what)
    name = {"kept": "what is kept", "total": "all buffers"}[what]
    known = [0.0 if x is None else x for x in found.values()]
    return judge(
        f"an MLP's crossover at B L = 32 H: {name}",
        "Sequence parallelism needs less memory than tensor parallelism in an MLP if B L > 32 H.",
        f"by {words}, the crossing is within {NEAR:.0%} of 32 on every number of devices",
        near(known, CROSSING, NEAR),
        ", ".join(f"{'none' if x is None else f'{x:.3g}'} on {n}" for n, x in found.items()),
    )


def _larger(records: Records, vary: str, name: str) -> Claim:
    tensor, ours = (t.largest(records, vary, strategy) for strategy in (t.TENSOR, t.RSA))
    most, last = max(tensor, default=None), max(ours, default=None)
    holds, evidence = None, ""
    if most and last and tensor[most]:
        share = ours[last] / tensor[most]
        holds = share >= SHARE * LARGEST[vary] if last >= 64 else None
        shares = {n: ours[n] / tensor[n] for n in ours if tensor.get(n)}
        evidence = f"{share:.3g} times on {last} against {most}; on as many devices: "
        evidence += _listed(shares, 3)
    return judge(
        f"larger {name} than tensor parallelism",
        f"BERT-Base takes {LARGEST[vary]:g} times larger {name} by RSA on 64 devices than by "
        "tensor parallelism on 12 (Figures 3 and 4).",
        f"what fits is at least {SHARE:g} of that many times larger",
        holds,
        evidence,
        needs="cpu",
    )


def _sparse_grows(records: Records) -> Claim:
    found = t.largest(records, "length", "linformer", "sparse")
    both = 32 in found and found.get(1)
    return judge(
        "texts grow with the devices under sparse attention",
        f"With Linformer's attention 32 devices take {SPARSE:g} times longer texts than one, above "
        "114,000 tokens.",
        f"the longest text that fits on 32 devices is at least {SHARE:g} of that many times longer",
        found[32] / found[1] >= SHARE * SPARSE if both else None,
        ", ".join(f"{length:,} on {n}" for n, length in found.items()),
        needs="cpu",
    )


def _converges(records: Records) -> Claim:
    double, single = (list(parity(records, dtype).values()) for dtype in ("float64", "float32"))
    evidence = [f"{error:.1e}" for error in double] + [f"{x:.1e} in float32" for x in single]
    return judge(
        "convergence is the same",
        "Sequence parallelism converges as tensor parallelism does.",
        f"with a float64 model the losses of all steps are within {PARITY:g} of one device's",
        every(error <= PARITY for error in double),
        "; ".join(evidence),
    )


def _fast() -> Claim:
    pairs = [(s[t.RSA], s[t.TENSOR]) for s in SPEED.values()]
    shares = [ours[n] / theirs[n] for ours, theirs in pairs for n in theirs if n > 1]
    return judge(
        "as fast as tensor parallelism",
        "Tokens per second are those of tensor parallelism on as many devices (Table 4).",
        "RSA's tokens per second are at least 0.9 of tensor parallelism's",
        None,
        f"published {min(shares):.2f} to {max(shares):.2f}; not run",
        needs="accelerator, 8 GPUs",
    )


def _listed(values: dict[int, float], digits: int = 4) -> str:
    return ", ".join(f"{value:.{digits}g} on {n}" for n, value in values.items())
