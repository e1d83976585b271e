"""S4 (Gu et al., ICLR 2022, arXiv 2111.00396): tables 2, 4, 6 and 8, figures 3 and 4a.

    tilescan run s4 --scale=cpu
    python -m tilescan.experiments.run --config=configs/s4.py:cpu

Scales:
  smoke        seconds; the whole code path on sizes that show nothing
  cpu          about an hour on 2 cores with --jobs=2; two layers of width 32
  accelerator  the paper's lengths and widths: days on one GPU or TPU

Sequential MNIST and the gray images are the real ones, fetched at first use. Test splits are looked
at once, at the end. S4 has the rate of the paper's configs. The Transformer's is as good as the
best of 0.002, 0.004 and 0.01 by MNIST's validation images (31.5, 31.3, 25.4% right with one seed).

What to expect at scale cpu: exact kernels and recurrences, and tokens at the same speed after 8,192
others as after 256. S4 is ahead of the Transformer on sequential MNIST (85 and 29% right), ListOps
(53 and 43%) and averaged gray images (43 and 31%), after as many examples as the tables say. Where
all fit 200 digits, HiPPO is 22 points above a random dense matrix on others.
"""

from typing import Any

from ml_collections import ConfigDict

from tilescan.configs.common import paper, section


def get_config(scale: str = "cpu") -> ConfigDict:
    """Returns the paper's config; --config.section.key=value overrides any of its values."""
    config = paper("s4", scale)
    # Kernels against powers of the HiPPO matrix; a sequence at once against token by token.
    config.exactness = section(seq_lens=(256, 1024, 4096), channels=16, state_dim=64, batch_size=2)
    # Table 2: a kernel and its gradient, for `channels` systems.
    config.cost = section(state_dims=(16, 64, 256), seq_lens=(1024, 4096, 16384), channels=8)
    config.cost.update(strategies=("dense powers", "Cauchy", "powers in blocks", "S4D"), rounds=5)
    # Table 8: greedy decoding of language models with random parameters.
    config.generation = section(contexts=(256, 1024, 4096, 8192), batch_size=4, tokens=16, rounds=5)
    config.generation.update(vocab_size=256, n_layers=4, d_model=128, state_dim=64, n_heads=4)
    config.generation.update(attention_d_model=80, attention_mlp_dim=119)
    config.generation.update(bidirectional=False, causal=True)
    # Table 6: sequential MNIST, 784 steps; all 10,000 test images.
    config.digits = _task("sequential_mnist", batch_size=16, test_batches=0, seconds=80.0)
    config.digits.update(models=("s4", "s4d", "attention"), attention_mlp_dim=44)
    # Table 4: tasks of the Long Range Arena, at reduced sizes.
    config.listops = _task("listops", bidirectional=True, steps=3000, test_batches=0, seconds=100.0)
    config.listops.options = section(
        examples=(20_000, 1000, 4000), max_depth=4, max_args=5, min_length=8, max_length=64
    )
    config.image = _task("lra_image", bidirectional=True, pool=2, steps=1500, seconds=140.0)
    config.image.test_batches = 0
    config.pathfinder = _task("pathfinder", bidirectional=True, models=())
    config.pathfinder.options = section(examples=20_000, segments=14)
    # Figures 3 and 4a: what A starts from, trained on few images, so that these can be fitted: of
    # 500 a random dense A had three quarters right after 1,376 of 1,600 steps (training, seed 91).
    config.inits = _task("sequential_mnist", pool=2, steps=2000, train_examples=200)
    config.inits.update(weight_decay=0.0, frozen=(False,), seconds=80.0)
    config.inits.inits = ("hippo", "random_nplr", "dense_hippo", "dense_random", "random_diagonal")
    if scale == "smoke":
        _shrink(config)
    elif scale == "accelerator":
        _enlarge(config)
    return config


