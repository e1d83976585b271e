"""`tilescan export`: writes a trained model as a folder of Hugging Face's layout."""

import argparse

from tilescan.cli import arguments

ABOUT = "write a trained model as safetensors that load elsewhere"
DESCRIPTION = """\
Write the newest checkpoint of a training run as config.json and model.safetensors, in the layout
of Hugging Face that fits: GPT-2, Llama, Mamba or Mamba-2; another model is refused by what the
layouts have no place for. Its tokenizer is written beside it, as tokenizer.json.

  tilescan export runs/first exported
  tilescan generate --checkpoint=exported --prompt="import "
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    about = "workdir of a training run"
    parser.add_argument("checkpoint", metavar="WORKDIR", type=arguments.given, help=about)
    about = "a folder, new or without a checkpoint"
    parser.add_argument("folder", metavar="FOLDER", type=arguments.path, help=about)


def run(options: argparse.Namespace) -> int:
    """Writes the folder and lists its files; returns the exit status.

    Raises:
      ValueError: not a run's workdir, or the folder holds a checkpoint already.
      CheckpointError, UnusableCheckpoint: see `models.checkpoints.save_pretrained` and
        `training.trained.load_run`.
    """
    from tilescan.data.tokenizers import get_tokenizer
    from tilescan.decoding.saved_tokenizers import save_tokenizer
    from tilescan.models.checkpoints import save_pretrained
    from tilescan.training import trained

    folder = options.folder
    if not trained.is_run(options.checkpoint):
        raise ValueError(
            f"{options.checkpoint} is not the workdir of a training run, with config.json and "
            "checkpoints/"
        )
    for name in ("config.json", "model.safetensors"):
        if (folder / name).exists():
            raise ValueError(f"{folder} holds {name} already; take another folder")
    found = trained.load_run(options.checkpoint)
    save_pretrained(folder, found.model.config, found.params)
    tokenizer, size = get_tokenizer(found.settings.data.tokenizer), found.model.config.vocab_size
    if tokenizer.vocab_size <= size:
        save_tokenizer(folder, tokenizer)
    else:  # other data than text
        print(
            f"no tokenizer is written: the model has {size} ids, and {tokenizer.name!r}, the "
            f"configuration's, {tokenizer.vocab_size}"
        )
    print(f"step {found.step} of {options.checkpoint}:")
    for path in sorted(folder.iterdir()):
        print(f"  {path}")
    return 0
