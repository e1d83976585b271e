"""What RSA's paper says, as predicates on the records."""

from tilescan.experiments.harness import claims as c
from tilescan.experiments.harness.claims import Claim, claim, judge
from tilescan.experiments.harness.records import Records
from tilescan.experiments.harness.statistics import over
from tilescan.experiments.harness.tables import PUBLISHED, RECALLED
from tilescan.experiments.measurements.exactness import worst
from tilescan.experiments.measurements.sharded_training import same_losses
from tilescan.experiments.measurements.traffic import sent_bytes
from tilescan.experiments.papers.ring_self_attention import tables as t
from tilescan.experiments.papers.ring_self_attention.published import LARGEST, MEMORY, SPARSE, SPEED

EXACT = 1e-12
FORMULA = 0.01
FLAT = 0.05
GROWTH = 1.44  # published, tensor parallelism's from one to four devices
CROSSING = 32
NEAR = 0.1  # of the published crossing
SHARE = 0.5  # of the published ratios of largest batches and lengths, how much must be reached
ON = "{1:.4g} on {0}"
# Of an MLP, {key of records: (name, in words)}.
BUFFERS = {
    "kept": ("what is kept", "what lies between the passes, counted in the traced program"),
    "total": ("all buffers", "all that the compiler plans, gradients of inputs included"),
}


def claims(records: Records) -> list[Claim]:
    """Returns what the paper says of exactness, volume, memory, largest sizes, and training."""
    exact = [
        (name, r.result[key])
        for r in records.select(kind="exactness")
        for key, name in t.NAMES.items()
        if key in r.result
    ]
    criterion = (
        f"float64 outputs and gradients differ by at most {EXACT:g} of the largest value, for both "
        "reductions and any number of devices"
    )
    says = "Ring self-attention computes what dense attention computes."
    pairs = [(speed[t.RSA], speed[t.TENSOR]) for speed in SPEED.values()]
    shares = [ours[n] / theirs[n] for ours, theirs in pairs for n in theirs if n > 1]
    return [
        claim("RSA is exact", says, c.at_most(criterion, worst(exact), EXACT)),
        *_volumes(records.select(kind="traffic")),
        *_memory(records),
        *(_crossover(records, what, *words) for what, words in BUFFERS.items()),
        _larger(records, "batch"),
        _larger(records, "length"),
        _sparse_grows(records),
        claim(
            "convergence is the same",
            "Sequence parallelism converges as tensor parallelism does.",
            same_losses(records),
        ),
        c.not_run(
            "as fast as tensor parallelism",
            "Tokens per second are those of tensor parallelism on as many devices (Table 4).",
            "RSA's tokens per second are at least 0.9 of tensor parallelism's",
            "accelerator, 8 GPUs",
            f"published {min(shares):.2f} to {max(shares):.2f}; not run",
            RECALLED,
        ),
    ]


def _volumes(traffic: Records) -> list[Claim]:
    # A ring on two devices sends one message, which the compiler shares between the passes.
    both = lambda r, name: sent_bytes(r, name, "both")
    off = {
        t.NAMES[name]: max(abs(both(r, name) / t.formula(r, name) - 1) for r in found)
        for name in ("rsa_all_reduce", "tensor")
        if (found := [r for r in traffic if name in r.result])
    }
    criterion = (
        f"bytes of the compiled layers are within {FORMULA:.0%} of that on four devices or more"
    )
    shares = [both(r, "rsa_reduce_scatter") / both(r, "rsa_all_reduce") for r in traffic]
    return [
        claim(
            "RSA sends what tensor parallelism sends",
            "Both send 8 (N - 1) B Z (L / N) A elements for a layer, forward and backward.",
            c.at_most(criterion, off if len(off) == 2 else {}, FORMULA, "{} at most {:.2%} off"),
        ),
        judge(
            "a reduce-scatter saves a quarter",
            "Not in the paper: gradients of keys and values need no all-reduce.",
            f"bytes with reduce-scatters / with all-reduces are 6 / 8 within {FORMULA:.0%} on four "
            "devices or more",
            c.near(shares, 0.75, FORMULA),
            f"{min(shares):.4g} to {max(shares):.4g}" if shares else "",
        ),
    ]


