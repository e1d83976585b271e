"""Conversations over a kept state, and the templates of checkpoints."""

import json

import numpy as np
import pytest
from tiny_writers import TURNS, tiny_writer

from tilescan.decoding import chat, reader
from tilescan.decoding.chat import Conversation, is_question
from tilescan.decoding.chat_templates import ChatTemplate, folder_template, gguf_template
from tilescan.decoding.reader import Reader
from tilescan.models.checkpoint_errors import CheckpointError


@pytest.fixture
def single(monkeypatch):
    """One program reads all: sizes of chunks are test_reader's matter."""
    monkeypatch.setattr(reader, "CHUNKS", (1,))
    monkeypatch.setattr(chat, "ROOM", 64)


def logits_after(conversation, ids):
    fresh = Reader(conversation.writer.model, conversation.writer.params)
    return fresh.read(fresh.start(1, 64), np.asarray([ids]))[0]


def test_a_turn_reads_only_what_is_new(single, monkeypatch):
    read, original = [], Reader.read

    def watched(self, reading, tokens, segment_ids=None):
        read.append(tokens.shape[1])
        return original(self, reading, tokens, segment_ids)

    monkeypatch.setattr(Reader, "read", watched)
    talk = Conversation(tiny_writer(), temperature=1.0, seed=1)
    written = []
    first = talk.reply("Hi", max_new_tokens=5, write=written.append)
    assert first.text == "".join(written) and read[0] == len("u:Hi\na:")
    n, tokens = len(read), len(talk.read_ids)
    second = talk.reply("So?", max_new_tokens=5)
    # The first answer was cut: its last token, what ends its turn, and the new one.
    assert first.tokens == 5 and read[n] == len("\nu:So?\na:") + 1
    assert talk.messages[1] == dict(role="assistant", content=first.text)
    assert len(talk.read_ids) == tokens + read[n] + second.tokens - 1
    # What the kept state says is what the conversation read anew says.
    kept, _ = original(talk._reader, talk._reading, np.asarray([[65]]))
    np.testing.assert_allclose(kept, logits_after(talk, [*talk.read_ids, 65]), atol=1e-4)


def test_a_template_that_changes_earlier_turns_is_read_anew(single):
    template = ChatTemplate("{{ messages | length }}" + TURNS, {}, "tiny")
    talk = Conversation(tiny_writer()._replace(template=template), system="S")
    talk.reply("Hi", max_new_tokens=2)
    answer = talk.messages[-1]["content"]
    talk.reply("So?", max_new_tokens=1)
    rendered = f"4s:S\nu:Hi\na:{answer}\nu:So?\na:".encode()
    if "\ufffd" not in answer:
        assert bytes(talk.read_ids[: len(rendered)]) == rendered
    assert talk.read_ids[0] == ord("4")


def test_what_cannot_be_a_turn_is_refused():
    with pytest.raises(ValueError, match="no chat template .* can continue a text, but not chat"):
        Conversation(tiny_writer()._replace(template=None))
    with pytest.raises(ValueError, match="message is empty"):
        Conversation(tiny_writer()).reply(" \n")
    assert is_question("Who? ") and not is_question("Who")


MESSAGES = [dict(role="user", content="<b> & ü"), dict(role="assistant", content="x")]


@pytest.mark.parametrize(
    "source,text",
    [
        # Blocks take their line ends along, as in transformers.
        ("{% for m in messages %}\n{{ m['content'] }}|\n{% endfor %}\n", "<b> & ü|\nx|\n"),
        ("{{ bos_token }}{{ messages[0] | tojson }}", '<s>{"role": "user", "content": "<b> & ü"}'),
        ("{% if tools %}T{% endif %}{% generation %}g{{ messages | length }}{% endgeneration %}",
         "g2"),
        ("{% for m in messages %}{% if loop.index == 2 %}{% break %}{% endif %}m{% endfor %}", "m"),
        ("{{ 'p' if add_generation_prompt }}{{ strftime_now('%Y')[:2] }}", "p20"),
    ],
)  # fmt: skip
def test_templates_are_rendered_as_transformers_does(source, text):
    assert ChatTemplate(source, {"bos_token": "<s>"}, "f").render(MESSAGES) == text


@pytest.mark.parametrize(
    "source,message",
    [
        ("{{ raise_exception('roles must alternate') }}", "f: the chat template fails: roles must"),
        ("{{ messages[7].content.x }}", "f: the chat template fails: "),
        ("{{ ''.__class__.__mro__ }}", "f: the chat template fails: .*unsafe"),
        ("{{ 1 / 0 }}", "f: the chat template fails: division by zero"),
        ("{% for %}", "f: the chat template is not Jinja: "),
    ],
)
def test_templates_that_fail_are_named(source, message):
    with pytest.raises(CheckpointError, match=message):
        ChatTemplate(source, {}, "f").render(MESSAGES)


def test_templates_of_folders_and_files(tmp_path):
    file = tmp_path / "tokenizer_config.json"
    assert folder_template(tmp_path) is None
    several = [dict(name="tool_use", template="t"), dict(name="default", template="d{{eos_token}}")]
    file.write_text(json.dumps(dict(chat_template=several, eos_token={"content": "</s>"})))
    assert folder_template(tmp_path).render([]) == "d</s>"
    (tmp_path / "chat_template.jinja").write_text("j")
    assert folder_template(tmp_path).render([]) == "j"
    (tmp_path / "chat_template.jinja").unlink()
    file.write_text('{"chat_template": 3}')
    with pytest.raises(CheckpointError, match="tokenizer_config.json: chat_template=3 must be a t"):
        folder_template(tmp_path)
    metadata = {"tokenizer.ggml.tokens": [b"<s>", b"a"], "tokenizer.ggml.bos_token_id": 0}
    assert gguf_template(metadata, "f") is None
    metadata["tokenizer.chat_template"] = "{{ bos_token }}{{ eos_token is defined }}"
    assert gguf_template(metadata, "f").render([]) == "<s>False"