def _task(task: str, **changes: Any) -> ConfigDict:
    """Returns a section that trains on a task; the Transformer has as many layers, parameters."""
    values = dict(
        task=task,
        options={},
        models=("s4", "attention"),
        bidirectional=False,  # S4
        causal=False,  # the Transformer
        n_layers=2,
        d_model=32,
        state_dim=32,
        attention_d_model=20,
        attention_mlp_dim=70,
        n_heads=2,
        pool=1,  # images are shown as means of so many by so many pixels
        batch_size=32,
        steps=400,
        learning_rate=1e-2,
        attention_learning_rate=4e-3,
        weight_decay=0.01,
        train_examples=0,  # 0: all
        evaluations=2,  # validations, beside the one at the start
        validation_batches=64,
        test_batches=128,  # 0: all
        seeds=(0, 1, 2),
        seconds=60.0,  # rough duration of a cell
    )
    return section(**values | changes)


def _shrink(config: ConfigDict) -> None:
    """Sets sizes that show nothing, and images that need no download."""
    config.exactness.update(seq_lens=(32,), channels=4, state_dim=8)
    config.cost.update(state_dims=(8,), seq_lens=(32,), channels=2, rounds=1)
    config.generation.update(contexts=(16, 32), batch_size=1, tokens=2, rounds=1)
    for part in (config.generation, config.digits, config.listops, config.inits):
        part.update(n_layers=1, d_model=8, state_dim=8, attention_d_model=8, attention_mlp_dim=8)
    trained = dict(batch_size=8, steps=2, validation_batches=1, test_batches=1, seeds=(0,))
    images = dict(task="pathfinder", options={"examples": 40, "segments": 6}, pool=8)
    config.digits.update(models=("s4d", "attention"), **images, **trained)
    config.listops.update(models=("s4",), **trained)
    config.listops.options.examples = (40, 8, 8)
    config.image.models = ()
    config.inits.update(inits=("dense_random",), **images, **trained)


def _enlarge(config: ConfigDict) -> None:
    """Sets the paper's lengths, widths and epochs."""
    config.exactness.seq_lens = (256, 1024, 4096, 16384)
    config.cost.update(state_dims=(128, 256, 512), channels=128, rounds=30)
    # As wide and deep as the paper's, without its MLPs.
    generation = config.generation
    generation.update(contexts=(256, 1024, 4096, 16384, 65536), batch_size=16, tokens=64, rounds=30)
    generation.update(vocab_size=50_257, n_layers=16, d_model=1024, n_heads=12)
    generation.update(attention_d_model=768, attention_mlp_dim=398)
    everything = dict(validation_batches=0, test_batches=0)
    for part in (config.digits, config.listops, config.image, config.pathfinder):
        part.update(n_layers=6, d_model=256, state_dim=64, n_heads=8, seeds=(0, 1, 2))
        part.update(attention_d_model=144, attention_mlp_dim=285, attention_learning_rate=1e-3)
        part.update(weight_decay=0.05, evaluations=20, seconds=20_000.0, **everything)
    config.digits.update(attention_mlp_dim=229, **_epochs(54_000, 50, 50))
    config.listops.update(state_dim=4, attention_mlp_dim=179, **_epochs(96_000, 32, 40))
    config.listops.options.update(examples=(96_000, 2000, 2000), max_depth=10, max_args=10)
    config.listops.options.update(min_length=500, max_length=2000)
    config.image.update(
        d_model=512, attention_d_model=288, attention_mlp_dim=453, **_epochs(45_000, 50, 200)
    )
    config.image.pool = 1
    config.pathfinder.update(models=("s4", "attention"), learning_rate=4e-3)
    config.pathfinder.update(**_epochs(160_000, 64, 200))
    config.pathfinder.options.examples = 200_000
    # Color, 1,024 steps, as in figure 3.
    config.inits.update(task="sequential_cifar10", pool=1, seconds=2000.0, **everything)
    config.inits.update(train_examples=0, frozen=(False, True))
    config.inits.update(n_layers=4, d_model=64, state_dim=64, **_epochs(45_000, 50, 50))


def _epochs(examples: int, batch_size: int, epochs: int) -> dict[str, int]:
    """Returns the batch size, and the steps of so many epochs."""
    return {"batch_size": batch_size, "steps": epochs * examples // batch_size}
