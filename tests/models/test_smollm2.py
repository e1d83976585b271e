"""SmolLM2-135M as published: 93 MB, fetched once; run with `pytest -m slow`."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tilescan.data import sources
from tilescan.data.tokenizers import get_tokenizer
from tilescan.decoding.chat import Conversation
from tilescan.decoding.text import generate_text, load_writer
from tilescan.models import LanguageModel, count_params
from tilescan.models.checkpoints import load_pretrained

pytestmark = pytest.mark.slow

# Of the passage below. `transformers` gives 14.803 for it, run on the weights that save_pretrained
# exports with q and k in half-split order.
PERPLEXITY = 14.8


@pytest.fixture(scope="module")
def smollm2():
    return load_pretrained(sources.fetch("smollm2"))


@pytest.fixture(scope="module")
def passage():
    """The first 1,200 characters of the Factbook's article on Afghanistan: 297 tokens."""
    article = next(d for d in sources.load("factbook") if d.id.endswith("south-asia/af"))
    return get_tokenizer("smollm2").encode(article.text[:1200])


def perplexity(config, params, ids):
    logits = jax.jit(LanguageModel(config).apply)({"params": params}, jnp.asarray(ids)[None])[0]
    scores = jax.nn.log_softmax(logits[0, :-1])
    return float(np.exp(-np.mean(scores[np.arange(len(ids) - 1), ids[1:]])))


def test_shape_is_the_published_one(smollm2):
    config, params = smollm2
    assert (config.repeats, config.d_model, config.n_heads, config.n_kv_heads) == (30, 576, 9, 3)
    assert config.vocab_size == get_tokenizer("smollm2").vocab_size == 49152
    assert count_params(params) == 134_515_008


def test_perplexity_is_the_published_one(smollm2, passage):
    config, params = smollm2
    assert len(passage) == 297
    measured = perplexity(config, params, passage)
    print(f"perplexity {measured:.3f}")
    assert abs(measured / PERPLEXITY - 1) < 0.02
    half_split = dataclasses.replace(config, position="rope")
    assert perplexity(half_split, params, passage) > 8 * PERPLEXITY


def test_it_writes_text():
    written = []
    out = generate_text(
        "smollm2", "The capital of France is", max_new_tokens=8, write=written.append
    )
    assert out.text.startswith(" Paris") and "".join(written) == out.text


def test_it_answers_turn_by_turn():
    """A turn reads what is new, and the whole is what the template gives for it."""
    writer = load_writer("smollm2")
    talk = Conversation(writer)
    assert talk.reply("What is the capital of France?").text == "The capital of France is Paris."
    assert "Berlin" in talk.reply("And of Germany?", max_new_tokens=16).text
    whole = writer.template.render(talk.messages, add_generation_prompt=False)
    ids = writer.tokenizer.encode(whole, allow_special=True).tolist()
    assert ids[: len(talk.read_ids)] == talk.read_ids and len(talk.read_ids) > 60
    kept, _ = talk._reader.read(talk._reading, np.asarray([[5]]))
    again = np.asarray([[*talk.read_ids, 5]])
    logits, _ = jax.jit(writer.model.apply)({"params": writer.params}, again)
    np.testing.assert_allclose(kept, logits[:, -1], atol=1e-3)
