"""FlashAttention (Dao et al., NeurIPS 2022, arXiv 2205.14135): tables 4, 5, 9 and 11, figure 2.

    tilescan run flash_attention --scale=cpu
    python -m experiments.run --config=configs/flash_attention.py:cpu

Scales:
  smoke        seconds; the whole code path on sizes that show nothing
  cpu          about 12 minutes on 2 cores; about 35 MB of text is downloaded on first use
  accelerator  the paper's own grid of lengths and heads, and longer training; one GPU or TPU

What to expect at scale cpu: tiled attention overtakes standard attention at some hundred tokens and
is about twice as fast at 4096; its memory grows linearly, the standard one's quadratically.
"""

import ml_collections

SCALES = ("smoke", "cpu", "accelerator")


def get_config(scale: str = "cpu") -> ml_collections.ConfigDict:
    """The paper's config; every number may be overridden by --config.section.key=value."""
    if scale not in SCALES:
        raise ValueError(f"scale={scale!r} is unknown; it must be one of {', '.join(SCALES)}")
    config = ml_collections.ConfigDict()
    config.paper = "flash_attention"
    config.scale = scale

    # Time and memory of one attention call. The paper: 8 heads of 64, batch 16, lengths to 64k.
    runtime = config.runtime = ml_collections.ConfigDict()
    runtime.batch = 1
    runtime.heads = 8
    runtime.head_dim = 64
    runtime.dtype = "float32"
    runtime.lengths = (128, 256, 512, 1024, 2048, 4096, 8192)
    runtime.standard_up_to = 4096  # longer: the T x T matrix does not fit beside other work
    runtime.window = 256  # keys that a query sees in the windowed variant
    runtime.block = 128  # side of the butterfly's blocks
    runtime.repeats = 7  # rounds; the table shows medians

    memory = config.memory = ml_collections.ConfigDict()
    memory.lengths = (512, 1024, 2048, 4096, 8192, 16384)  # compiled only

    exactness = config.exactness = ml_collections.ConfigDict()
    exactness.length = 256  # queries and keys
    exactness.kernels = True  # interpret the Pallas kernels as well

    # Memory traffic by counting, figure 2: N = 1024, d = 64, 16 heads, batch 64.
    io = config.io = ml_collections.ConfigDict()
    io.length = 1024
    io.head_dim = 64
    io.on_chip = (8192, 16384, 32768, 65536, 98304)  # elements of 2 bytes; an A100 has 98304
    io.block = 64

    if scale == "smoke":
        runtime.lengths = (64, 128)
        runtime.standard_up_to = 64
        runtime.heads = 2
        runtime.head_dim = 16
        runtime.window = 32
        runtime.block = 32
        runtime.repeats = 1
        memory.lengths = (64, 128)
        exactness.length = 64
        exactness.kernels = False
        io.length = 128
        io.head_dim = 16
        io.on_chip = (1024, 2048)
        io.block = 32
    elif scale == "accelerator":
        runtime.batch = 16
        runtime.dtype = "bfloat16"
        runtime.lengths = tuple(2**k for k in range(7, 17))
        runtime.standard_up_to = 65536  # until the device's memory ends, as in the paper
        runtime.repeats = 30
        memory.lengths = tuple(2**k for k in range(9, 17))
    return config
