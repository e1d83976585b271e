"""Hungry Hungry Hippos (Fu et al., ICLR 2023, arXiv 2212.14052): tables 2 and 3, FlashConv's speed.

    tilescan run h3 --scale=cpu
    python -m tilescan.experiments.run --config=configs/h3.py:cpu

Scales:
  smoke        seconds; the whole code path on sizes that show nothing
  cpu          about 40 minutes on 2 cores; fewer epochs than the paper's synthetic languages have
  accelerator  table 2's own protocol, and 125M parameters on text: a day on one GPU or TPU

What to expect at scale cpu: S4D alone misses the induction head, H3 finds it when the answer alone
trains, and the hybrid solves both languages; H3's associative recall and all of multi-query recall
would need more steps than these and are not shown. On text H3 is ahead of S4D, and both H3 and the
hybrid of attention at these few steps.
"""

import ml_collections

SCALES = ("smoke", "cpu", "accelerator")


def get_config(scale: str = "cpu") -> ml_collections.ConfigDict:
    """The paper's config; every number may be overridden by --config.section.key=value."""
    if scale not in SCALES:
        raise ValueError(f"scale={scale!r} is unknown; it must be one of {', '.join(SCALES)}")
    config = ml_collections.ConfigDict()
    config.paper = "h3"
    config.scale = scale

    # Table 2: two synthetic languages, two layers of width 32, 5000 examples again and again.
    languages = config.languages = ml_collections.ConfigDict()
    languages.models = ("attention", "s4d", "h3", "hybrid")
    languages.protocols = ("answer", "all")  # which positions train
    languages.induction_length = 30
    languages.induction_vocab = 20
    languages.recall_length = 20
    languages.recall_vocab = 10
    languages.d_model = 32
    languages.n_heads = 1
    languages.train_examples = 5000
    languages.batch_size = 32
    languages.epochs = 12
    languages.learning_rate = 2e-3
    languages.eval_batches = 16
    languages.seeds = (0, 1)

    # Multi-query associative recall, new examples at every step.
    mqar = config.mqar = ml_collections.ConfigDict()
    mqar.models = ("attention", "s4d", "h3", "hybrid")
    mqar.length = 64
    mqar.pairs = (4, 8)
    mqar.vocab_size = 128
    mqar.d_model = 64
    mqar.n_heads = 1
    mqar.batch_size = 64
    mqar.steps = 600
    mqar.learning_rate = 3e-3
    mqar.eval_batches = 8
    mqar.seeds = (0, 1)

    # Table 3: language models of equal steps on real text.
    text = config.text = ml_collections.ConfigDict()
    text.models = ("attention", "s4d", "h3", "hybrid")
    text.sources = ("shakespeare",)
    text.tokenizer = "byte"
    text.fractions = (0.8, 0.1, 0.1)
    text.d_model = 96
    text.layers = 4
    text.n_heads = 4
    text.seq_len = 256
    text.batch_size = 8
    text.steps = 300
    text.eval_batches = 32
    text.learning_rate = 3e-3
    text.seeds = (0, 1)

    # FlashConv against the FFT of JAX and attention, forward.
    speed = config.speed = ml_collections.ConfigDict()
    speed.lengths = (512, 1024, 2048, 4096, 8192)
    speed.batch = 1
    speed.channels = 256
    speed.head_dim = 64
    speed.repeats = 5

    if scale == "smoke":
        for section in (languages, mqar, text):
            section.models = ("h3",)
            section.d_model = 16
            section.batch_size = 8
            section.eval_batches = 1
            section.seeds = (0,)
        languages.protocols = ("answer",)
        languages.train_examples = 16
        languages.epochs = 1
        mqar.pairs = (2,)
        mqar.length = 16
        mqar.vocab_size = 32
        mqar.steps = 2
        text.sources = ("python_stdlib",)
        text.layers = 2
        text.n_heads = 2
        text.seq_len = 16
        text.steps = 2
        speed.lengths = (64,)
        speed.channels = 8
        speed.head_dim = 4
        speed.repeats = 1
    elif scale == "accelerator":
        languages.epochs = 400
        languages.learning_rate = 5e-4
        languages.seeds = (0, 1, 2)
        mqar.length = 256
        mqar.pairs = (8, 16, 32, 64)
        mqar.vocab_size = 8192
        mqar.d_model = 128
        mqar.steps = 20_000
        text.sources = ("shakespeare", "factbook", "wikipedia")
        text.tokenizer = "gpt2"
        text.d_model = 768
        text.layers = 12
        text.n_heads = 12
        text.seq_len = 1024
        text.batch_size = 64
        text.steps = 20_000
        text.learning_rate = 6e-4
        speed.lengths = (256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
        speed.batch = 8
        speed.channels = 1024
        speed.repeats = 30
    return config
