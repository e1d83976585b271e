"""What `tilescan plan`, `data`, `generate` and `train` do; heavy imports stay inside."""

import math
import sys

import rich.console


def list_data() -> int:
    """Prints the registry of sources."""
    from data import sources

    sources.main_list()
    return 0


def fetch_data(name: str, offline: bool = False) -> int:
    """Downloads one source to the cache and prints where it lies."""
    from data import sources

    print(sources.fetch(name, offline))
    return 0


def add_data(name: str, path: str) -> int:
    """Copies a file that the user has to the cache and prints where it lies."""
    from data import sources

    print(sources.add(name, path))
    return 0


def show_data(name: str, offline: bool = False) -> int:
    """Prints how many documents a source has, how long they are, and how the first one begins."""
    from data import sources

    documents = sources.load(name, offline)
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


def plan(overrides: list[str], topology: str | None) -> int:
    """Compiles a training step and prints what it needs."""
    from experiments.plan import compile_step

    needs = compile_step(_training_config(overrides), topology)
    mebi = {name: needs[f"{name}_bytes"] / 2**20 for name in ("argument", "temp", "output")}
    peak = sum(mebi.values()) - needs["donated_bytes"] / 2**20
    tokens, parameters = needs["tokens"], needs["parameters"]
    print(f"devices        {needs['devices']} x {needs['device']}")
    print(f"parameters     {parameters:,}")
    print(f"tokens a step  {tokens:,}")
    print(
        f"operations     {6 * parameters * tokens:.3g} a step (6 x parameters x tokens, no scores)"
    )
    print(f"Pallas kernels {', '.join(needs['kernels']) or 'none'}")
    print("bytes of each device, as the compiler says:")
    print(f"  state and batch  {mebi['argument']:,.1f} MiB")
    print(f"  temporaries      {mebi['temp']:,.1f} MiB")
    print(f"  in all           {peak:,.1f} MiB (the new state takes the place of the old)")
    print(f"compiled in {needs['seconds']:.1f} s; nothing was run")
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


def train(overrides: list[str], workdir: str) -> int:
    """Trains a language model and prints its last metrics."""
    from training.train import train as run

    for name, value in sorted(run(_training_config(overrides), workdir).items()):
        print(f"{name:28} {value:.6g}")
    return 0


def _training_config(overrides: list[str]):
    from training import config as config_lib

    config = config_lib.default_config()
    for assignment in overrides:
        config_lib.override(config, assignment)
    return config


def generate(options) -> int:
    """Continues a prompt, token by token, and says how fast."""
    from decoding.text import generate_text

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
