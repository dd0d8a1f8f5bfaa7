"""One rank of the distributed test: train a tiny adapter and write its losses and parameters."""

from __future__ import annotations

import sys

import torch

from helpers import moe_tiny as tiny
from helpers.moe_train import trainer
from htsr_alloc.training.run import leave

if __name__ == "__main__":
    out, batch, accumulate = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    run = trainer(tiny.adapted("alphalora", router_aux_loss_coef=0.5), out, batch, accumulate)
    run.train()
    if run.is_world_process_zero():
        losses = [row["loss"] for row in run.state.log_history if "loss" in row]
        parameters = {n: p for n, p in run.model.named_parameters() if p.requires_grad}
        torch.save({"losses": losses, "parameters": parameters}, f"{out}.pt")
    leave()
