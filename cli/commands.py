"""What `tilescan plan`, `data`, `generate` and `train` do; heavy imports stay inside."""

import math
import sys

import rich.console
import rich.markup


def list_data() -> int:
    """Prints the registry of sources."""
    from tilescan.data import sources

    sources.main_list()
    return 0


def fetch_data(name: str, offline: bool = False) -> int:
    """Downloads one source to the cache and prints where it lies."""
    from tilescan.data import sources

    print(sources.fetch(name, offline))
    return 0


def add_data(name: str, path: str) -> int:
    """Copies a file that the user has to the cache and prints where it lies."""
    from tilescan.data import sources

    print(sources.add(name, path))
    return 0


def show_data(name: str, offline: bool = False) -> int:
    """Prints how many documents a source has, how long they are, and how the first one begins."""
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
    return 0


def plan(options) -> int:
    """Compiles a training step, or several to find the longest sequence, and prints its needs."""
    from tilescan.planning import longest as plan_longest
    from tilescan.planning import text as plan_text
    from tilescan.planning.plan import plan as plan_step

    config = _training_config(options.overrides, options.config)
    memory = None if options.memory is None else options.memory * 2**30

    def tried(p) -> None:
        verdict = plan_text.verdict(p)
        print(f"{p.seq_len:>12,} tokens: {verdict} ({p.seconds:.1f} s)", flush=True)

    if not options.longest:
        print(plan_text.text(plan_step(config, options.topology, memory=memory)))
        return 0
    best = plan_longest.longest(config, options.topology, memory=memory, report=tried)
    if best is None:
        print("no length fits: cut more (mesh.sequence, mesh.fsdp), or use model.remat=full")
        return 1
    print(f"the longest of these that fits: data.seq_len={best.seq_len}\n")
    print(plan_text.text(best))
    return 0


def join_processes(where: str) -> None:
    """Joins the other processes of a run: "auto", or "HOST:PORT,COUNT,INDEX"."""
    import jax

    if where == "auto":
        jax.distributed.initialize()
        return
    coordinator, *numbers = where.split(",")
    if ":" not in coordinator or len(numbers) != 2 or not all(n.isdigit() for n in numbers):
        raise ValueError(
            f"--distributed={where!r} must be HOST:PORT,COUNT,INDEX, e.g. 10.0.0.1:1234,2,0"
        )
    jax.distributed.initialize(coordinator, int(numbers[0]), int(numbers[1]))


def train(overrides: list[str], workdir: str, file: str | None = None) -> int:
    """Trains a language model and prints its last metrics."""
    from tilescan.training.train import train as run

    for name, value in sorted(run(_training_config(overrides, file), workdir).items()):
        print(f"{name:28} {value:.6g}")
    return 0


def _training_config(overrides: list[str], file: str | None = None):
    """The default configuration or that of a file, "PATH" or "PATH:ARGUMENT", with overrides."""
    from tilescan.training import config as config_lib
    from tilescan.training import config_files

    config = config_lib.default_config() if file is None else config_files.load(file)
    for assignment in overrides:
        config_lib.override(config, assignment)
    return config


def generate(options) -> int:
    """Continues a prompt, token by token, and says how fast."""
    from tilescan.decoding.text import generate_text

    pieces = []

    def write(piece: str) -> None:
        # The prompt comes with the first piece: not before an error about it, or about the file.
        print(piece if pieces else options.prompt + piece, end="", flush=True)
        pieces.append(piece)

    done = generate_text(
        options.checkpoint,
        options.prompt,
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        seed=options.seed,
        write=write,
    )
    if not pieces:  # the model ended the text at once
        print(options.prompt, end="")
    speed = f"{done.tokens} tokens"
    if pieces:
        speed += f"; first after {done.first_seconds:.1f} s"
    if math.isfinite(done.tokens_per_second):  # a few tokens have no rate
        speed += f", then {done.tokens_per_second:.1f} tokens/s"
    print(f"\n\n{speed}", file=sys.stderr)
    return 0
