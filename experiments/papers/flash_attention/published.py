"""What FlashAttention's paper publishes: times, memory traffic, perplexities, scores."""

from tilescan.experiments.measurements.attention import FORWARD, FORWARD_BACKWARD
from tilescan.experiments.measurements.timing import OUT_OF_MEMORY

# Tables 9 and 11: milliseconds on an A100 with 40 GB, 8 heads of 64, batch 16, with dropout and
# masking, by length.
LENGTHS = tuple(2**k for k in range(7, 17))
MS = {
    FORWARD: {
        "tiled": (0.04, 0.06, 0.21, 0.82, 2.85, 10.41, 41.74, 167.19, 670.76, 2682.35),
    },
    FORWARD_BACKWARD: {
        "standard": (0.84, 0.86, 2.35, 8.29, 31.75, 124.19, OUT_OF_MEMORY),
        "tiled": (0.43, 0.41, 0.95, 2.55, 9.56, 37.49, 147.75, 586.61, 2339.11, 9341.3),
        "block_sparse": (0.44, 0.44, 0.45, 0.89, 1.95, 4.12, 7.64, 16.60, 32.73, 64.11),
    },
}
# Figure 2, left: (standard, tiled) of GPT-2 medium's attention, forward + backward.
GFLOPS, GIGABYTES, A100_MS = (66.6, 75.2), (35.3, 4.4), (35.1, 11.7)
# Table 4: GPT-2 small on OpenWebText, perplexity and days on 8 A100s, by context.
PERPLEXITY = {1024: (18.2, 2.7), 2048: (17.7, 3.0), 4096: (17.2, 3.6)}
# Table 5: micro-averaged F1 in percent by the longest part of a document that is read.
F1 = {
    "MIMIC-III": {512: 52.8, 1024: 50.7, 2048: 51.7, 4096: 54.6, 8192: 56.4, 16384: 57.1},
    "ECtHR": {512: 72.2, 1024: 74.3, 2048: 77.1, 4096: 78.6, 8192: 80.7, 16384: 79.2},
}


def ms(direction: str, variant: str, length: int) -> float | str | None:
    """Returns the published time in ms, OUT_OF_MEMORY, or None where the paper has none."""
    return dict(zip(LENGTHS, MS[direction].get(variant, ()), strict=False)).get(length)
