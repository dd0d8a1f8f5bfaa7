"""The LoRA-MoE layer against a loop over experts and against plain LoRA of rank N r, in one run.

    python benchmarks/lora_moe.py [--d 4096] [--tokens 512 2048] [--experts 2 5 8 10] [--rounds 5]

Peers: ``loop`` is the MoLA way, for each expert the tokens that chose it, added up by index;
``lora`` is PEFT's own LoRA layer of rank N r. Forward and backward, then one token without
gradients (decode). ``adapter`` leaves the frozen linear out on all sides, ``layer`` has it.
Times are medians over rounds in turn; memory is what autograd keeps, parameters left out.
"""

import argparse
import statistics
import time
import warnings

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
    """A base that costs nothing, so that only the adapter is timed."""

    def forward(self, x):
        return x.new_zeros(1)


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


def step(layer, x, grad):
    out = layer(x)
    if grad:
        out.sum().backward()


def seconds(layer, x, grad):
    if x.is_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    step(layer, x, grad)
    if x.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


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
    times = {name: [] for name in found}
    for layer in found.values():
        step(layer, x, grad)
    for _ in range(rounds):
        for name, layer in found.items():
            times[name].append(seconds(layer, x, grad))
    return {name: statistics.median(values) for name, values in times.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--d", type=int, default=4096)
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 2048])
    parser.add_argument("--experts", type=int, nargs="+", default=[2, 5, 8, 10])
    parser.add_argument("--rounds", type=int, default=5)
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
            for tokens in [*arguments.tokens, 1]:
                x = torch.randn(tokens, arguments.d, device=arguments.device)
                train = tokens > 1
                for layer in found.values():
                    layer.train(train)
                x.requires_grad_(train)
                with torch.set_grad_enabled(train):
                    t = compare(found, x, train, arguments.rounds if train else 50)
                    memory = [kept(found[name], x) for name in ("ours", "loop", "lora")]
                row = [part, tokens, n, f"{t['ours'] * 1e3:.2f}", f"{t['loop'] / t['ours']:.2f}"]
                row += [f"{t['ours'] / t['lora']:.2f}", *(f"{m:.1f}" for m in memory)]
                print("  ".join(f"{c:>9}" for c in row), flush=True)


if __name__ == "__main__":
    main()
