"""What RSA's paper says, as predicates on the records."""

from tilescan.experiments.harness.claims import Claim, judge
from tilescan.experiments.harness.records import Records
from tilescan.experiments.papers.ring_self_attention import tables as t

EXACT = 1e-12
FORMULA = 0.01
FLAT = 0.05
CROSSING = 32
NEAR = 0.1  # of the published crossing
PARITY = 1e-4
GROWTH = 1.44  # published, tensor parallelism's from one to four devices
# Of the published ratios of largest batches and texts, how much must be reached.
SHARE = 0.5


def claims(records: Records) -> list[Claim]:
    """Exactness, volume, memory, largest batches and texts, training."""
    return [
        _exact(records),
        _volume(records),
        _reduce_scatter(records),
        _flat(records),
        _tensor_grows(records),
        _long_texts(records),
        _crossover(records, "kept"),
        _crossover(records, "total"),
        *(_larger(records, vary) for vary in ("batch", "length")),
        _sparse_is_linear(records),
        _parity(records),
        judge(
            "as fast as tensor parallelism",
            "Tokens per second are those of tensor parallelism on as many devices (Table 4).",
            "RSA's tokens per second are at least 0.9 of tensor parallelism's",
            None,
            "published 0.90 to 1.03; not run",
            needs="accelerator, 8 GPUs",
        ),
    ]


def _exact(records: Records) -> Claim:
    worst = {}
    for r in records.select(kind="exactness"):
        for way, errors in r.result.items():
            worst[way] = max(worst.get(way, 0.0), *errors.values())
    return judge(
        "RSA is exact",
        "Ring self-attention computes what dense attention computes.",
        f"float64 outputs and gradients differ by at most {EXACT:g} of the largest value, for both "
        "reductions and any number of devices",
        max(worst.values()) <= EXACT if worst else None,
        ", ".join(f"{way} {error:.1e}" for way, error in worst.items()),
    )


def _volume(records: Records) -> Claim:
    off = {
        name: [abs(t.sent(r, name) / t.formula(r, name) - 1) for r in t.traffic(records)
               if name in r.result]
        for name in ("RSA, all-reduce", "tensor")
    }  # fmt: skip
    off = {name: errors for name, errors in off.items() if errors}
    return judge(
        "RSA sends what tensor parallelism sends",
        "Both send 8 (N - 1) B Z (L / N) A elements for a layer, forward and backward.",
        f"bytes of the compiled layers are within {FORMULA:.0%} of that",
        max(max(errors) for errors in off.values()) <= FORMULA if len(off) == 2 else None,
        ", ".join(f"{t.WAYS.get(n, n)} at most {max(e):.2%} off" for n, e in off.items()),
    )


def _reduce_scatter(records: Records) -> Claim:
    shares = [
        t.sent(r, "RSA, reduce-scatter") / t.sent(r, "RSA, all-reduce") for r in t.traffic(records)
    ]
    return judge(
        "a reduce-scatter saves a quarter",
        "Not in the paper: gradients of keys and values need no all-reduce.",
        f"bytes with reduce-scatters / with all-reduces are 6 / 8 within {FORMULA:.0%}",
        all(abs(share / 0.75 - 1) <= FORMULA for share in shares) if shares else None,
        f"{min(shares):.4g} to {max(shares):.4g}" if shares else "",
    )


def _growth(sizes: dict[int, int]) -> dict[int, float]:
    return {n: size / sizes[min(sizes)] for n, size in sizes.items()}


def _text(growth: dict[int, float]) -> str:
    return ", ".join(f"{value:.4g} on {n}" for n, value in growth.items())


def _flat(records: Records) -> Claim:
    growth = _growth(t.weak(records, "batch", "ring_self_attention"))
    return judge(
        "RSA's memory stays flat when batches grow",
        "Memory of a device stays constant when batches grow with the devices (Table 4).",
        f"over one device's it stays within {FLAT:.0%}",
        all(abs(value - 1) <= FLAT for value in growth.values()) if len(growth) > 1 else None,
        _text(growth),
    )


