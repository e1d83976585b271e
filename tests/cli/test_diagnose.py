"""`tilescan diagnose` on a tiny random checkpoint."""

import jax
import numpy as np
import pytest
import scipy.special
from flax import linen as nn

from tilescan.cli import diagnose as diagnose_mamba2
from tilescan.cli import main as cli
from tilescan.models import LanguageModel, LanguageModelConfig
from tilescan.models.checkpoints import load_pretrained, save_pretrained


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    config = LanguageModelConfig(
        vocab_size=300,
        d_model=16,
        pattern=("mamba2",),
        repeats=1,
        position="none",
        tie_embeddings=False,
        mixers={"mamba2": dict(state_dim=4, head_dim=16)},
    )
    init = jax.jit(LanguageModel(config).init)
    params = nn.unbox(init(jax.random.key(0), np.zeros((1, 4), np.int32)))
    folder = tmp_path_factory.mktemp("diagnose") / "model"
    save_pretrained(folder, config, params["params"])
    return folder


def test_a_checkpoint_is_diagnosed(checkpoint, tmp_path, capsys):
    ids = np.random.default_rng(0).integers(0, 300, (2, 70))
    np.save(tmp_path / "ids.npy", ids)
    figure = tmp_path / "new" / "found.svg"
    argv = ["diagnose", str(checkpoint), "--train-length=16", "--lengths=32,64"]
    assert cli.main([*argv, f"--tokens={tmp_path / 'ids.npy'}", f"--figure={figure}"]) == 0
    out = capsys.readouterr().out
    assert "does not collapse" in out  # a random model has nothing to lose
    config, params = load_pretrained(checkpoint)
    logits, _ = jax.jit(LanguageModel(config).apply)({"params": params}, ids[:, :64])
    scores = np.take_along_axis(scipy.special.log_softmax(logits, -1), ids[:, 1:65, None], axis=2)
    for start, end in ((0, 16), (16, 32), (32, 64)):
        (row,) = [line.split() for line in out.splitlines() if line.split()[:1] == [str(end)]]
        assert float(row[1]) == pytest.approx(float(-scores[:, start:end].mean()), abs=6e-3)
    # One layer: 32 channels of 4 state dims, and 3 inputs of 32 + 2 * 4 channels.
    assert "N_S = 248 state elements" in out
    assert figure.read_text().startswith("<?xml")


def test_the_newline_prompt_needs_no_text(checkpoint, tmp_path, capsys):
    argv = [str(checkpoint), "--train-length=16", "--lengths=32", "--state-window=16"]
    assert diagnose_mamba2.main([*argv, f"--figure={tmp_path / 'a.svg'}"]) == 0
    out = capsys.readouterr().out
    assert "variance" in out and "collapse" not in out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--lengths=8,16"], "one of them above train_length=16"),
        (["--lengths=a"], "must be numbers"),
        (["--lengths=17"], "multiples of one number"),
        (["--newline=300"], "newline=300 is not an id below 300"),
    ],
)
def test_errors_say_what_would_be_right(checkpoint, capsys, options, message):
    assert diagnose_mamba2.main([str(checkpoint), "--train-length=16", *options]) == 1
    assert message in capsys.readouterr().err


def test_ids_of_another_vocabulary_and_short_texts_are_refused(checkpoint, tmp_path, capsys):
    argv = [str(checkpoint), "--train-length=16", "--lengths=32"]
    for name, ids, message in (
        ("wide", np.full(40, 300), "run from 300 to 300"),
        ("short", np.zeros(20, int), "no 33 tokens"),
        ("real", np.zeros(40), "integers"),
    ):
        np.save(tmp_path / f"{name}.npy", ids)
        assert diagnose_mamba2.main([*argv, f"--tokens={tmp_path / name}.npy"]) == 1
        assert message in capsys.readouterr().err
    assert diagnose_mamba2.main([str(tmp_path / "absent"), "--train-length=16"]) == 1
    assert "absent" in capsys.readouterr().err
