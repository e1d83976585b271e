"""Writes random models of `transformers` and their logits; runs where torch is installed.

python transformers_worker.py FOLDER      FOLDER/cases.json: {case: [kind, fields, shard size,
                                          dtype, keys that config.json lacks]}

Each case becomes FOLDER/case with the checkpoint and expected.npz. Every FOLDER/exported*
is a checkpoint to run instead: its tokens.npy gives theirs.npy.
"""

import json
import pathlib
import sys

import numpy as np
import torch
import transformers

CLASSES = {
    "gpt2": (transformers.GPT2Config, transformers.GPT2LMHeadModel),
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    "mamba": (transformers.MambaConfig, transformers.MambaForCausalLM),
    "mamba2": (transformers.Mamba2Config, transformers.Mamba2ForCausalLM),
}


@torch.no_grad()
def write_case(
    folder: pathlib.Path,
    kind: str,
    fields: dict,
    max_shard_size: str,
    dtype: str = "float32",
    absent: tuple[str, ...] = (),
) -> None:
    torch.manual_seed(0)
    make_config, make_model = CLASSES[kind]
    model = make_model(make_config(**fields)).eval()
    for parameter in model.parameters():  # norms and biases away from 1 and 0 too
        parameter.add_(0.1 * torch.randn_like(parameter))
    tokens = torch.randint(0, model.config.vocab_size, (2, 37))
    model.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size=max_shard_size)
    config = json.loads((folder / "config.json").read_text())
    config = {key: value for key, value in config.items() if key not in absent}
    (folder / "config.json").write_text(json.dumps(config))
    logits = {}
    for name, compute in (("logits", "float32"), ("of_dtype", dtype)):
        loaded = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=compute).eval()
        logits[name] = loaded(tokens).logits.float().numpy()
    np.savez(folder / "expected.npz", tokens=tokens.numpy(), **logits)


@torch.no_grad()
def run_exported(folder: pathlib.Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).float().eval()
    tokens = torch.from_numpy(np.load(folder / "tokens.npy"))
    np.save(folder / "theirs.npy", model(tokens).logits.numpy())


if __name__ == "__main__":
    root = pathlib.Path(sys.argv[1])
    for name, case in json.loads((root / "cases.json").read_text()).items():
        write_case(root / name, *case)
    for exported in sorted(root.glob("exported*")):
        run_exported(exported)
