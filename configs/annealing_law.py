"""Scaling Law with Learning Rate Annealing (arXiv 2408.11029): whole loss curves from their rates.

    tilescan run annealing_law --scale=cpu
    python -m tilescan.experiments.run --config=configs/annealing_law.py:cpu

Scales:
  smoke        seconds; the whole code path on sizes that show nothing
  cpu          about 20 minutes on 2 cores with --jobs=2
  accelerator  60M parameters for 20,000 steps: a day on one GPU or TPU

The published curves are those of 25M, 100M and 400M parameters in the repository
thu-yao-01-luo/MultiPowerLaw on GitHub, folder loss_curve_repo: download it as a zip file, then
`tilescan data add loss_curves FILE`. Own runs are byte-level language models on Shakespeare. The
law is fitted to a cosine and a constant rate alone. The paper's lambda of 0.999 remembers 1,000
steps; runs of 3,000 have 0.99, which was set before they were measured.
"""

from ml_collections import ConfigDict

from tilescan.configs.common import paper, section, set_steps, smoke, training

FITTED = ("cosine", "constant")


def get_config(scale: str = "cpu") -> ConfigDict:
    """Returns the paper's config; --config.section.key=value overrides any of its values."""
    config = paper("annealing_law", scale)
    config.published = section(
        sizes=(25, 100, 400), fitted=("cosine_24000", "constant_24000"), decay=0.999
    )
    config.own = section(d_model=64, repeats=2, n_heads=4, decay=0.99, seeds=(0, 1, 2))
    config.own.fitted = FITTED
    config.own.train = training(
        steps=3000, learning_rate=2e-3, batch_size=8, eval_batches=8, seq_len=128,
        sources=("shakespeare",), tokenizer="byte", fractions=(0.9, 0.1, 0.0),
    )  # fmt: skip
    config.own.train.train.eval_every = 20
    config.own.train.optimizer.warmup_steps = 100
    config.own.schedules = _schedules(3000)
    if scale == "smoke":
        config.published.sizes = ()
        smoke(config, models=())
        few = {name: _schedules(12)[name] for name in (*FITTED, "wsd")}
        config.own.update(n_heads=2, repeats=1, schedules=few)
        set_steps(config.own.train, 12, eval_batches=1)
        config.own.train.train.eval_every = 2
    elif scale == "accelerator":
        config.own.update(d_model=512, repeats=8, n_heads=8, decay=0.999)
        config.own.schedules = _schedules(20_000)
        set_steps(config.own.train, 20_000)
        config.own.train.train.eval_every = 100
        config.own.train.optimizer.update(learning_rate=3e-4, warmup_steps=500)
        config.own.train.data.update(sources=("shakespeare", "factbook", "wikipedia"))
        config.own.train.data.update(tokenizer="gpt2", seq_len=1024, batch_size=64)
    return config


def _schedules(steps: int) -> dict[str, dict]:
    """Returns the schedules of own runs: fields of training's section optimizer."""
    return {
        "cosine": {"schedule": "cosine"},
        "constant": {"schedule": "constant"},
        "wsd": {"schedule": "wsd", "decay_steps": steps // 5},
        "wsd_sqrt": {"schedule": "wsd", "decay_steps": steps // 10, "decay_shape": "sqrt"},
        "two_step": {
            "schedule": "multi_step",
            "milestones": (3 * steps // 5, 4 * steps // 5),
            "milestone_factor": 0.316,
        },
        "rewarmed": {
            "schedule": "rewarmed",
            "rewarm_start": steps // 2,
            "rewarm_steps": max(1, steps // 60),
        },
        # Where the law is known to fail: ten times the peak, and rates of 0 at the end.
        "hot": {"schedule": "cosine", "learning_rate_times": 10.0},
        "idle": {"schedule": "linear", "final_fraction": 0.0, "end_step": 4 * steps // 5},
    }
