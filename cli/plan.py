"""`tilescan plan`: compiles a training step without running it."""

import argparse
import dataclasses
import json
import sys

from tilescan.cli import arguments, training_config

ABOUT = "compile a training step without running it"
DESCRIPTION = """\
Compile the very training step ahead of time, for this machine or for chips that are not
attached, and print whether it fits: bytes of each device, FLOPs, bytes sent, and bounds on the time
by the vendor's figures. Nothing runs, and no parameter is allocated.

  tilescan plan --config.model.d_model=768
  tilescan plan --topology=v5e:2x4 --config.mesh.fsdp=8      needs the package libtpu
  tilescan plan --topology=h100:64 --config.mesh.fsdp=64     needs XLA's CUDA plugin
  tilescan plan --topology=v5p:4x4x4 --config=my_config.py --config.mesh.sequence=64 --longest
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    training_config.add_arguments(parser)
    about = "e.g. v5e:2x4, v5p:4x4x4, h100:64 [this machine]"
    parser.add_argument("--topology", type=arguments.given, help=about)
    parser.add_argument(
        "--memory", type=arguments.positive, help="GiB of a device [the vendor's figure]"
    )
    parser.add_argument(
        "--longest", action="store_true", help="find the longest data.seq_len that fits"
    )

    about = "print the plan as one JSON object, bytes and seconds as numbers"
    parser.add_argument("--json", action="store_true", help=about)


def run(options: argparse.Namespace) -> int:
    """Compiles a step, or several to find the longest sequence, and prints what it needs."""
    from tilescan import terminal
    from tilescan.planning import longest as plan_longest
    from tilescan.planning import text as plan_text
    from tilescan.planning.plan import Plan, plan

    config = training_config.load(options)
    memory = None if options.memory is None else options.memory * 2**30

    def tried(p: Plan) -> None:
        verdict = plan_text.verdict(p)
        log = sys.stderr if options.json else sys.stdout
        print(f"{p.seq_len:>12,} tokens: {verdict} ({p.seconds:.1f} s)", file=log, flush=True)

    def show(p: Plan) -> None:
        text = json.dumps(dataclasses.asdict(p)) if options.json else plan_text.text(p)
        print(text if options.json else terminal.fill(text, terminal.width()))

    if not options.longest:
        show(plan(config, options.topology, memory=memory))
        return 0
    best = plan_longest.longest(config, options.topology, memory=memory, report=tried)
    if best is None:
        said = "no length fits: shard more (mesh.sequence, mesh.fsdp), or use model.remat=full"
        print(said, file=sys.stderr if options.json else sys.stdout)
        return 1
    if not options.json:
        print(f"the longest of these that fits: data.seq_len={best.seq_len}\n")
    show(best)
    return 0
