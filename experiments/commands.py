"""What `tilescan plan`, `data`, `generate` and `train` do; heavy imports stay inside."""

import rich.console


def list_data() -> int:
    """Prints the registry of sources."""
    from data import sources

    sources.main_list()
    return 0


def fetch_data(name: str) -> int:
    """Downloads one source to the cache and prints where it lies."""
    from data import sources

    print(sources.fetch(name))
    return 0


def show_data(name: str) -> int:
    """Prints how many documents a source has, how long they are, and how the first one begins."""
    from data import sources

    documents = sources.load(name)
    lengths = sorted(len(document.text) for document in documents)
    labels = sorted({document.label for document in documents if document.label is not None})
    print(f"{name}: {len(documents):,} documents, {sum(lengths):,} characters")
    print(
        f"shortest {lengths[0]:,}, median {lengths[len(lengths) // 2]:,}, longest {lengths[-1]:,}"
    )
    if labels:
        print(f"labels: {', '.join(labels)}")
    rich.console.Console().rule(documents[0].id)
    print(documents[0].text[:600])
    return 0
