"""Times torch on request, in a Python that has torch.

Started by the benchmarks with `--torch-python`; it reads one JSON object per line and answers with
one, so that its runs can be interleaved with those of the other peers. It imports torch alone,
since that Python may hold nothing else of this project.

A peer is a function of (case, arrays) which returns the inputs to differentiate, the output's
cotangent if the case has a backward pass (else None), and a function of the inputs.

Dimensions: B batch, T time, H heads, D head dim, P value dim, N state dim, E channels, C chunk.
"""

import json
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

Prepared = tuple[list[torch.Tensor], torch.Tensor | None, Callable[..., torch.Tensor]]


def attention(case: Mapping[str, Any], arrays: Sequence[torch.Tensor]) -> Prepared:
    """Returns scaled_dot_product_attention of q, k, v [B, T, H, D], which takes [B, H, T, D]."""
    T = arrays[0].shape[1]
    *inputs, do = [x.transpose(1, 2).contiguous() for x in arrays] + [None] * (len(arrays) == 3)
    options = dict(is_causal=True)
    if case["window"] is not None:
        i = torch.arange(T, device=arrays[0].device)
        distance = i[:, None] - i[None, :]
        options = dict(attn_mask=(distance >= 0) & (distance <= case["window"]))
    function = torch.nn.functional.scaled_dot_product_attention
    return inputs, do, lambda q, k, v: function(q, k, v, **options)


def fft_convolution(case: Mapping[str, Any], arrays: Sequence[torch.Tensor]) -> Prepared:
    """Returns the causal convolution of u [B, T, E] with kernel [T, E], by FFTs along axis 1."""
    u, kernel, *dy = arrays
    T = u.shape[1]

    def convolve(u, kernel):
        spectrum = torch.fft.rfft(u, 2 * T, dim=1) * torch.fft.rfft(kernel, 2 * T, dim=0)
        return torch.fft.irfft(spectrum, 2 * T, dim=1)[:, :T]

    return [u, kernel], *(dy or [None]), convolve


def fft_convolution_last_axis(case: Mapping[str, Any], arrays: Sequence[torch.Tensor]) -> Prepared:
    """Returns the same as `fft_convolution`, transposed so that FFTs run along the last axis."""
    u, kernel, *dy = arrays
    T = u.shape[1]

    def convolve(u, kernel):
        transform = lambda x: torch.fft.rfft(x, 2 * T)
        spectrum = transform(u.transpose(1, 2)) * transform(kernel.T)
        return torch.fft.irfft(spectrum, 2 * T)[..., :T].transpose(1, 2)

    return [u, kernel], *(dy or [None]), convolve


def ssd(case: Mapping[str, Any], arrays: Sequence[torch.Tensor]) -> Prepared:
    """Returns Mamba-2's SSD (arXiv 2405.21060, section 6) by its formula in chunks.

    x [B, T, H, P], dt [B, T, H], A [H], B and C [B, T, H, N]; in float32, chunks of case["chunk"]
    steps, all of them in one batched product.
    """
    x, dt, A, B, C, *dy = arrays
    c = case["chunk"]

    def scan(x, dt, A, B, C):
        chunks = lambda v: v.unflatten(1, (-1, c)).transpose(2, 3)  # [B, T/C, H, C, ...]
        v, k, q = (chunks(a) for a in (x * dt[..., None], B, C))
        a = torch.cumsum(chunks(dt * A), -1)
        lower = torch.ones(c, c, dtype=torch.bool, device=x.device).tril()
        ratios = torch.exp((a[..., :, None] - a[..., None, :]).masked_fill(~lower, -math.inf))
        # Inside the chunks; then each chunk's own state, the states at the starts, their outputs.
        y = (q @ k.transpose(-1, -2) * ratios) @ v
        own = (k * torch.exp(a[..., -1:] - a)[..., None]).transpose(-1, -2) @ v
        whole = torch.exp(a[..., -1])[..., None, None]
        S, starts = torch.zeros_like(own[:, 0]), []
        for i in range(own.shape[1]):
            starts.append(S)
            S = whole[:, i] * S + own[:, i]
        y = y + (q * torch.exp(a)[..., None]) @ torch.stack(starts, 1)
        return y.transpose(2, 3).flatten(1, 2)

    return [x, dt, A, B, C], *(dy or [None]), scan


PEERS = {f.__name__: f for f in (attention, fft_convolution, fft_convolution_last_axis, ssd)}


def prepare(peer: str, case: Mapping[str, Any]) -> Callable[[], tuple[torch.Tensor, ...]]:
    """Returns a function that computes the case's output, and its gradients if it has them."""
    sizes = [math.prod(shape) for shape in case["shapes"]]
    data = torch.from_file(case["inputs"], size=sum(sizes), dtype=torch.float32)
    details = zip(data.split(sizes), case["shapes"], case["dtypes"], strict=True)
    arrays = [
        x.reshape(shape).to(case["device"], getattr(torch, dtype), copy=True)
        for x, shape, dtype in details
    ]
    inputs, dy, function = PEERS[peer](case, arrays)
    for x in inputs:
        x.requires_grad_(dy is not None)

    def compute():
        y = function(*inputs)
        results = (y,) if dy is None else (y, *torch.autograd.grad(y, inputs, dy))
        if case["device"] != "cpu":
            torch.cuda.synchronize()
        return results

    return compute


def main() -> None:
    """Answers requests, one JSON object a line, until the input ends."""
    prepared = {}
    for line in sys.stdin:
        request = json.loads(line)
        answer, peer = {}, request["peer"]
        if request["do"] == "prepare":
            torch.set_num_threads(request["threads"])
            case = request["case"]
            prepared[peer] = prepare(peer, case)
            results = [x.detach() for x in prepared[peer]()]
            if case.get("head") is not None:  # one head: judging all would take long
                results = [x[0, case["head"]] for x in results]
            size = sum(x.numel() for x in results)
            file = torch.from_file(case["outputs"], shared=True, size=size)
            file.copy_(torch.cat([x.float().cpu().flatten() for x in results]))
            answer = {"version": torch.__version__, "shapes": [list(x.shape) for x in results]}
        elif request["do"] == "run":
            start = time.perf_counter()
            prepared[peer]()
            answer = {"seconds": time.perf_counter() - start}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