def _tensor_grows(records: Records) -> Claim:
    growth = _growth(t.weak(records, "batch", "tensor"))
    most = max(growth, default=None)
    holds = None
    if most is not None and most >= 4:
        holds = growth[4] >= 1 + (GROWTH - 1) / 2
    return judge(
        "tensor parallelism's memory grows with batches",
        f"From one to four devices it grows {GROWTH} times (Table 4).",
        "from one to four devices it grows by at least half of that",
        holds,
        _text(growth),
        needs="cpu",
    )


def _long_texts(records: Records) -> Claim:
    ours, theirs = (
        _growth(t.weak(records, "length", way)) for way in ("ring_self_attention", "tensor")
    )
    both = [n for n in ours if n in theirs and n > 1]
    published = t.PUBLISHED_WEAK
    paper = [published["length", 4][i] / published["length", 1][i] for i in (0, 2)]
    return judge(
        "RSA's memory grows less when texts grow",
        f"From one to four devices {paper[1]:.2f} times, and {paper[0]:.2f} times with tensor "
        "parallelism (Table 4).",
        "at every number of devices RSA's memory has grown less",
        all(ours[n] < theirs[n] for n in both) if both else None,
        f"RSA {_text(ours)}; tensor parallelism {_text(theirs)}" if both else "",
    )


def _crossover(records: Records, what: str) -> Claim:
    found = t.crossings(records, what)
    name, said = {
        "kept": ("what is kept", "what lies between the passes, counted in the traced program"),
        "total": ("all buffers", "all that the compiler plans, gradients of inputs included"),
    }[what]
    known = [n for n in found.values() if n is not None]
    holds = None
    if found:
        holds = len(known) == len(found) and all(abs(x / CROSSING - 1) <= NEAR for x in known)
    return judge(
        f"an MLP's crossover at B L = 32 H: {name}",
        "Sequence parallelism needs less memory than tensor parallelism in an MLP if B L > 32 H.",
        f"by {said}, the crossing is within {NEAR:.0%} of 32 on every number of devices",
        holds,
        ", ".join(f"{x:.3g} on {n}" if x is not None else f"none on {n}" for n, x in found.items()),
    )


def _larger(records: Records, vary: str) -> Claim:
    tensor, ours = (t.largest(records, vary, way) for way in ("tensor", "ring_self_attention"))
    published = t.PUBLISHED_LARGEST[vary]
    shares = {n: ours[n] / tensor[n] for n in ours if tensor.get(n)}
    most = max(tensor, default=None)
    holds, evidence = None, ""
    if most and ours and tensor[most]:
        last = max(ours)
        share = ours[last] / tensor[most]
        holds = None if last < 64 else share >= SHARE * published
        evidence = f"{share:.3g} times on {last} against {most}; on as many devices: " + ", ".join(
            f"{value:.3g} on {n}" for n, value in shares.items()
        )
    name = {"batch": "batches", "length": "texts"}[vary]
    return judge(
        f"larger {name} than tensor parallelism",
        f"BERT-Base takes {published:g} times larger {name} by RSA on 64 devices than by tensor "
        "parallelism on 12 (Figures 3 and 4).",
        f"what fits is at least {SHARE:g} of that many times larger",
        holds,
        evidence,
        needs="cpu",
    )


def _sparse_is_linear(records: Records) -> Claim:
    found = t.largest(records, "length", "linformer", "sparse")
    holds = None
    if 32 in found and found.get(1):
        holds = found[32] / found[1] >= SHARE * t.PUBLISHED_SPARSE
    return judge(
        "texts grow with the devices under sparse attention",
        f"With Linformer's attention 32 devices take {t.PUBLISHED_SPARSE:g} times longer texts "
        "than one, above 114,000 tokens.",
        f"the longest text that fits on 32 devices is at least {SHARE:g} of that many times longer",
        holds,
        ", ".join(f"{length:,} on {n}" for n, length in found.items()),
        needs="cpu",
    )


def _parity(records: Records) -> Claim:
    double, single = (t.parity(records, dtype) for dtype in ("float64", "float32"))
    evidence = "" if double is None else f"{double:.1e}"
    if single is not None:
        evidence += f"; {single:.1e} in float32"
    return judge(
        "convergence is the same",
        "Sequence parallelism converges as tensor parallelism does.",
        f"with a float64 model the losses of all steps are within {PARITY:g} of one device's",
        None if double is None else double <= PARITY,
        evidence,
    )
