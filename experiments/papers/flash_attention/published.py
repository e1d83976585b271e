"""What FlashAttention's paper publishes: times, memory traffic, perplexities, scores."""

from tilescan.experiments.harness.statistics import ratio
from tilescan.experiments.measurements.attention import FORWARD, FORWARD_BACKWARD
from tilescan.experiments.measurements.timing import OUT_OF_MEMORY

# Milliseconds on an A100 with 40 GB, 8 heads of 64, batch 16, by length.
LENGTHS = tuple(2**k for k in range(7, 17))
# The numbers of the tables with dropout and padding, MS, and without, PLAIN_MS.
TABLES = {FORWARD: ("Table 9", "Table 18"), FORWARD_BACKWARD: ("Table 11", "Table 20")}
MS = {
    FORWARD: {
        "standard": (0.36, 0.34, 0.78, 2.54, 9.33, 36.33, OUT_OF_MEMORY),
        "tiled": (0.04, 0.06, 0.21, 0.82, 2.85, 10.41, 41.74, 167.19, 670.76, 2682.35),
        "block_sparse": (0.06, 0.06, 0.06, 0.12, 0.44, 0.86, 1.70, 3.29, 6.55, 13.34),
    },
    FORWARD_BACKWARD: {
        "standard": (0.84, 0.86, 2.35, 8.29, 31.75, 124.19, OUT_OF_MEMORY),
        "tiled": (0.43, 0.41, 0.95, 2.55, 9.56, 37.49, 147.75, 586.61, 2339.11, 9341.3),
        "block_sparse": (0.44, 0.44, 0.45, 0.89, 1.95, 4.12, 7.64, 16.60, 32.73, 64.11),
    },
}
PLAIN_MS = {
    FORWARD: {
        "standard": (0.21, 0.22, 0.43, 1.27, 4.32, 16.47, 67.77, OUT_OF_MEMORY),
        "tiled": (0.08, 0.09, 0.18, 0.68, 2.40, 8.42, 33.54, 134.03, 535.95, 2147.05),
        "block_sparse": (0.56, 0.52, 0.63, 0.65, 0.61, 0.96, 1.69, 3.02, 5.69, 11.77),
    },
    FORWARD_BACKWARD: {
        "standard": (0.67, 0.70, 1.18, 3.67, 13.22, 50.44, OUT_OF_MEMORY),
        "tiled": (0.31, 0.31, 0.73, 2.29, 7.64, 30.09, 118.50, 470.51, 1876.08, 7492.85),
        "block_sparse": (0.74, 0.77, 0.82, 0.88, 1.71, 3.21, 6.56, 12.60, 24.93, 50.39),
    },
}
# Table 21: megabytes in use, without dropout and padding.
MEGABYTES = {
    FORWARD_BACKWARD: {
        "standard": (36, 104, 336, 1184, 4416, 17024, OUT_OF_MEMORY),
        "tiled": (22, 44, 104, 209, 418, 836, 1672, 3344, 6688, 13376),
        "block_sparse": (22, 44, 104, 209, 418, 836, 1672, 3344, 6690, 13384),
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


def at(length: int, row: tuple[float | str, ...]) -> float | str | None:
    """Returns the value of a row at a length, OUT_OF_MEMORY, or None where there is none."""
    return dict(zip(LENGTHS, row, strict=False)).get(length)


def over(length: int, rows: dict[str, tuple], slow: str, fast: str) -> float | None:
    """Returns slow / fast of two rows at a length, None where one of them has no number."""
    return ratio(*(at(length, rows.get(name, ())) for name in (slow, fast)))
