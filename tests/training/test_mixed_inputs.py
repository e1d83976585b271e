"""Mixtures, replay and domains by configuration, up to a run that evaluates each."""

import numpy as np
import pytest

from tilescan.data.tokenizers import get_tokenizer
from tilescan.training import inputs
from tilescan.training.config import ConfigError, default_config, override, settings
from tilescan.training.metrics import read_rows
from tilescan.training.train import train


@pytest.fixture
def texts(tmp_path):
    """Two texts of many short documents each, in files."""
    paths = {}
    for letter in "on":
        folder = tmp_path / letter
        folder.mkdir()
        for i in range(30):
            (folder / f"{i}.txt").write_text(letter * (20 + i))
        paths[letter] = str(folder)
    return paths


def config_of(texts, *assignments):
    config = default_config()
    config.data.update(sources=(texts["n"],), seq_len=16, batch_size=8, fractions=(0.6, 0.4, 0.0))
    for assignment in assignments:
        override(config, assignment.format(**texts))
    return config


def datasets_of(texts, *assignments):
    return inputs.make_datasets(settings(config_of(texts, *assignments)))


def letters(batch):
    """Returns which of the rows hold an "o"."""
    return np.array([get_tokenizer("byte").encode("o")[0] in row for row in batch["tokens"]])


REPLAY = ("data.replay=0.25", "data.replay_sources={o}")


def test_replay_is_a_share_of_every_batch(texts):
    found = datasets_of(texts, *REPLAY)
    assert all(letters(found["train"].batch(step)).sum() == 2 for step in range(9))
    assert set(found) == {
        "train", "validation", f"validation/{texts['n']}", f"validation/{texts['o']}"
    }  # fmt: skip
    new, old = (found[f"validation/{texts[x]}"].batch(0) for x in "no")
    assert not letters(new).any() and letters(old)[0]
    assert found["validation"].fingerprint == found[f"validation/{texts['n']}"].fingerprint


def test_without_replay_the_batches_are_those_of_the_new_data(texts):
    plain, none = datasets_of(texts), datasets_of(texts, "data.replay=0.0")
    np.testing.assert_array_equal(
        plain["train"].batch(7)["tokens"], none["train"].batch(7)["tokens"]
    )
    half = datasets_of(texts, "data.replay=0.5", "data.replay_sources={o}")["train"]
    new = [half.batch(s)["tokens"][~letters(half.batch(s))] for s in range(4)]
    want = np.concatenate([plain["train"].batch(s)["tokens"] for s in range(2)])
    np.testing.assert_array_equal(np.concatenate(new), want)


def test_old_data_have_the_order_of_the_run_before(texts):
    """By its seed, whatever this run's."""
    before = datasets_of(texts, "data.sources={o}", "seed=5")["train"]
    now = datasets_of(texts, *REPLAY, "data.replay_seed=5", "seed=1")["train"]
    old = np.concatenate([now.batch(s)["tokens"][letters(now.batch(s))] for s in range(4)])
    np.testing.assert_array_equal(old, before.batch(0)["tokens"])


def test_weights_mix_sources_and_domains_are_evaluated(texts):
    found = datasets_of(texts, "data.sources={o},{n}", "data.weights=(3,1)")
    assert all(letters(found["train"].batch(step)).sum() == 6 for step in range(9))
    apart = datasets_of(texts, "data.eval_sources={o}")
    assert set(apart) == {"train", "validation", f"validation/{texts['o']}"}


def test_a_first_batch_leaves_out_those_before(texts):
    for options in ((), REPLAY, ("data.packing=contiguous",)):
        whole, later = (
            datasets_of(texts, *options, *more)["train"] for more in ((), ("data.first_batch=3",))
        )
        np.testing.assert_array_equal(later.batch(2)["tokens"], whole.batch(5)["tokens"])


@pytest.mark.parametrize(
    ("assignments", "message"),
    [
        (("data.weights=(1,2)",), r"data.weights = \(1, 2\) must be as many as data.sources, 1"),
        (("data.weights=(0,)",), r"data.weights = \(0,\) must be above 0"),
        (("data.replay=0.1",), "replay needs both a share above 0 and sources"),
        (("data.replay_sources={o}",), "replay needs both a share above 0 and sources"),
        (("data.replay=1.0", "data.replay_sources={o}"), r"must be a share, in \[0, 1\)"),
        ((*REPLAY, "data.packing=contiguous"), "a mixture .* would interrupt"),
        ((*REPLAY, "task=classification"), "data.replay is for task = 'language_model'"),
        (("data.first_batch=-1",), "data.first_batch = -1 must be at least 0"),
    ],
)
def test_what_cannot_be_combined_is_refused(texts, assignments, message):
    with pytest.raises(ConfigError, match=message):
        settings(config_of(texts, *assignments))


def test_a_source_without_validation_is_named(texts, tmp_path):
    one = tmp_path / "one.txt"
    one.write_text("alone")
    with pytest.raises(ConfigError, match="eval_sources: .*one.txt has no document for validation"):
        datasets_of(texts, f"data.eval_sources={one}")
    # Of a mixture it is left out: there may be none at all.
    found = datasets_of(texts, *REPLAY, "data.fractions=(1.0,0.0,0.0)")
    assert set(found) == {"train"}


def documents_of(dataset, count=40):
    """Returns the documents of some batches, as bytes; each is whole, in a segment of its own."""
    found = set()
    for step in range(dataset.steps or count):
        batch = dataset.batch(step)
        for tokens, segments in zip(batch["tokens"], batch["segment_ids"], strict=True):
            found |= {tokens[segments == segment].tobytes() for segment in set(segments) - {0}}
    return found


@pytest.mark.parametrize(
    "options",
    [
        ("data.sources={o},{n}", "data.weights=(1,1)"),
        ("data.sources={o},{n}", "data.eval_sources={o}"),
        ("data.sources={n}", "data.replay=0.3", "data.replay_sources={o}"),
    ],
)
def test_no_document_is_trained_on_and_evaluated(texts, options):
    """Though both sources name their documents alike."""
    found = datasets_of(texts, *options, "data.seq_len=64", "data.packing=whole")
    names = [name for name in found if name != "train"]
    assert len(names) > 1
    trained = documents_of(found["train"])
    for name in names:
        held_out = documents_of(found[name])
        assert held_out and not trained & held_out


@pytest.mark.slow
def test_a_run_evaluates_each_domain_and_early(texts, tmp_path):
    config = config_of(texts, *REPLAY, "model.d_model=16", "model.n_heads=2", "model.repeats=1")
    config.train.update(steps=6, eval_every=6, eval_early=True, eval_batches=1, progress=False)
    config.train.update(tensorboard=False, checkpoint_every=0)
    final = train(config, tmp_path / "run")
    domains = [f"validation/{texts[x]}" for x in "no"]
    assert {f"{name}/loss" for name in domains} <= set(final)
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    for name in ("validation", *domains):
        assert [row["step"] for row in rows if row["split"] == name] == [0, 1, 2, 4, 6]