def _memory(records: Records) -> list[Claim]:
    flat, tensor, ours, theirs = (
        t.over_one_device(t.weak(records, grows, strategy))
        for grows in ("batch", "length")
        for strategy in (t.RSA, t.TENSOR)
    )
    published = {s: t.over_one_device(sizes)[4] for s, sizes in MEMORY["length"].items()}
    both = [n for n in ours if n in theirs and n > 1]
    return [
        judge(
            "RSA's memory stays flat when batches grow",
            "Memory of a device stays constant when batches grow with the devices (Table 4).",
            f"over one device's it stays within {FLAT:.0%}",
            c.near(flat.values(), 1, FLAT) if len(flat) > 1 else None,
            c.listed(flat, ON),
        ),
        judge(
            "tensor parallelism's memory grows with batches",
            f"From one to four devices it grows {GROWTH} times (Table 4).",
            "from one to four devices it grows by at least half of that",
            tensor[4] >= 1 + (GROWTH - 1) / 2 if 4 in tensor else None,
            c.listed(tensor, ON),
            needs="cpu",
            effect=c.effect_of(GROWTH, tensor.get(4)),
        ),
        judge(
            "RSA's memory grows less when sequences grow",
            f"From one to four devices {published[t.RSA]:.2f} times, and "
            f"{published[t.TENSOR]:.2f} times with tensor parallelism (Table 4).",
            "at every number of devices RSA's memory has grown less",
            c.every(ours[n] < theirs[n] for n in both),
            f"RSA {c.listed(ours, ON)}; tensor parallelism {c.listed(theirs, ON)}" if both else "",
            effect=c.effect_of(published[t.TENSOR] / published[t.RSA], over(theirs, ours).get(4)),
            source=RECALLED,
        ),
    ]


def _crossover(records: Records, what: str, name: str, words: str) -> Claim:
    found = t.crossings(records, what)
    known = [0.0 if x is None else x for x in found.values()]
    return judge(
        f"an MLP's crossover at B L = 32 H: {name}",
        "Sequence parallelism needs less memory than tensor parallelism in an MLP if B L > 32 H.",
        f"by {words}, the crossing is within {NEAR:.0%} of 32 on every number of devices",
        c.near(known, CROSSING, NEAR),
        ", ".join(f"{'none' if x is None else f'{x:.3g}'} on {n}" for n, x in found.items()),
        why="the plan also holds what lives in passing, which the paper's formulas leave out, and "
        "it is more under tensor parallelism: 8 against 6.5 B L H elements on two devices, 4 "
        "against 3.25 on four, 3 against 1.625 on eight",
        effect=c.effect_of(CROSSING, *known, kind="difference"),
    )


def _larger(records: Records, vary: str) -> Claim:
    tensor, ours = (t.largest(records, vary, strategy) for strategy in (t.TENSOR, t.RSA))
    most, last = max(tensor, default=None), max(ours, default=None)
    greater = {"batch": "larger batches", "length": "longer sequences"}[vary]
    share, evidence = None, ""
    if most and last and tensor[most]:
        share = ours[last] / tensor[most]
        evidence = f"{share:.3g} times on {last} against {most}; on as many devices: "
        evidence += c.listed(over(ours, tensor), "{1:.3g} on {0}")
    decided = share is not None and last >= 64
    return judge(
        f"{greater} than tensor parallelism",
        f"BERT-Base takes {LARGEST[vary]:g} times {greater} by RSA on 64 devices than by "
        "tensor parallelism on 12 (Figures 3 and 4).",
        f"what fits is at least {SHARE:g} of that many times larger",
        share >= SHARE * LARGEST[vary] if decided else None,
        evidence,
        needs="cpu",
        effect=c.effect_of(LARGEST[vary], share) if decided else None,
        source=PUBLISHED,
    )


def _sparse_grows(records: Records) -> Claim:
    found = t.largest(records, "length", "linformer", "sparse")
    growth = t.over_one_device(found).get(32)
    return judge(
        "sequences grow with the devices under sparse attention",
        f"With Linformer's attention 32 devices take {SPARSE:g} times longer sequences than one, "
        "above 114,000 tokens.",
        f"the longest sequence that fits on 32 devices is at least {SHARE:g} of that many times "
        "longer",
        None if growth is None else growth >= SHARE * SPARSE,
        c.listed(found, "{1:,} on {0}"),
        needs="cpu",
        effect=c.effect_of(SPARSE, growth),
        source=PUBLISHED,
    )
