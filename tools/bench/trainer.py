"""The rows that Lightning's Trainer drives: its own DDP on Hugging Face's model, and our strategy on ours."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import lightning
import peers
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from workload import Workload


class Batches(Dataset[Tensor]):
    """Item ``i`` is this rank's slice of the ``i``-th global batch."""

    def __init__(self, workload: Workload, num_steps: int, world_size: int) -> None:
        self._workload, self._num_steps, self._world_size = workload, num_steps, world_size

    def __len__(self) -> int:
        return self._num_steps

    def __getitem__(self, index: int) -> Tensor:
        if index >= self._num_steps:
            raise IndexError(index)
        return self._workload.batch(index, dist.get_rank(), self._world_size, self._world_size)


class Module(lightning.LightningModule):
    """Automatic optimization; notes each step's loss and the time at which it began."""

    def __init__(self, name: str, workload: Workload, folder: Path, dtype: torch.dtype) -> None:
        super().__init__()
        self._build = (name, workload, folder, dtype)
        self.model: Any = None
        self.losses: list[Tensor] = []
        self.starts: list[float] = []

    def configure_model(self) -> None:
        """Builds the peer's model, once."""
        if self.model is None:
            name, _, folder, dtype = self._build
            build = peers.our_model if peers.PEERS[name].ours else peers.hugging_face
            self.model = build(folder, dtype)

    def training_step(self, input_ids: Tensor, batch_idx: int) -> Tensor:
        """The loss of one batch."""
        self.starts.append(time.perf_counter())
        loss: Tensor = self.model(input_ids=input_ids, labels=input_ids).loss
        self.losses.append(loss.detach())
        return loss

    def on_train_end(self) -> None:
        """The end of the last step."""
        self.starts.append(time.perf_counter())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW over everything."""
        return torch.optim.AdamW(self.parameters(), lr=self._build[1].lr)


def run(
    name: str, workload: Workload, folder: Path, dtype: torch.dtype, num_steps: int
) -> tuple[list[float], list[Tensor]]:
    """(seconds, loss) of every step."""
    world_size = peers.PEERS[name].world_size
    module = Module(name, workload, folder, dtype)
    trainer = lightning.Trainer(
        strategy=_our_strategy() if peers.PEERS[name].ours else "ddp",
        accelerator="cpu",
        devices=world_size,
        precision="bf16-true" if dtype == torch.bfloat16 else "32-true",
        max_steps=num_steps,
        gradient_clip_val=workload.max_grad_norm,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(Batches(workload, num_steps, world_size), batch_size=None))
    pairs = zip(module.starts, module.starts[1:], strict=False)
    return [end - start for start, end in pairs], module.losses


def _our_strategy() -> Any:
    from neuron_lightning import NeuronXLAStrategy, neuronx_distributed_config

    plain = {"use_master_weights": False, "use_fp32_grad_acc": False}
    config = neuronx_distributed_config(
        optimizer_config={"zero_one_enabled": True, "grad_clipping": False}, mixed_precision_config=plain
    )
    return NeuronXLAStrategy(nxd_config=config)
