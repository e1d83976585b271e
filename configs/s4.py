"""S4 (Gu et al., ICLR 2022, arXiv 2111.00396): tables 2, 4, 6 and 8, and the ablation of figure 3.

    tilescan run s4 --scale=cpu
    python -m tilescan.experiments.run --config=configs/s4.py:cpu

Scales:
  smoke        seconds; the whole code path on sizes that show nothing
  cpu          about 25 minutes on 2 cores; two layers of width 32, less than an epoch of MNIST
  accelerator  the paper's lengths and widths: days on one GPU or TPU

Sequential MNIST and the grey images are the real ones, fetched at first use. Test splits are looked
at once, at the end. S4 has the rate of the paper's configs. The Transformer's is as good as the
best of 0.002, 0.004 and 0.01 by MNIST's validation images (31.5, 31.3, 25.4% right with one seed).

What to expect at scale cpu: exact kernels and recurrences; S4 far above the Transformer on
sequential MNIST (86 and 30% right), tokens at the same speed after 8,192 others as after 256, where
attention takes 33 times as long. Not shown at this scale: ListOps and the images (both models are
near chance after so few steps) and the order of the initialisations (200 steps of small images).
"""

import ml_collections

SCALES = ("smoke", "cpu", "accelerator")


def get_config(scale: str = "cpu") -> ml_collections.ConfigDict:
    """The paper's config; every number may be overridden by --config.section.key=value."""
    if scale not in SCALES:
        raise ValueError(f"scale={scale!r} is unknown; it must be one of {', '.join(SCALES)}")
    config = ml_collections.ConfigDict()
    config.paper = "s4"
    config.scale = scale

    # Kernels against powers of the HiPPO matrix; a sequence at once against token by token.
    exactness = config.exactness = ml_collections.ConfigDict()
    exactness.lengths = (256, 1024, 4096)
    exactness.channels = 16
    exactness.state_dim = 64
    exactness.batch = 2

    # Table 2: a kernel and its gradient, for `channels` systems.
    cost = config.cost = ml_collections.ConfigDict()
    cost.state_dims = (16, 64, 256)
    cost.lengths = (1024, 4096, 16384)
    cost.channels = 8
    cost.ways = ("dense powers", "Cauchy", "powers in blocks", "S4D")
    cost.repeats = 5

    # Table 8: greedy decoding of language models with random parameters.
    generation = config.generation = ml_collections.ConfigDict()
    generation.contexts = (256, 1024, 4096, 8192)
    generation.batch = 4
    generation.tokens = 16
    generation.vocab_size = 256
    generation.layers = 4
    generation.d_model = 128
    generation.state_dim = 64
    generation.attention_d_model = 80
    generation.attention_mlp_dim = 119
    generation.n_heads = 4
    generation.causal = True
    generation.repeats = 5

    # Table 6: sequential MNIST, 784 steps.
    digits = config.digits = _task(
        "sequential_mnist",
        models=("s4", "s4d", "attention"),
        batch_size=16,
        seconds=80.0,
    )
    digits.test_batches = 0  # all 10,000
    digits.attention_mlp_dim = 44

    # Table 4: tasks of the Long Range Arena, at reduced sizes.
    listops = config.listops = _task("listops", bidirectional=True, seconds=45.0)
    listops.examples = (20_000, 1000, 1000)
    listops.max_depth = 4
    listops.max_args = 5
    listops.min_length = 8
    listops.max_length = 64
    config.image = _task("lra_image", bidirectional=True, batch_size=16, steps=250, seconds=90.0)
    pathfinder = config.pathfinder = _task("pathfinder", models=(), bidirectional=True)
    pathfinder.examples = 20_000
    pathfinder.segments = 14

    # Figure 3: initialisations of A, on images of averaged pixels.
    inits = config.inits = _task("sequential_mnist", pool=2, steps=200, seconds=13.0)
    inits.validation_batches = 16
    inits.inits = ("hippo", "lin", "random_nplr", "random_diagonal")
    inits.frozen = (False, True)
    inits.seeds = (0, 1, 2)

    if scale == "smoke":
        _smoke(config)
    elif scale == "accelerator":
        _accelerator(config)
    return config


