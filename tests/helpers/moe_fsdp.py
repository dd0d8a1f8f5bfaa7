"""One rank of the FSDP2 test: a plain loop over a sharded tiny adapter."""

from __future__ import annotations

import os
import sys

import torch

from helpers import moe_tiny as tiny
from helpers.moe_train import collate, rows

STEPS = 3


def losses(model, ranks):
    """Mean loss by step; rank r, or one process in turn, takes rows 4 s + 2 r and the next."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    data, found = rows(), []
    model.train()
    for step in range(STEPS):
        total = torch.zeros(())
        for rank in ranks:
            start = 4 * step + 2 * rank
            loss = model(**collate(data[start : start + 2])).loss
            (loss / len(ranks)).backward()
            total = total + loss.detach() / 2
        if len(ranks) == 1:
            torch.distributed.all_reduce(total)
        optimizer.step()
        optimizer.zero_grad()
        found.append(float(total))
    return found


if __name__ == "__main__":
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.distributed.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    model = tiny.adapted("goat", router_aux_loss_coef=0.5)
    for block in model.get_base_model().model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    found = losses(model, [int(os.environ["RANK"])])
    if os.environ["RANK"] == "0":
        torch.save({"losses": found}, f"{sys.argv[1]}.pt")
    torch.distributed.destroy_process_group()
