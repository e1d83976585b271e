"""Which tokens end a text, by what a checkpoint's files say; text to text with them."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from flax import linen as nn

from tilescan.data.tokenizers import GGUFTokenizer
from tilescan.decoding.chat import turn_ids
from tilescan.decoding.folder_tokenizers import FolderTokenizer, read_ends
from tilescan.decoding.text import Writer, generate_text, load_writer
from tilescan.models import LanguageModel, LanguageModelConfig
from tilescan.models.checkpoint_errors import CheckpointError
from tilescan.models.checkpoints import save_pretrained

WORDS = [f"w{i}" for i in range(20)] + ["</s>", "<|im_end|>", "<|eot_id|>"]
END, IM_END, EOT = 20, 21, 22
V = len(WORDS)
CONFIG = LanguageModelConfig(vocab_size=V, d_model=16, repeats=1, n_heads=2, mlp_dim=16)


def id_of(token):
    return WORDS.index(token) if token in WORDS else None


def write(folder, **files):
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        suffix = "jinja" if name == "chat_template" else "json"
        (folder / f"{name}.{suffix}").write_text(text)


TOKEN, CHAT = "tokenizer_config", "{{ message }}<|im_end|>\n"


@pytest.mark.parametrize(
    "files,expected",
    [
        (dict(config={"eos_token_id": 3}), (3,)),
        (dict(config={"eos_token_id": [3, 5, 3]}), (3, 5)),
        (dict(config={"eos_token_id": 3}, generation_config={"eos_token_id": 4}), (4,)),
        (dict(config={"eos_token_id": 3}, generation_config={"eos_token_id": [4, 6]}), (4, 6)),
        (dict(config={"eos_token_id": [3]}, generation_config={}), (3,)),
        (dict(config={"eos_token_id": 3}, generation_config={"eos_token_id": None}), (3,)),
        (dict(generation_config={"eos_token_id": 0}), (0,)),
        ({"config": {"eos_token_id": 3}, TOKEN: {"eos_token": "w7"}}, (3, 7)),
        ({"config": {"eos_token_id": 3}, TOKEN: {"eos_token": {"content": "w7"}}}, (3, 7)),
        ({"config": {"eos_token_id": 3}, TOKEN: {"eos_token": None}}, (3,)),
        ({TOKEN: {"eos_token": "</s>"}}, (END,)),
        # A chat model stops where its template ends a turn.
        ({"config": {"eos_token_id": 3}, TOKEN: {"chat_template": CHAT}}, (3, IM_END)),
        (
            {
                "config": {"eos_token_id": 3},
                TOKEN: {"chat_template": [{"name": "default", "template": CHAT}]},
            },
            (3, IM_END),
        ),
        (dict(config={"eos_token_id": 3}, chat_template="<|eot_id|>"), (3, EOT)),
        (dict(config={"eos_token_id": 3}, chat_template="<|eom_id|> is not a token here"), (3,)),
        # Where nothing is said: what is spelled like an end.
        ({}, (END, IM_END, EOT)),
        (dict(config={}), (END, IM_END, EOT)),
    ],
)
def test_ends_by_what_the_files_say(tmp_path, files, expected):
    write(tmp_path, **files)
    assert read_ends(tmp_path, id_of, V) == expected


@pytest.mark.parametrize("name", ["config", "generation_config"])
@pytest.mark.parametrize("value", ["</s>", 2.0, True, [2, "3"], [[2]], {"id": 2}])
def test_ends_of_a_wrong_type_are_named(tmp_path, name, value):
    write(tmp_path, **{name: {"eos_token_id": value}})
    with pytest.raises(CheckpointError, match=rf"/{name}.json: eos_token_id=.* must be an integer"):
        read_ends(tmp_path, id_of, V)


def test_other_faults_of_the_files_are_named(tmp_path):
    write(tmp_path, tokenizer_config={"eos_token": 2})
    with pytest.raises(CheckpointError, match="tokenizer_config.json: eos_token=2 must be a token"):
        read_ends(tmp_path, id_of, V)
    for content in ("{", "[1]", "[" * 100_000, '{"a": 1, "a": 2}'):
        write(tmp_path, generation_config=content)
        with pytest.raises(CheckpointError, match="generation_config.json is not a configuration"):
            read_ends(tmp_path, id_of, V)


def test_ends_that_cannot_be_drawn_are_told(tmp_path):
    write(tmp_path, config={"eos_token_id": [3, V, -1]})
    with pytest.warns(UserWarning, match=rf"config.json: eos_token_id=({V}|-1) is outside"):
        assert read_ends(tmp_path, id_of, V) == (3,)
    write(tmp_path, config={"eos_token_id": 50256})
    with pytest.warns(UserWarning, match="eos_token_id=50256 is outside the vocabulary 0..22"):
        assert read_ends(tmp_path, id_of, V) == (END, IM_END, EOT)
    write(tmp_path, config={}, tokenizer_config={"eos_token": "<eos>"})
    with pytest.warns(UserWarning, match="eos_token='<eos>' is not a token of the vocabulary"):
        assert read_ends(tmp_path, id_of, V) == (END, IM_END, EOT)


def word_level():
    inner = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="w0")
    )
    inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return inner


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint")
    tokens = jnp.zeros((1, 2), int)
    shapes = jax.eval_shape(LanguageModel(CONFIG).init, jax.random.key(0), tokens)["params"]
    rng = np.random.default_rng(0)
    draw = lambda x: rng.normal(size=x.shape).astype(np.float32)
    save_pretrained(path, CONFIG, jax.tree.map(draw, nn.unbox(shapes)))
    word_level().save(str(path / "tokenizer.json"))
    return path


@pytest.mark.slow
def test_text_stops_at_every_end_of_a_folder(folder):
    """Ends chosen among what the model writes anyway: the text stops before the first of them."""
    settings = dict(max_new_tokens=12, temperature=4.0, seed=2)
    writer = load_writer(folder)
    whole = generate_text(writer._replace(ends=()), "w3 w4", **settings)
    words = whole.text.split()
    assert len(words) == whole.tokens == 12 and whole.text.startswith(" w")
    first = next(i for i in range(2, 12) if words[i] not in words[:i])
    (folder / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [WORDS.index(words[first]), 0]})
    )
    stopped = load_writer(folder)
    assert stopped.ends == (WORDS.index(words[first]), 0)
    end = min(i for i, word in enumerate(words) if WORDS.index(word) in stopped.ends)
    out = generate_text(stopped, "w3 w4", **settings)
    assert out.text.split() == words[:end] and out.tokens == end
    # A tokenizer alone says it as well.
    same = Writer(stopped.model, stopped.params, stopped.tokenizer)
    assert generate_text(same, "w3 w4", **settings).text == out.text


def test_a_prompt_is_never_cut_or_filled_up(tmp_path):
    inner = word_level()
    inner.enable_truncation(3)
    inner.enable_padding(length=8)
    inner.save(str(tmp_path / "tokenizer.json"))
    tokenizer = FolderTokenizer(tmp_path, V)
    assert tokenizer.encode("w1 w2 w3 w4 w5").tolist() == [1, 2, 3, 4, 5]


def test_a_turn_does_not_begin_as_a_text_does(tmp_path):
    inner = word_level()
    inner.post_processor = tokenizers.processors.TemplateProcessing(
        single="w9 $A", special_tokens=[("w9", 9)]
    )
    inner.save(str(tmp_path / "tokenizer.json"))
    tokenizer = FolderTokenizer(tmp_path, V)
    assert tokenizer.encode("w1 w2").tolist() == [9, 1, 2]
    assert turn_ids(Writer(None, None, tokenizer), "w1 w2").tolist() == [1, 2]


def test_special_tokens_in_plain_text_are_text(tmp_path):
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    inner = tokenizers.Tokenizer(
        tokenizers.models.BPE({c: i for i, c in enumerate([*alphabet, "</s>"])}, [])
    )
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    inner.add_special_tokens(["</s>"])
    inner.save(str(tmp_path / "tokenizer.json"))
    tokenizer = FolderTokenizer(tmp_path, 257)
    assert tokenizer.encode("a</s>", allow_special=True)[-1] == tokenizer.eos_id == 256
    assert tokenizer.encode("a</s>").size == 5
    for text in ("\ud800", "a\udfff", "\ud83d\ude42"):
        with pytest.raises(ValueError, match="text holds a lone surrogate, U\\+D"):
            tokenizer.encode(text)


@pytest.mark.parametrize(
    "settings,error,message",
    [
        (dict(prompt="a\udcff"), ValueError, r"prompt holds a lone surrogate, U\+DCFF, at .* 1:"),
        (dict(prompt=b"a"), TypeError, "prompt must be a str, got bytes"),
        (dict(prompt=None), TypeError, "prompt must be a str, got NoneType"),
        (dict(temperature=float("nan")), ValueError, "temperature=nan must be 0"),
        (dict(temperature=-1.0), ValueError, "temperature=-1.0 must be 0"),
        (dict(top_p=1.5), ValueError, "top_p=1.5 must be in"),
        (dict(top_k=0), ValueError, "top_k=0 must be at least 1"),
        (dict(max_new_tokens=0), ValueError, "max_new_tokens=0 must be at least 1"),
        (dict(max_new_tokens=2.0), TypeError, "max_new_tokens=2.0 must be an integer"),
        (dict(seed=2**70), ValueError, "seed=.* must fit into 64 bits"),
        (dict(seed=1.5), TypeError, "seed=1.5 must be an integer"),
    ],
)
def test_wrong_settings_are_named_before_a_model_is_loaded(settings, error, message):
    settings = dict(prompt="a") | settings
    with pytest.raises(error, match=message):
        generate_text("nowhere", settings.pop("prompt"), **settings)


MERGES = "tokenizer.ggml.merges"


def gguf(path, **fields):
    """A file with the bytes' vocabulary, control tokens and fields, and no tensors."""
    from gguf import GGUFWriter
    from tokenizers.pre_tokenizers import ByteLevel

    control = ["<s>", "<|endoftext|>", "<|im_end|>", "<turn>"]
    tokens = [*control, *sorted(ByteLevel.alphabet()), "th"]
    writer = GGUFWriter(path, "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * 4 + [1] * 257)
    writer.add_token_merges(["t h"])
    for key, value in fields.items():
        add = writer.add_bool if isinstance(value, bool) else writer.add_uint32
        (writer.add_float32 if isinstance(value, float) else add)(f"tokenizer.ggml.{key}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return GGUFTokenizer(path)


@pytest.mark.parametrize(
    "fields,eos,ends",
    [
        (dict(eos_token_id=1), 1, {1, 2}),
        (dict(eos_token_id=0, eot_token_id=3, eom_token_id=9), 0, {0, 3, 9, 1, 2}),
        (dict(eot_token_id=3), 3, {3, 1, 2}),
        ({}, 1, {1, 2}),
    ],
)
def test_ends_of_gguf_files(tmp_path, fields, eos, ends):
    """Of text, turn and message, and the control tokens that are spelled like one."""
    tokenizer = gguf(tmp_path / "a.gguf", **fields)
    assert (tokenizer.eos_id, set(tokenizer.end_ids)) == (eos, ends)
    assert tokenizer.end_ids[0] == eos


@pytest.mark.parametrize(
    "field", ["eos_token_id", "eot_token_id", "eom_token_id", "padding_token_id"]
)
def test_wrong_tokens_of_gguf_files_are_named(tmp_path, field):
    for value in (261, 2**32 - 1, 1.0):
        with pytest.raises(ValueError, match=rf"a.gguf: tokenizer.ggml.{field}=.* of the tokens 0"):
            gguf(tmp_path / "a.gguf", **{field: value})


def test_merges_of_unknown_tokens_are_named(tmp_path, monkeypatch):
    from gguf import GGUFWriter

    monkeypatch.setattr(
        GGUFWriter, "add_token_merges", lambda self, _: self.add_array(MERGES, ["t q"])
    )
    with pytest.raises(ValueError, match=r"a.gguf: tokenizer.ggml.merges .*tq"):
        gguf(tmp_path / "a.gguf", eos_token_id=1)


def test_a_gguf_prompt_begins_as_the_file_says(tmp_path):
    from tilescan.decoding.writers import prompt_ids

    plain = gguf(tmp_path / "a.gguf", bos_token_id=0)
    begun = gguf(tmp_path / "b.gguf", bos_token_id=0, add_bos_token=True)
    ids = plain.encode("ab").tolist()
    assert prompt_ids(plain, "ab").tolist() == ids == begun.encode("ab").tolist()
    assert prompt_ids(begun, "ab").tolist() == [0, *ids]
    assert prompt_ids(begun, "<s>ab").tolist() == [0, *ids]
    assert prompt_ids(begun, "").tolist() == [0]
