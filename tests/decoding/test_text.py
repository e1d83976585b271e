"""From text to text, on a tiny random model that writes bytes."""

import dataclasses
import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from flax import linen as nn

from tilescan.data.tokenizers import get_tokenizer
from tilescan.decoding.sampling import generate
from tilescan.decoding.text import Writer, generate_text, load_writer, stream_text
from tilescan.models import LanguageModel, LanguageModelConfig
from tilescan.models.checkpoints import save_pretrained


@pytest.fixture(scope="module")
def config():
    return LanguageModelConfig(
        vocab_size=get_tokenizer("byte").vocab_size,
        d_model=16,
        repeats=1,
        n_heads=2,
        mlp_dim=32,
    )


@pytest.fixture(scope="module")
def params(config):
    tokens = jnp.zeros((1, 2), int)
    shapes = jax.eval_shape(LanguageModel(config).init, jax.random.key(0), tokens)["params"]
    rng = np.random.default_rng(0)
    draw = lambda x: rng.normal(size=x.shape).astype(np.float32)
    return jax.tree.map(draw, nn.unbox(shapes))


def test_text_is_the_decoded_tokens(config, params):
    tokenizer = get_tokenizer("byte")
    writer = Writer(LanguageModel(config), params, tokenizer)
    written = []
    out = generate_text(
        writer, "To be", max_new_tokens=20, temperature=1.0, seed=3, write=written.append
    )
    drawn = generate(
        writer.model,
        params,
        tokenizer.encode("To be")[None],
        max_new_tokens=20,
        temperature=1.0,
        key=jax.random.key(3),
        eos=tokenizer.eos_id,
    )
    text = [t for t in drawn.tokens[0, : int(drawn.lengths[0])] if t != tokenizer.eos_id]
    assert out.text == "".join(written) == tokenizer.decode(text)
    assert out.tokens == len(text)


class Scripted:
    """A tokenizer whose text is a script, whatever is drawn."""

    eos_id = None

    def __init__(self, script: bytes):
        self.script = script

    def encode(self, text, *, allow_special=False):
        return np.frombuffer(text.encode(), np.uint8).astype(np.int32)

    def decode(self, ids):
        return self.script[: len(ids)].decode(errors="replace")


def test_pieces_end_where_characters_do(config, params):
    writer = Writer(LanguageModel(config), params, Scripted("aé€b€".encode()))
    pieces = list(stream_text(writer, "x", max_new_tokens=8))
    assert pieces == ["a", "", "é", "", "", "€", "b", "", "\ufffd"][: len(pieces)]
    assert len(pieces) == 9  # the last character stays unfinished and is shown as such


def test_an_empty_prompt_is_refused(config, params):
    writer = Writer(LanguageModel(config), params, get_tokenizer("byte"))
    with pytest.raises(ValueError, match="prompt is empty"):
        generate_text(writer, "")


def test_more_tokens_than_the_model_was_made_for_are_told(config, params, monkeypatch):
    monkeypatch.setattr("tilescan.decoding.text.stream_text", lambda *args, **options: iter("ab"))
    short = dataclasses.replace(config, max_len=8)
    writer = Writer(LanguageModel(short), params, get_tokenizer("byte"))
    with pytest.warns(UserWarning, match="are 9 tokens, more than the max_len=8 that the model"):
        assert generate_text(writer, "To be", max_new_tokens=4).text == "ab"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        generate_text(writer, "To be", max_new_tokens=3)
        recurrent = dataclasses.replace(short, pattern=("mamba2",))
        writer = writer._replace(model=LanguageModel(recurrent))
        generate_text(writer, "To be", max_new_tokens=100)


def test_a_misspelt_source_and_a_damaged_tokenizer_are_named(config, params, tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint at smolm2: .* fetched: smollm2"):
        load_writer("smolm2")
    save_pretrained(tmp_path, config, params)
    (tmp_path / "tokenizer.json").write_text('{"half')
    with pytest.raises(ValueError, match="tokenizer.json is not a readable tokenizer.json: "):
        load_writer(tmp_path)


def test_a_folder_brings_its_tokenizer(config, params, tmp_path):
    save_pretrained(tmp_path, config, params)
    with pytest.raises(FileNotFoundError, match=r"has no tokenizer.json, and its vocabulary of"):
        load_writer(tmp_path)
    words = tokenizers.models.WordLevel({"a": 0, "b": 1, "</s>": 2}, unk_token="a")
    inner = tokenizers.Tokenizer(words)
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    inner.save(str(tmp_path / "tokenizer.json"))
    seen = []
    writer = load_writer(tmp_path, prepare=lambda early: functools.partial(seen.append, early))
    assert writer.tokenizer.eos_id == 2 and writer.template is None
    # What is compiled meanwhile knows the shapes of the parameters.
    shapes = jax.tree.map(lambda a: (a.shape, a.dtype), (seen[0].params, writer.params))
    assert shapes[0] == shapes[1] and seen[0].model.config == config
    np.testing.assert_array_equal(writer.tokenizer.encode("b a b"), [1, 0, 1])
    assert writer.tokenizer.decode([0, 1]) == "a b"
    tokens = np.asarray([[1, 0]])
    expected, _ = jax.jit(LanguageModel(config).apply)({"params": params}, tokens)
    ours, _ = jax.jit(writer.model.apply)({"params": writer.params}, tokens)
    np.testing.assert_allclose(ours, expected, atol=1e-5)
