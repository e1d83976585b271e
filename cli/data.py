"""`tilescan data`: lists, fetches and shows the sources of text."""

import argparse

from tilescan.cli import arguments

ABOUT = "list, fetch and show the sources of text"
DESCRIPTION = """\
The text there is: what it holds, its license, how large it is; fetch it to the cache.

  tilescan data                     list the sources
  tilescan data fetch shakespeare   download it once, checked against its checksum
  tilescan data show shakespeare    documents, sizes, and the beginning of the first one
  tilescan data show mytext.txt     the same of a text of yours, before you train on it
  tilescan data add imdb FILE       keep a file of yours as the source that no package has

A source is one of these names; the path of a .txt, .jsonl (plain, .gz, .xz, .bz2) or .parquet file
or of a folder of them, with :FIELD after it if the text is not in "text"; or hf:OWNER/NAME, a data
set at Hugging Face, [:COLUMN] likewise.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    actions = ("list", "fetch", "show", "add")
    parser.add_argument("action", nargs="?", default="list", choices=actions)
    parser.add_argument(
        "source",
        nargs="?",
        type=arguments.given,
        help="its name, see `tilescan data`; show: or a path",
    )
    parser.add_argument(
        "file", nargs="?", type=arguments.given, help="add: a file of yours, copied to the cache"
    )
    parser.add_argument("--offline", action="store_true", help="never download")


def run(options: argparse.Namespace) -> int:
    """Does what the action says; returns the exit status."""
    action, given = options.action, (options.source, options.file)
    takes = {"list": 0, "fetch": 1, "show": 1, "add": 2}[action]
    missing = "the name of a source" if given[0] is None else "the path of a file"
    if None in given[:takes]:
        options.parser.error(f"data {action} needs {missing}")
    if any(given[takes:]):
        options.parser.error(f"data {action} takes no {given[takes]!r}")

    from tilescan.data import sources

    match action:
        case "list":
            _list()
        case "fetch":
            print(sources.fetch(options.source, options.offline))
        case "add":
            print(sources.add(options.source, options.file))
        case "show":
            _show(options.source, options.offline)
    return 0


def _list() -> None:
    """Prints the sources, and the exact tasks made from a seed or from a source, as tables."""
    from tilescan import terminal
    from tilescan.data import files, sources, tasks

    width = terminal.width()

    def show(title: str, headings: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
        print(terminal.paint(title, "bold"))
        words = [heading != "size" for heading in headings]
        print("\n\n".join(terminal.tables(headings, rows, width, labels=words)), end="\n\n")

    found = []
    for row in sources.list_sources():
        size = f"{row['size'] / 1e6:.1f} MB" if row["size"] else "-"
        cached = "cached" if row["cached"] else ""
        about = f"{row['description']} ({row['license']})"
        found.append((row["name"], row["kind"], size, cached, about))
    show("Sources (downloaded on first use)", ("name", "from", "size", "", "what, license"), found)
    named = list(tasks.summaries().items())
    show("Exact tasks (data.tasks.get)", ("name", "what"), named)
    also = f"Sources are also: the path of {files.READ}; hf:NAME, a data set at Hugging Face."
    print(terminal.fill(also, width))


def _show(name: str, offline: bool) -> None:
    """Prints how many documents a source has, how long they are, and how the first one begins."""
    import rich.console
    import rich.markup

    from tilescan.data import sources

    documents = sources.load(name, offline)
    lengths = sorted(len(document.text) for document in documents)
    labels = sorted({document.label for document in documents if document.label is not None})
    print(f"{name}: {len(documents):,} documents, {sum(lengths):,} characters")
    print(
        f"shortest {lengths[0]:,}, median {lengths[len(lengths) // 2]:,}, longest {lengths[-1]:,}"
    )
    if labels:
        print(f"labels: {', '.join(labels)}")
    rich.console.Console().rule(rich.markup.escape(documents[0].id))
    print(documents[0].text[:600])
