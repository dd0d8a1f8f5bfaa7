"""The LoRA-MoE layer against a loop over experts and against plain LoRA of rank N r, in one run.

    python benchmarks/lora_moe.py [--tokens 512 2048 1] [--experts 2 5 8 10] [--rounds 21]

Peers: ``loop`` is the MoLA way, for each expert the tokens that chose it, added up by index;
``lora`` is PEFT's own LoRA layer of rank N r. Forward and backward from a dense gradient, then
decoding without gradients, one token after the other. ``adapter`` has a frozen linear that costs
nothing on all sides, ``layer`` the real one. Every round runs the three in turn; times are medians
over rounds and ratios medians of each round's ratio. Memory is what autograd keeps, parameters
left out.
"""

import argparse
import os
import statistics
import time
import warnings

# A thread that waits gives its core away: spinning, it would wait for whole time slices of other
# jobs, and the figures would count those.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from htsr_alloc.lora_moe import LoraMoeConfig

R = 8


class Loop(nn.Module):
    """Experts one after the other, each on the tokens that chose it."""

    def __init__(self, base, n, k=2):
        super().__init__()
        self.base, self.n, self.k = base, n, k
        self.router = nn.Linear(base.in_features, n, bias=False)
        self.a = nn.ModuleList(nn.Linear(base.in_features, R, bias=False) for _ in range(n))
        self.b = nn.ModuleList(nn.Linear(R, base.out_features, bias=False) for _ in range(n))

    def delta(self, x):
        weights, chosen = self.router(x).float().softmax(-1).topk(self.k, dim=-1)
        weights = weights / weights.sum(-1, keepdim=True)
        out = torch.zeros(len(x), self.base.out_features, dtype=x.dtype, device=x.device)
        for j in range(self.n):
            token, place = torch.where(chosen == j)
            result = self.b[j](self.a[j](x[token])) * weights[token, place, None]
            out.index_add_(0, token, result * 2)
        return out

    def forward(self, x):
        return self.base(x) + self.delta(x)


class Nothing(nn.Linear):
    """A base whose output is there already, so that only the adapter is timed."""

    def forward(self, x):
        if not hasattr(self, "out") or len(self.out) != len(x):
            self.out = x.new_zeros(len(x), self.out_features)
        return self.out


def layers(d, n, whole, device):
    """name -> layer, on bases of the same shape."""

    def base():
        made = (nn.Linear if whole else Nothing)(d, d, bias=False, device=device)
        return made.requires_grad_(False)

    moe = LoraMoeConfig(
        target_modules=["0"], num_experts=n, r=R, lora_dropout=0.0, router_aux_loss_coef=1e-3
    )
    lora = LoraConfig(target_modules=["0"], r=n * R, lora_alpha=2 * n * R, lora_dropout=0.0)
    found = {"loop": Loop(base(), n).to(device)}
    for name, config in (("ours", moe), ("lora", lora)):
        found[name] = get_peft_model(nn.Sequential(base()), config).base_model.model[0]
    return found


TOKENS = 50  # decoded one after the other in a round


def seconds(layer, x, grad):
    """Of one forward and backward pass; without a gradient, of one of TOKENS forward passes."""
    x.grad = None
    layer.zero_grad()
    if x.is_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    if grad is not None:
        layer(x).backward(grad)
    else:
        for _ in range(TOKENS):
            layer(x)
    if x.is_cuda:
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / (1 if grad is not None else TOKENS)


def kept(layer, x):
    """Megabytes that autograd keeps from forward to backward."""
    own = {p.untyped_storage().data_ptr() for p in layer.parameters()}
    found = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = layer(x)
        size = sum(found.values())
    del out
    return size / 1e6


def compare(found, x, grad, rounds):
    """Milliseconds of ours, and the ratios loop / ours and ours / lora."""
    for layer in found.values():
        seconds(layer, x, grad)
    times = [
        {name: seconds(layer, x, grad) for name, layer in found.items()} for _ in range(rounds)
    ]
    return (
        statistics.median(t["ours"] * 1e3 for t in times),
        statistics.median(t["loop"] / t["ours"] for t in times),
        statistics.median(t["ours"] / t["lora"] for t in times),
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--d", type=int, default=4096)
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 2048, 1])
    parser.add_argument("--experts", type=int, nargs="+", default=[2, 5, 8, 10])
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--parts", nargs="+", default=["adapter", "layer"])
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    print(f"{arguments.device}, {torch.get_num_threads()} threads, d = {arguments.d}, r = {R}")
    columns = ["part", "T", "N", "ours_ms", "loop/ours", "ours/lora"]
    columns += ["ours_MB", "loop_MB", "lora_MB"]
    print("  ".join(f"{c:>9}" for c in columns))
    for part in arguments.parts:
        for n in arguments.experts:
            found = layers(arguments.d, n, part == "layer", arguments.device)
            for tokens in arguments.tokens:
                x = torch.randn(tokens, arguments.d, device=arguments.device)
                train = tokens > 1
                grad = torch.randn_like(x) if train else None
                for layer in found.values():
                    layer.train(train)
                x.requires_grad_(train)
                with torch.set_grad_enabled(train):
                    measured = compare(found, x, grad, arguments.rounds)
                    memory = [kept(found[name], x) for name in ("ours", "loop", "lora")]
                row = [part, tokens, n, *(f"{m:.2f}" for m in measured)]
                row += [f"{m:.1f}" for m in memory]
                print("  ".join(f"{c:>9}" for c in row), flush=True)


if __name__ == "__main__":
    main()
