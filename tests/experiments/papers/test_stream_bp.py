"""StreamBP's experiments: what its cells build and measure, and what its claims say of numbers."""

import jax
import numpy as np
import pytest

from tilescan.configs.common import SCALES
from tilescan.data.tasks.markov import MarkovChain
from tilescan.experiments.harness import registry as papers
from tilescan.experiments.harness import shared_models
from tilescan.experiments.harness.records import Record, Records
from tilescan.experiments.measurements.compiled import largest_within
from tilescan.experiments.papers.stream_bp import cells, claims, losses, tables, training
from tilescan.models import LanguageModelConfig, abstract_params, count_params, init_params

TINY = dict(vocab_size=16, d_model=8, n_heads=2, n_kv_heads=2, repeats=1, mlp_dim=16)


def record(kind, result, seed=0, **settings):
    cell = "-".join(map(str, (kind, seed, *settings.values())))
    return Record("stream_bp", cell, "", {"kind": kind, **settings}, seed, result, 1.0, {})


def status(records, name):
    return {c.name: c for c in claims.claims(Records(records))}[name].status


def test_cells_are_unique_and_the_model_is_qwen3s():
    for scale in SCALES:
        made = cells.cells(papers.load_config("stream_bp", scale))
        assert len({cell.id for cell in made}) == len(made)
    config = papers.load_config("stream_bp", "cpu")
    assert config.times.chunks == config.memory.chunks  # speed and memory are of one method
    made = cells.cells(config)
    (model,) = {str(c.settings["model"]): c.settings["model"] for c in made[:12]}.values()
    count = count_params(abstract_params(LanguageModelConfig(**model)))
    assert count == pytest.approx(4.02e9, rel=0.01)


@pytest.mark.parametrize("start", [10, 990, 5000])
def test_the_longest_length_is_found_in_few_steps(start):
    asked = []

    def need(n):
        asked.append(n)
        return 40 + 3.0 * n + 1e-4 * n * n

    length, known = largest_within(need, 3100.0, start, 10, 0.02)
    assert length == 980 or need(length + 20) > 3100.0 >= need(length)
    assert len(known) <= 7 and all(n % 10 == 0 for n in known)
    assert largest_within(lambda n: 1e9, 3100.0, 640, 10)[0] == 0


