"""Prompts in batches."""

import numpy as np
import pytest
from tiny_writers import tiny_writer

from tilescan.decoding import prompts as prompts_lib
from tilescan.decoding import reader
from tilescan.decoding.prompts import continue_prompts, ids_of, read_prompts
from tilescan.decoding.text import generate_text

PROMPTS = ["To be", "x", "Or not?"]


def test_batches_give_what_each_prompt_alone_does(monkeypatch):
    """In order, whatever is padded, in a last batch that is not full."""
    monkeypatch.setattr(reader, "CHUNKS", (1,))
    writer = tiny_writer()
    answers = list(continue_prompts(writer, PROMPTS, batch_size=2, max_new_tokens=6))
    assert [a.prompt for a in answers] == PROMPTS
    for answer in answers:
        alone = generate_text(writer, answer.prompt, max_new_tokens=6)
        ended = answer.tokens[-1] in writer.ends
        assert (answer.text, len(answer.tokens) - ended) == (alone.text, alone.tokens)
        assert len(answer.logprobs) == len(answer.tokens) and max(answer.logprobs) <= 0
        assert answer.seconds > 0


@pytest.mark.slow
def test_samples_do_not_depend_on_the_size_of_a_batch():
    writer = tiny_writer("attention", "mlp")._replace(ends=())
    drawn = dict(temperature=1.0, top_k=20, top_p=0.9, seed=5)
    sampled = [
        [a.tokens for a in continue_prompts(writer, PROMPTS, batch_size=b, **drawn)]
        for b in (1, 2, 3)
    ]
    assert sampled[0] == sampled[1] == sampled[2]
    # The first prompt's are those of `generate`, and log-probabilities are the model's own.
    [first, *_] = continue_prompts(writer, PROMPTS[:1], **drawn, max_new_tokens=4)
    ids = writer.tokenizer.encode(PROMPTS[0])
    whole = np.asarray([[*ids, *first.tokens]])
    scores, _ = writer.model.apply({"params": writer.params}, whole)
    scores = np.asarray(scores[0] - np.log(np.sum(np.exp(scores[0]), -1, keepdims=True)))
    expected = [scores[len(ids) - 1 + i, t] for i, t in enumerate(first.tokens)]
    np.testing.assert_allclose(first.logprobs, expected, atol=1e-3)


def test_a_prompt_is_a_turn_where_it_is_asked():
    writer = tiny_writer()
    assert bytes(ids_of(writer, "Who?", False).tolist()) == b"Who?"
    assert bytes(ids_of(writer, "Who?", True, "S").tolist()) == b"s:S\nu:Who?\na:"
    assert prompts_lib.padded_length(9) == 16


def test_files_of_prompts():
    assert read_prompts(["a\n", " b\r\n", "c"], "f.txt") == ["a", " b", "c"]
    lines = ['{"prompt": "a\\nb", "id": 3}\n', '"c"\n']
    assert read_prompts(lines, "f.jsonl") == ["a\nb", "c"]
    for lines, name, message in (
        ([], "f.txt", "f.txt holds no prompts"),
        (["a\n", "\n"], "f.txt", "f.txt:2 is empty"),
        (["{"], "f.jsonl", "f.jsonl:1 is not JSON"),
        (['{"text": "a"}'], "f.jsonl", 'f.jsonl:1 must be a string, or an object with "prompt"'),
        (["3"], "f.jsonl", "f.jsonl:1 must be a string"),
    ):
        with pytest.raises(ValueError, match=message):
            read_prompts(lines, name)