def _task(task: str, **changes) -> ml_collections.ConfigDict:
    """A section that trains on a task; the Transformer has as many layers and parameters."""
    section = ml_collections.ConfigDict()
    section.task = task
    section.models = ("s4", "attention")
    section.bidirectional = False  # S4; the Transformer sees both sides
    section.layers = 2
    section.d_model = 32
    section.state_dim = 32
    section.attention_d_model = 20
    section.attention_mlp_dim = 70
    section.n_heads = 2
    section.pool = 1  # images are shown as means of so many by so many pixels
    section.batch_size = 32
    section.steps = 400
    section.learning_rate = 1e-2
    section.attention_learning_rate = 4e-3
    section.weight_decay = 0.01
    section.train_examples = 0  # 0: all
    section.evaluations = 2  # validations, beside the one at the start
    section.validation_batches = 64
    section.test_batches = 128  # 0: all
    section.seeds = (0, 1)
    section.seconds = 60.0  # rough duration of a cell
    section.update(changes)
    return section


def _smoke(config) -> None:
    config.exactness.lengths = (32,)
    config.exactness.channels = 4
    config.exactness.state_dim = 8
    config.cost.state_dims = (8,)
    config.cost.lengths = (32,)
    config.cost.channels = 2
    config.cost.repeats = 1
    generation = config.generation
    generation.contexts = (16, 32)
    generation.batch = 1
    generation.tokens = 2
    generation.repeats = 1
    for section in (generation, config.digits, config.listops, config.image, config.inits):
        section.layers = 1
        section.d_model = section.state_dim = 8
        section.attention_d_model = 8
        section.attention_mlp_dim = 8
    # Images that need no download.
    for section in (config.digits, config.inits):
        section.task = "pathfinder"
        section.examples = 40
        section.segments = 6
        section.pool = 8
    config.listops.examples = (40, 8, 8)
    for section in (config.digits, config.listops, config.inits):
        section.batch_size = 8
        section.steps = 2
        section.validation_batches = section.test_batches = 1
        section.seeds = (0,)
    config.digits.models = ("s4d", "attention")
    config.listops.models = ("s4",)
    config.image.models = ()
    config.inits.inits = ("random_nplr",)
    config.inits.frozen = (True,)


def _accelerator(config) -> None:
    config.exactness.lengths = (256, 1024, 4096, 16384)
    cost = config.cost
    cost.state_dims = (128, 256, 512)
    cost.lengths = (1024, 4096, 16384)
    cost.channels = 128
    cost.repeats = 30
    # As wide and deep as the paper's, without its MLPs.
    generation = config.generation
    generation.contexts = (256, 1024, 4096, 16384, 65536)
    generation.batch = 16
    generation.tokens = 64
    generation.vocab_size = 50_257
    generation.layers = 16
    generation.d_model = 1024
    generation.attention_d_model = 768
    generation.attention_mlp_dim = 398
    generation.n_heads = 12
    generation.repeats = 30
    for section in (config.digits, config.listops, config.image, config.pathfinder):
        section.models = ("s4", "attention")
        section.layers = 6
        section.d_model = 256
        section.state_dim = 64
        section.attention_d_model = 144
        section.attention_mlp_dim = 285
        section.n_heads = 8
        section.weight_decay = 0.05
        section.attention_learning_rate = 1e-3
        section.evaluations = 20
        section.validation_batches = section.test_batches = 0
        section.seeds = (0, 1, 2)
        section.seconds = 20_000.0
    config.digits.models = ("s4", "s4d", "attention")
    config.digits.attention_mlp_dim = 229
    _epochs(config.digits, 54_000, 50, 50)
    listops = config.listops
    listops.examples = (96_000, 2000, 2000)
    listops.max_depth = listops.max_args = 10
    listops.min_length, listops.max_length = 500, 2000
    listops.state_dim = 4
    listops.attention_mlp_dim = 179
    _epochs(listops, 96_000, 32, 40)
    config.image.d_model = 512
    config.image.attention_d_model = 288
    config.image.attention_mlp_dim = 453
    _epochs(config.image, 45_000, 50, 200)
    config.pathfinder.examples = 200_000
    config.pathfinder.learning_rate = 4e-3
    _epochs(config.pathfinder, 160_000, 64, 200)
    # Colour, 1,024 steps, as in figure 3.
    inits = config.inits
    inits.task = "sequential_cifar10"
    inits.pool = 1
    inits.layers = 4
    inits.d_model = inits.state_dim = 64
    inits.validation_batches = inits.test_batches = 0
    inits.seconds = 2000.0
    _epochs(inits, 45_000, 50, 50)


def _epochs(section, examples: int, batch_size: int, epochs: int) -> None:
    section.batch_size = batch_size
    section.steps = epochs * examples // batch_size