@pytest.mark.slow
def test_the_methods_are_one_gradient():
    """Formulas on whole logits, and streamed ones, on batches of the synthetic task."""
    rng = np.random.default_rng(0)
    chain = MarkovChain(16, 0)
    batches = {loss: training.walks(chain, loss, 4, 12, rng) for loss in losses.LOSSES}
    params = init_params(LanguageModelConfig(**TINY), 0)

    def gradients(method):
        def one(loss, params):
            made = losses.make(loss, method, TINY, chunks=2, logit_chunk=5)
            value, sums = made(params, batches[loss])
            return value / sums["weight"]

        return jax.jit(lambda p: {k: jax.value_and_grad(one, 1)(k, p) for k in losses.LOSSES})(
            params
        )

    got, want = map(gradients, (losses.STREAM, losses.NONE))
    for a, b in zip(*map(jax.tree.leaves, (got, want)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max() + 1e-7)
        assert np.any(b)


def test_answers_are_walks_and_the_better_one_is_chosen():
    chain, rng = MarkovChain(8, 1), np.random.default_rng(0)
    batch = training.walks(chain, "dpo", 64, 20, rng)
    assert batch["tokens"].shape == (64, 20) and set(batch["weights"][0, :5]) == {0.0}
    np.testing.assert_array_equal(batch["tokens"][:, 1:], batch["targets"][:, :-1])
    chosen, rejected = np.split(batch["tokens"], 2)
    np.testing.assert_array_equal(chosen[:, :6], rejected[:, :6])  # one prompt for both
    reward = np.mean(batch["targets"][:, 5:] < 4, axis=1)
    assert np.all(reward[:32] >= reward[32:]) and np.mean(reward[:32] > reward[32:]) > 0.5
    batch = training.walks(chain, "grpo", 8, 20, rng)
    groups = batch["advantages"].reshape(2, 4)
    np.testing.assert_allclose(groups.sum(1), 0, atol=1e-5)
    np.testing.assert_allclose(groups.std(1), 1, atol=0.02)


def test_preference_losses_start_from_one_model():
    """GRPO and DPO ask for the same settings; a batch of its training is one of SFT."""
    asked = []

    class Asked:
        def trained(self, settings, seed, make):
            asked.append(shared_models.digest(settings, seed))
            assert shared_models.training_config(settings, seed).train.steps == 200

    for cell in cells.cells(papers.load_config("stream_bp", "cpu")):
        if cell.settings.get("loss") in ("grpo", "dpo") and cell.settings["kind"] == "parity":
            training.sft_model(cell.settings, cell.seed, Asked())
    assert len(asked) == 6 and len(set(asked)) == 3  # one for both losses of each seed


def lengths(loss, **found):
    return [
        record("memory", {"length": n, "tried": [], "parameters": 1}, loss=loss, method=m)
        for m, n in found.items()
    ]


def test_lengths_are_judged_by_their_ratio():
    name = "longer sequences than with checkpointing, SFT"
    assert status(lengths("sft", checkpoint=1000, stream=3300), name) == "shown"
    assert status(lengths("sft", checkpoint=1000, stream=2400), name) == "not shown"
    published = {"checkpoint": 28_500, "stream": 200_000}  # Table 3
    assert status(lengths("sft", **published), name) == "shown"
    assert status(lengths("sft", stream=7000), name) == "not shown"
    name = "longer sequences than with no checkpointing, SFT"
    assert status(lengths("sft", none=100, stream=3300), name) == "shown"
    assert status(lengths("sft", none=200, stream=3300), name) == "not shown"
    name = "layers save beyond logits"
    good = lengths("sft", mst=1000, stream=2000)
    assert status(good, name) == "shown"
    assert status(good + lengths("dpo", mst=1000, stream=1100), name) == "not shown"


def timed(length, checkpoint, stream):
    times = lambda ms: {"median_ms": ms, "samples_ms": [ms, ms]}
    result = {"checkpoint": times(checkpoint), "stream": times(stream)}
    return record("times", result, length=length, chunks=8)


def test_time_counts_at_the_longest_sequence():
    name = "as fast as checkpointing"
    assert status([timed(10, 1.0, 2.0), timed(20, 2.0, 2.05)], name) == "shown"
    assert status([timed(10, 1.0, 0.5), timed(20, 2.0, 2.2)], name) == "not shown"
    assert status([], name) == "not shown"


def test_memory_must_fall_with_every_number_of_chunks():
    def counted(*needs):
        result = {str(n): {"temp_bytes": b} for n, b in zip((1, 2, 4), needs, strict=True)}
        return [record("counts", result, counts=[1, 2, 4])]

    name = "more chunks, less memory"
    assert status(counted(100, 60, 40), name) == "shown"
    assert status(counted(100, 40, 45), name) == "not shown"
    assert status(counted(100, 80, 60), name) == "not shown"


def test_errors_and_losses_can_refute():
    def precise(stream32, stream16):
        errors = {"stream32": stream32, "base16": 0.02, "stream16": stream16}
        parts = {
            v: {p: {"relative": e, "absolute": e} for p in ("head", "layers")}
            for v, e in errors.items()
        }
        return [record("precision", parts)]

    assert status(precise(1e-6, 0.021), "exact gradients") == "shown"
    assert status(precise(2e-5, 0.021), "exact gradients") == "not shown"
    assert status(precise(1e-6, 0.021), "no worse in bfloat16") == "shown"
    assert status(precise(1e-6, 0.03), "no worse in bfloat16") == "not shown"

    def trained(largest):
        """Of two seeds, whose first is worse."""
        seeds = [{"plain": [1.0], "largest_difference": x} for x in (largest, largest / 2)]
        return [record("parity", result, loss="dpo") for result in seeds]

    assert status(trained(0.003), "same training losses, DPO") == "shown"
    assert status(trained(0.005), "same training losses, DPO") == "not shown"


def test_tables_have_published_numbers_beside_measured_ones():
    made = lengths("sft", checkpoint=1000, stream=3300)
    for r in made:
        r.result["tried"] = [[1000, 2e6], [3000, 6e6]]
        r.settings.update(
            model=TINY | {"dtype": "float32"}, budget_gb=1.0, chunks=2, logit_chunk=4, step=8
        )
    (table,) = [table for table in tables.tables(Records(made)) if table.rows]
    assert table.rows[1] == [
        "SFT",
        "StreamBP",
        200.0,
        pytest.approx(7.018, rel=1e-3),
        3.3,
        3.3,
        2.0,
    ]
