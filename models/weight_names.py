"""Which tensor of a published layout is which parameter: tables, and the arithmetic they need.

One `Entry` per tensor. A name with "{}" stands for all layers: they are stacked along the
leading axis that `nn.scan` added. Everything else is a transpose and a reshape.
"""

import dataclasses
import re
from collections.abc import Iterator

import numpy as np

from tilescan.models.checkpoint_errors import CheckpointError as CheckpointError
from tilescan.models.config import LanguageModelConfig

# Buffers that older exports store beside the weights: masks of GPT-2, which has one mask, and
# rotary frequencies, which must be those of config.json.
BUFFERS = {
    "gpt2": re.compile(r"(transformer\.)?h\.[0-9]+\.attn\.(masked_)?bias"),
    "llama": re.compile(r"model\.(layers\.[0-9]+\.self_attn\.)?rotary_emb\.inv_freq"),
}
_ATTENTION, _MLP = "backbone/layers/attention_0/", "backbone/layers/mlp_1/"


@dataclasses.dataclass(frozen=True)
class Entry:
    """One tensor of a file.

    Attributes:
      name: in the file, "{}" for the layer's number.
      paths: of the parameters it holds; several are fused along the outputs.
      kind: "vector", "table" (an embedding, or another array as it is), "in_out" (a matrix
        [inputs, outputs]), "out_in" (its transpose) or "window" (a depthwise convolution [W, E],
        in the file [E, 1, W]).
      inputs: how many leading axes of the parameter are inputs (2 for attention's output).
    """

    name: str
    paths: tuple[str, ...]
    kind: str = "vector"
    inputs: int = 1

    @property
    def per_layer(self) -> bool:
        """Whether there is one such tensor in each layer."""
        return "{}" in self.name

    def file_shape(self, shapes: list[tuple[int, ...]]) -> tuple[int, ...]:
        """Returns the shape in the file from its parameters' shapes, all of one layer."""
        if self.kind == "table":
            return shapes[0]
        if self.kind == "vector":
            return (sum(int(np.prod(shape)) for shape in shapes),)
        if self.kind == "window":
            return (shapes[0][1], 1, shapes[0][0])
        rows = int(np.prod(shapes[0][: self.inputs]))
        columns = sum(int(np.prod(shape[self.inputs :])) for shape in shapes)
        return (rows, columns) if self.kind == "in_out" else (columns, rows)

    def read(self, tensor: np.ndarray, shapes: list[tuple[int, ...]]) -> list[np.ndarray]:
        """Returns the parameters (of one layer) in a tensor of the file."""
        tensor = tensor.T if self.kind in ("out_in", "window") else tensor
        if len(shapes) == 1:
            return [tensor.reshape(shapes[0])]
        widths = [
            int(np.prod(shape if self.kind == "vector" else shape[self.inputs :]))
            for shape in shapes
        ]
        parts = np.split(tensor, np.cumsum(widths)[:-1], axis=-1)
        return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]

    def write(self, params: list[np.ndarray]) -> np.ndarray:
        """Returns the file's tensor from the parameters (of one layer); the inverse of `read`."""
        if self.kind == "table":
            return np.ascontiguousarray(params[0])
        if self.kind == "vector":
            return np.concatenate([p.reshape(-1) for p in params])
        if self.kind == "window":
            return np.ascontiguousarray(params[0].T[:, None])
        rows = int(np.prod(params[0].shape[: self.inputs]))
        matrix = np.concatenate([p.reshape(rows, -1) for p in params], axis=1)
        return np.ascontiguousarray(matrix if self.kind == "in_out" else matrix.T)


def is_buffer(kind: str, name: str) -> bool:
    """Returns whether a tensor of a layout is not a parameter."""
    return kind in BUFFERS and BUFFERS[kind].fullmatch(name) is not None


def canonical(kind: str, name: str) -> str:
    """Returns the name that `transformers` writes; GPT-2's own files lack its prefix."""
    bare = kind == "gpt2" and name.startswith(("wte.", "wpe.", "h.", "ln_f."))
    return "transformer." + name if bare else name


def embedding_name(entries: list[Entry]) -> str:
    """Returns the name of the embedding's tensor."""
    return next(e.name for e in entries if e.paths == ("backbone/embed/embedding",))


def gpt2_entries(config: LanguageModelConfig) -> list[Entry]:
    """Hugging Face's GPT-2: Conv1D matrices are [inputs, outputs], q, k and v are one."""
    layer = "h.{}."
    qkv = tuple(f"{_ATTENTION}mixer/{name}/" for name in ("query", "key", "value"))
    entries = [
        Entry("wte.weight", ("backbone/embed/embedding",), "table"),
        Entry("wpe.weight", ("backbone/position/embedding",), "table"),
        Entry(layer + "attn.c_attn.weight", tuple(p + "kernel" for p in qkv), "in_out"),
        Entry(layer + "attn.c_attn.bias", tuple(p + "bias" for p in qkv)),
        Entry(layer + "attn.c_proj.weight", (_ATTENTION + "mixer/out/kernel",), "in_out", 2),
        Entry(layer + "attn.c_proj.bias", (_ATTENTION + "mixer/out/bias",)),
        Entry(layer + "mlp.c_fc.weight", (_MLP + "mixer/up/kernel",), "in_out"),
        Entry(layer + "mlp.c_fc.bias", (_MLP + "mixer/up/bias",)),
        Entry(layer + "mlp.c_proj.weight", (_MLP + "mixer/down/kernel",), "in_out"),
        Entry(layer + "mlp.c_proj.bias", (_MLP + "mixer/down/bias",)),
    ]
    for theirs, ours in (
        (layer + "ln_1", _ATTENTION + "norm"),
        (layer + "ln_2", _MLP + "norm"),
        ("ln_f", "backbone/final_norm"),
    ):
        entries += [
            Entry(theirs + ".weight", (ours + "/scale",)),
            Entry(theirs + ".bias", (ours + "/bias",)),
        ]
    entries = [dataclasses.replace(e, name="transformer." + e.name) for e in entries]
    if not config.tie_embeddings:
        entries.append(Entry("lm_head.weight", ("head/kernel",), "out_in"))
    return entries


