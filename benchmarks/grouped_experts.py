"""The dense kernel against a grouped one, which computes the chosen experts only, in one run.

    python benchmarks/grouped_experts.py [--d 4096] [--tokens 2048] [--top-k 2] [--rounds 9]

Grouped: each token's k choices, sorted by expert; A and B of each expert on its own rows, by
``torch.nn.functional.grouped_mm`` or by one matmul an expert; the results added up by token. Both
from the same hidden states and gates, forward and backward from a dense gradient, without router
and base. Times are medians over rounds in turn, ratios medians of each round's ratio.
"""

import argparse
import os
import statistics
import time

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as benchmarks/lora_moe.py

import torch
from torch.nn import functional as F

from htsr_alloc.lora_moe import gates
from htsr_alloc.lora_moe.experts import dense_experts


def dense(x, a, b, weights, index):
    """The library's kernel; the gate is made dense first."""
    gate = torch.zeros(len(x), len(a), dtype=x.dtype, device=x.device).scatter(-1, index, weights)
    base = x.new_zeros(())
    b_all = b.transpose(0, 1).flatten(1)  # (d_out, N r)
    return dense_experts(base.expand(len(x), len(b_all)), F.linear(x, a.flatten(0, 1)), b_all, gate)


def sort(weights, index, experts):
    """Rows (T k,) of tokens by expert, their weights, and where each expert's rows end."""
    chosen, order = index.flatten().sort()
    ends = torch.bincount(chosen, minlength=experts).cumsum(0)
    return order // index.shape[1], weights.flatten()[order], ends


def by_grouped_mm(x, a, b, weights, index):
    token, weight, ends = sort(weights, index, len(a))
    ends = ends.to(torch.int32)
    hidden = F.grouped_mm(x[token], a.transpose(1, 2), offs=ends) * weight[:, None]
    out = F.grouped_mm(hidden, b.transpose(1, 2), offs=ends)
    return torch.zeros_like(x).index_add(0, token, out)


def by_matmuls(x, a, b, weights, index):
    token, weight, ends = sort(weights, index, len(a))
    counts = ends.diff(prepend=ends.new_zeros(1)).tolist()  # waits for the device
    rows = zip(x[token].split(counts), weight.split(counts), a, b, strict=True)
    parts = [F.linear(F.linear(part, a_j) * g[:, None], b_j) for part, g, a_j, b_j in rows]
    return torch.zeros_like(x).index_add(0, token, torch.cat(parts))


def run(kernel, tensors, index, grad):
    x, a, b, weights = tensors
    for tensor in tensors:
        tensor.grad = None
    if x.is_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    out = kernel(x, a, b, weights, index)
    out.backward(grad)
    if x.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start, out.detach()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--d", type=int, default=4096)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--top-k", type=int, default=2)
    parser.add_argument("--experts", type=int, nargs="+", default=[8, 32, 64])
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 32, 64])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    torch.manual_seed(0)
    make = {"dtype": getattr(torch, given.dtype), "device": given.device}
    kernels = {"dense": dense, "grouped_mm": by_grouped_mm, "matmuls": by_matmuls}
    print(
        f"{given.device}, {torch.get_num_threads()} threads, d = {given.d}, T = {given.tokens}, ",
        end="",
    )
    print(f"top {given.top_k}, {given.dtype}; grouped / dense, above 1 dense is faster")
    print("  ".join(f"{c:>10}" for c in ("N", "r", "dense_ms", "grouped_mm", "matmuls")))
    for n in given.experts:
        for r in given.ranks:
            logits = torch.randn(given.tokens, n, **make).float()
            weights, index = gates.top_k_softmax(logits, given.top_k).weights.topk(given.top_k)
            tensors = [
                torch.randn(given.tokens, given.d, **make),
                torch.randn(n, r, given.d, **make) / given.d**0.5,
                torch.randn(n, given.d, r, **make) / r**0.5,
                weights.to(make["dtype"]),
            ]
            for tensor in tensors:
                tensor.requires_grad_()
            grad = torch.randn(given.tokens, given.d, **make)
            found = {name: run(k, tensors, index, grad)[1] for name, k in kernels.items()}
            for name in found:  # all the same sum
                torch.testing.assert_close(found[name], found["dense"], rtol=3e-2, atol=3e-2)
            rounds = [
                {name: run(k, tensors, index, grad)[0] for name, k in kernels.items()}
                for _ in range(given.rounds)
            ]
            row = [n, r, f"{statistics.median(t['dense'] for t in rounds) * 1e3:.1f}"]
            for name in ("grouped_mm", "matmuls"):
                row.append(f"{statistics.median(t[name] / t['dense'] for t in rounds):.2f}")
            print("  ".join(f"{c:>10}" for c in row), flush=True)


if __name__ == "__main__":
    main()
