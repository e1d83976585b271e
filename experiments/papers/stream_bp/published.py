"""What StreamBP's paper publishes: lengths, times, errors of gradients, differences of losses."""

from tilescan.experiments.papers.stream_bp.losses import CHECKPOINT, DPO, GRPO, NONE, SFT, STREAM
from tilescan.experiments.papers.stream_bp.training import BASE16, STREAM16, STREAM32

# Table 3: thousands of tokens of Qwen3-4B, all parameters trained, on one A800 of 80 GB.
LENGTHS = {
    SFT: {NONE: 7.0, CHECKPOINT: 28.5, STREAM: 200.0},
    GRPO: {CHECKPOINT: 8.5, STREAM: 18.2},
    DPO: {CHECKPOINT: 18.7, STREAM: 57.2},
}
# Table 1: seconds of a backward pass of Qwen3-4B by thousands of tokens, in METHODS' order.
SECONDS = {
    6: (2.0, 2.5, 2.6, 2.6),
    9: (None, 4.7, 4.9, 4.7),
    12: (None, 7.4, 7.6, 7.0),
    15: (None, 10.8, 11.2, 10.0),
    18: (None, 14.7, 15.2, 13.2),
    21: (None, 19.3, 20.3, 17.2),
    24: (None, 24.3, 25.2, 21.2),
    27: (None, None, 31.8, 25.8),
}
TIME_RATIO = 21.2 / 24.3  # StreamBP / checkpointing, at the longest that both reach
# Table 6: mean error of gradients against float32, absolute and in percent.
ERRORS = {
    "head": {STREAM32: (6.66e-9, 0.04), BASE16: (2.56e-7, 1.43), STREAM16: (2.64e-7, 1.47)},
    "layers": {STREAM32: (1.75e-7, 0.04), BASE16: (2.46e-5, 6.63), STREAM16: (2.47e-5, 6.59)},
}
DIFFERENCE = 0.004  # table 7, of losses
