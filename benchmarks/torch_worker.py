"""Times torch's scaled_dot_product_attention on request, in a Python that has torch.

Started by benchmarks.attention with `--torch-python`; it reads one JSON object per line and
answers with one, so that its runs can be interleaved with those of the other peers. It imports
torch alone, since that Python may hold nothing else of this project.
"""

import json
import sys
import time

import torch


def prepare(case):
    """A function that does the case's work once: o, or o, dq, dk and dv, [B, H, T, D]."""
    B, T, H, D = case["B"], case["T"], case["H"], case["D"]
    device, dtype = case["device"], getattr(torch, case["dtype"])
    backward, window = case["direction"] != "fwd", case["window"]
    count = 4 if backward else 3
    data = torch.from_file(case["inputs"], size=count * B * T * H * D, dtype=torch.float32)
    arrays = data.reshape(count, B, T, H, D).transpose(2, 3).to(device, dtype, copy=True)
    q, k, v, *do = (x.contiguous() for x in arrays)
    for x in (q, k, v):
        x.requires_grad_(backward)
    options = dict(is_causal=True)
    if window is not None:
        i = torch.arange(T, device=device)
        distance = i[:, None] - i[None, :]
        options = dict(attn_mask=(distance >= 0) & (distance <= window))

    def run():
        o = torch.nn.functional.scaled_dot_product_attention(q, k, v, **options)
        results = (o, *torch.autograd.grad(o, (q, k, v), do)) if backward else (o,)
        if device != "cpu":
            torch.cuda.synchronize()
        return results

    return run


def main():
    run = None
    for line in sys.stdin:
        request = json.loads(line)
        answer = {}
        if request["do"] == "prepare":
            torch.set_num_threads(request["threads"])
            case = request["case"]
            run = prepare(case)
            # The results of one head, for the asker to judge.
            results = [x.detach()[0, case["head"]].float().cpu().clone() for x in run()]
            with open(case["outputs"], "wb") as f:
                for x in results:
                    f.write(bytes(x.untyped_storage()))
            answer = {"version": torch.__version__}
        elif request["do"] == "run":
            start = time.perf_counter()
            run()
            answer = {"seconds": time.perf_counter() - start}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
