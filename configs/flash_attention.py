"""FlashAttention (Dao et al., NeurIPS 2022, arXiv 2205.14135): tables 4, 5, 9 and 11, figure 2.

    tilescan run flash_attention --scale=cpu
    python -m tilescan.experiments.run --config=configs/flash_attention.py:cpu

Scales:
  smoke        seconds; the whole code path on sizes that show nothing
  cpu          15 to 45 minutes on 2 cores, as free as they are, most of it training; about 35 MB
               of text is downloaded on first use
  accelerator  the paper's own grid of lengths and heads, and longer training; one GPU or TPU

What to expect at scale cpu: tiled attention overtakes standard attention at some hundred tokens and
is two to four times as fast at 4096; its memory grows linearly, the standard one's quadratically.
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
    exactness.length = 200  # queries and keys; divides no tile
    exactness.heads = 2
    exactness.head_dim = 64
    exactness.masks = ("full", "causal", "window", "butterfly", "segments", "grouped heads")
    exactness.dtypes = ("float32", "bfloat16")
    exactness.tiles = ("64x64", "32x128")  # queries x keys, beside what the op chooses
    exactness.kernel_tiles = ("128x128", "128x256")  # of the Pallas kernels, interpreted

    # Memory traffic by counting, figure 2: N = 1024, d = 64, 16 heads, batch 64.
    io = config.io = ml_collections.ConfigDict()
    io.length = 1024
    io.head_dim = 64
    io.on_chip = (8192, 16384, 32768, 65536, 98304)  # elements of 2 bytes; an A100 has 98304
    io.lengths = (512, 1024, 2048, 4096)  # with the on-chip memory of the next line
    io.lengths_on_chip = 16384
    io.block = 64

    # The same small GPT trained with standard and with tiled attention.
    curves = config.curves = ml_collections.ConfigDict()
    curves.sources = ("shakespeare",)
    curves.tokenizer = "byte"
    curves.fractions = (0.97, 0.0, 0.03)  # of the documents: train, validation, test
    curves.max_documents = 0  # 0: all
    curves.eval_batches = 0  # 0: all of the test documents
    curves.d_model = 128
    curves.repeats = 2
    curves.n_heads = 4
    curves.position = "rope"
    curves.seq_len = 256
    curves.batch_size = 8
    curves.steps = 100
    curves.learning_rate = 3e-3
    curves.seeds = (0, 1)

    # Table 4: perplexity against context, at equal tokens.
    context = config.context = ml_collections.ConfigDict()
    context.sources = ("shakespeare",)
    context.tokenizer = "byte"
    context.fractions = (0.95, 0.0, 0.05)
    context.max_documents = 0
    context.eval_batches = 0
    context.d_model = 128
    context.repeats = 2
    context.n_heads = 4
    context.position = "alibi"  # in a pilot of seed 0, longer contexts lost with rotary positions
    context.compare_position = "rope"  # the shortest and the longest context with these as well
    context.contexts = (64, 128, 256, 512)
    context.batch_size = 4  # rows of the longest context
    context.steps = 100
    context.learning_rate = 3e-3
    context.seeds = (1, 2, 3)  # not 0, on which positions and the claim's criterion were chosen

    # Table 5: classification against how much of a document is read.
    documents = config.documents = ml_collections.ConfigDict()
    documents.sources = ("bbc_news",)
    documents.tokenizer = "gpt2"
    documents.fractions = (0.8, 0.0, 0.2)
    documents.max_documents = 0
    documents.eval_batches = 0
    documents.d_model = 64
    documents.repeats = 1
    documents.n_heads = 4
    documents.position = "rope"
    documents.lengths = (32, 64, 128, 256)
    documents.batch_size = 32
    documents.steps = 60
    documents.learning_rate = 2e-3
    documents.seeds = (0, 1, 2)

    if scale == "smoke":
        runtime.lengths = (64, 128)
        runtime.standard_up_to = 64
        runtime.heads = 2
        runtime.head_dim = 16
        runtime.window = 32
        runtime.block = 32
        runtime.repeats = 1
        memory.lengths = (64, 128)
        exactness.length = 40
        exactness.head_dim = 16
        exactness.masks = ("causal",)
        exactness.dtypes = ("float32",)
        exactness.tiles = ("16x32",)
        exactness.kernel_tiles = ()
        io.length = 128
        io.head_dim = 16
        io.on_chip = (1024, 2048)
        io.lengths = (64, 128)
        io.lengths_on_chip = 1024
        io.block = 32
        for section in (curves, context, documents):
            section.sources = ("python_stdlib",)  # needs no download
            section.tokenizer = "byte"
            section.max_documents = 12
            section.eval_batches = 2
            section.fractions = (0.8, 0.0, 0.2)
            section.d_model = 16
            section.repeats = 1
            section.n_heads = 2
            section.batch_size = 8
            section.steps = 2
            section.seeds = (0,)
        curves.seq_len = 32
        context.contexts = (16, 32)
        context.compare_position = ""
        documents.lengths = ()  # no labelled text without a download
    elif scale == "accelerator":
        runtime.batch = 16
        runtime.dtype = "bfloat16"
        runtime.lengths = tuple(2**k for k in range(7, 17))
        runtime.standard_up_to = 65536  # until the device's memory ends, as in the paper
        runtime.repeats = 30
        memory.lengths = tuple(2**k for k in range(9, 17))
        curves.steps = 2000
        for section in (curves, context):
            section.d_model = 768  # GPT-2 small
            section.repeats = 12
            section.n_heads = 12
            section.tokenizer = "gpt2"
            section.sources = ("shakespeare", "factbook", "wikipedia")
            section.learning_rate = 6e-4
        curves.seq_len = 1024
        curves.batch_size = 16
        context.position = "rope"
        context.contexts = (1024, 2048, 4096)
        context.compare_position = ""
        context.steps = 2000
        documents.lengths = (64, 128, 256, 512, 1024)
    return config