def _llama_like(config: LanguageModelConfig, names: dict[str, str]) -> list[Entry]:
    mixer, mlp = _ATTENTION + "mixer/", _MLP + "mixer/"
    entries = [
        Entry(names["embed"], ("backbone/embed/embedding",), "table"),
        Entry(names["attention_norm"], (_ATTENTION + "norm/scale",)),
        Entry(names["mlp_norm"], (_MLP + "norm/scale",)),
        Entry(names["final_norm"], ("backbone/final_norm/scale",)),
    ]
    for ours in ("query", "key", "value", "out"):
        inputs = 2 if ours == "out" else 1
        entries.append(Entry(names[ours] + ".weight", (f"{mixer}{ours}/kernel",), "out_in", inputs))
        if config.attention_bias:
            entries.append(Entry(names[ours] + ".bias", (f"{mixer}{ours}/bias",)))
    for ours in ("gate", "up", "down"):
        entries.append(Entry(names[ours] + ".weight", (f"{mlp}{ours}/kernel",), "out_in"))
        if config.mlp_bias:
            entries.append(Entry(names[ours] + ".bias", (f"{mlp}{ours}/bias",)))
    if not config.tie_embeddings:
        entries.append(Entry(names["head"], ("head/kernel",), "out_in"))
    return entries


def llama_entries(config: LanguageModelConfig) -> list[Entry]:
    """Hugging Face's Llama: matrices [outputs, inputs], rotary pairs half-split."""
    layer = "model.layers.{}."
    return _llama_like(
        config,
        {
            "embed": "model.embed_tokens.weight",
            "attention_norm": layer + "input_layernorm.weight",
            "mlp_norm": layer + "post_attention_layernorm.weight",
            "final_norm": "model.norm.weight",
            "query": layer + "self_attn.q_proj",
            "key": layer + "self_attn.k_proj",
            "value": layer + "self_attn.v_proj",
            "out": layer + "self_attn.o_proj",
            "gate": layer + "mlp.gate_proj",
            "up": layer + "mlp.up_proj",
            "down": layer + "mlp.down_proj",
            "head": "lm_head.weight",
        },
    )


def mamba_entries(config: LanguageModelConfig) -> list[Entry]:
    """Hugging Face's Mamba and Mamba-2, whose mixers differ in what selects the step sizes."""
    (kind,) = config.pattern
    block, layer = f"backbone/layers/{kind}_0/", "backbone.layers.{}."
    ours, theirs = block + "mixer/", layer + "mixer."
    options = config.mixers.get(kind, {})
    entries = [
        Entry("backbone.embeddings.weight", ("backbone/embed/embedding",), "table"),
        Entry("backbone.norm_f.weight", ("backbone/final_norm/scale",)),
        Entry(layer + "norm.weight", (block + "norm/scale",)),
        Entry(theirs + "A_log", (ours + "A_log",), "table"),
        Entry(theirs + "D", (ours + "D",)),
        Entry(theirs + "conv1d.weight", (ours + "conv/kernel",), "window"),
    ]
    if options.get("conv_bias", True):
        entries.append(Entry(theirs + "conv1d.bias", (ours + "conv/bias",)))
    for name in ("in_proj", "out_proj"):
        entries.append(Entry(f"{theirs}{name}.weight", (f"{ours}{name}/kernel",), "out_in"))
        if options.get("use_bias", False):
            entries.append(Entry(f"{theirs}{name}.bias", (f"{ours}{name}/bias",)))
    if kind == "mamba":
        entries += [
            Entry(theirs + "x_proj.weight", (ours + "x_proj/kernel",), "out_in"),
            Entry(theirs + "dt_proj.weight", (ours + "dt_proj/kernel",), "out_in"),
            Entry(theirs + "dt_proj.bias", (ours + "dt_bias",)),
        ]
    else:
        entries += [
            Entry(theirs + "dt_bias", (ours + "dt_bias",)),
            Entry(theirs + "norm.weight", (ours + "norm/scale",)),
        ]
    if not config.tie_embeddings:
        entries.append(Entry("lm_head.weight", ("head/kernel",), "out_in"))
    return entries


def gguf_llama_entries(config: LanguageModelConfig) -> list[Entry]:
    """GGUF's llama architecture: rows of q and k are ordered for interleaved rotary pairs."""
    layer = "blk.{}."
    return _llama_like(
        config,
        {
            "embed": "token_embd.weight",
            "attention_norm": layer + "attn_norm.weight",
            "mlp_norm": layer + "ffn_norm.weight",
            "final_norm": "output_norm.weight",
            "query": layer + "attn_q",
            "key": layer + "attn_k",
            "value": layer + "attn_v",
            "out": layer + "attn_output",
            "gate": layer + "ffn_gate",
            "up": layer + "ffn_up",
            "down": layer + "ffn_down",
            "head": "output.weight",
        },
    )


def file_names(entries: list[Entry], layers: int) -> Iterator[tuple[Entry, list[str]]]:
    """Yields each entry with the names of its tensors in the file, one per layer."""
    for entry in entries:
        yield entry, [entry.name.format(i) for i in range(layers if entry.per_layer else 1)]
