"""A torch process that runs its peers on request, so that its runs interleave with ours."""

import json
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Collection
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float

from tilescan.training.environment import cores


class Torch:
    """benchmarks.torch_worker, run by a Python that has torch."""

    def __init__(self, python: str):
        worker = pathlib.Path(__file__).with_name("torch_worker.py")
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.process = subprocess.Popen([python, str(worker)], **pipes)

    def ask(self, **request: Any) -> dict[str, Any]:
        """Sends one request and returns the worker's answer.

        Raises:
          RuntimeError: the process has ended.
        """
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError("torch's process ended; its error is printed above")
        return json.loads(answer)

    def prepare(
        self, peer: str, arrays: Collection[Float[Array, "..."]], **case: Any
    ) -> tuple[str, list[Float[np.ndarray, "..."]]]:
        """Gives a peer of the worker its inputs, and the output's cotangent if it has a backward.

        Args:
          peer: a function of benchmarks.torch_worker.
          arrays: the inputs, in their order.
          **case: what the peer reads besides.

        Returns:
          (torch's version, the results as float32 arrays: the output and the gradients).
        """
        device = {"gpu": "cuda"}.get(jax.default_backend(), "cpu")
        with tempfile.TemporaryDirectory() as folder:
            sent, received = (os.path.join(folder, name) for name in ("inputs", "outputs"))
            with open(sent, "wb") as f:
                for x in arrays:
                    np.asarray(x, np.float32).tofile(f)
            details = dict(
                shapes=[x.shape for x in arrays], dtypes=[x.dtype.name for x in arrays],
                device=device, inputs=sent, outputs=received,
            )  # fmt: skip
            answer = self.ask(do="prepare", peer=peer, threads=cores(), case=case | details)
            flat = np.fromfile(received, np.float32)
        ends = np.cumsum([np.prod(s) for s in answer["shapes"]])[:-1]
        parts = zip(np.split(flat, ends), answer["shapes"], strict=True)
        return answer["version"], [x.reshape(shape) for x, shape in parts]

    def run(self, peer: str) -> float:
        """Runs a peer once and returns the seconds that it took."""
        return self.ask(do="run", peer=peer)["seconds"]

    def close(self) -> None:
        """Ends the process."""
        self.process.stdin.close()
        self.process.wait()


def find_torch(python: str | None) -> str | None:
    """Returns the Python with torch: the given one, else this one if it has torch, else None.

    Raises:
      SystemExit: the given one has no torch.
    """
    candidate = python or sys.executable
    found = subprocess.run([candidate, "-c", "import torch"], capture_output=True)
    if found.returncode == 0:
        return candidate
    if python:
        raise SystemExit(f"--torch-python {python} cannot import torch")
    return None
