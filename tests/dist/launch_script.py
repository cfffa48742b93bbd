"""What the launch and failure tests run as a script, on every rank.

Usage: launch_script.py FOLDER [options]; each rank writes what it saw to FOLDER/rank-N.json.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
from pathlib import Path

import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import Callback
from torch.utils.data import DataLoader

from neuron_lightning import NeuronXLAStrategy
from tests.dist import strategy_cases as cases


class Trouble(Callback):
    """Fails, gets a signal, or leaves hanging peers behind, at one step of one rank."""

    def __init__(self, kind: str, rank: int) -> None:
        self.kind, self.rank = kind, rank

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_rank != self.rank or trainer.global_step != 2:
            return
        if self.kind == "raise":
            raise ValueError("the data of rank 1 is bad")
        if self.kind == "sigterm":
            os.kill(os.getpid(), signal.SIGTERM)
        if self.kind == "interrupt":
            os.killpg(0, signal.SIGINT)  # what a terminal does on Ctrl-C


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--devices", type=int)
    parser.add_argument("--num-nodes", type=int)
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--trouble", default="none")
    parser.add_argument("--rank", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs start without it
    seed_everything(11, verbose=False)
    module = cases.Mlp()
    logger = cases.Records()
    given = {"devices": args.devices, "num_nodes": args.num_nodes}
    trainer = Trainer(
        strategy=NeuronXLAStrategy(tensor_parallel_size=args.tp, zero1=True),
        max_epochs=args.epochs,
        precision="64-true",
        logger=logger,
        log_every_n_steps=1,
        callbacks=[Trouble(args.trouble, args.rank)],
        **{name: value for name, value in given.items() if value is not None},
        **{key: value for key, value in cases.QUIET.items() if key != "accelerator"},
    )
    batch = 8 // trainer.strategy.world_size
    trainer.fit(module, DataLoader(cases.dataset(), batch_size=batch))
    seen = {
        "world": trainer.world_size,
        "nodes": trainer.num_nodes,
        "devices": trainer.num_devices,
        "ids": module.seen,
        "steps": trainer.global_step,
        "losses": [record["loss"] for _, record in logger.records],
    }
    (args.folder / f"rank-{trainer.global_rank}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main()
