"""Pretrain a Llama from the command line.

    torchrun --nproc-per-node 4 examples/llama/pretrain.py fit --config examples/llama/configs/quickstart.yaml

Every value of the YAML file can be set on the command line too: ``--trainer.max_steps 1000``,
``--model.lr 1e-3``, ``--data.data 'books/*.txt'``, ``--ckpt_path runs/…``. ``fit --help`` lists them.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from report import RunReport
from torch import Tensor

from neuron_lightning import NeuronLTModule
from neuron_lightning.lightning.pretraining import PretrainingDataModule
from neuron_lightning.models.llama import LlamaConfig, LlamaForCausalLM
from neuron_lightning.optim import get_param_groups_by_weight_decay as param_groups
from neuron_lightning.optim.schedules import get_cosine_schedule_with_warmup


class LlamaPretrainModule(NeuronLTModule):
    """A Llama with AdamW and a cosine schedule; layout, ZeRO-1 and clipping are the strategy's.

    Args:
        llama: the model's shape.
        lr: highest learning rate.
        weight_decay: of matrices; biases and norms are exempt (see ``no_decay``).
        betas: AdamW's.
        warmup_steps: optimizer steps until the highest learning rate.
        max_steps: optimizer steps in all; the command line takes it from ``trainer.max_steps``.
        min_lr_ratio: share of the learning rate that is left at the end.
        grad_accum_steps: batches in an optimizer step.
        no_decay: parameters whose name contains one of these are exempt from weight decay; None: biases,
            norms and everything one-dimensional.
    """

    def __init__(
        self,
        llama: LlamaConfig,
        lr: float = 3e-4,
        weight_decay: float = 0.1,
        betas: tuple[float, float] = (0.9, 0.95),
        warmup_steps: int = 100,
        max_steps: int = 1000,
        min_lr_ratio: float = 0.1,
        grad_accum_steps: int = 1,
        no_decay: list[str] | None = None,
    ) -> None:
        super().__init__(
            model_fn=LlamaForCausalLM,
            model_args=(llama,),
            opt_cls=torch.optim.AdamW,
            opt_kwargs={"lr": lr, "weight_decay": weight_decay, "betas": tuple(betas)},
            scheduler_cls=get_cosine_schedule_with_warmup,
            scheduler_args=(warmup_steps, max_steps),
            scheduler_kwargs={"min_lr_ratio": min_lr_ratio},
            grad_accum_steps=grad_accum_steps,
        )
        self._no_decay = no_decay
        self.save_hyperparameters()

    def setup(self, stage: str | None = None) -> None:
        """Builds the model in the layout that the strategy was given."""
        self.nxd_config = self.trainer.strategy.nxd_config
        super().setup(stage)

    def get_param_groups_by_weight_decay(self) -> list[dict[str, Any]]:
        """Parameters with and without weight decay."""
        decay = self.opt_kwargs["weight_decay"]
        if self._no_decay is None:
            return param_groups(self.model, decay)
        return param_groups(self.model, decay, self._no_decay, exempt_1d=False)

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Mean loss over the held-out documents, over all data-parallel ranks."""
        loss = self.model(**batch).loss
        self.log("val_loss", loss, prog_bar=True, sync_dist=True, batch_size=batch["input_ids"].shape[0])


class LlamaCLI(LightningCLI):
    """LightningCLI that keeps the two places where a number is needed equal, and adds the report."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_lightning_class_args(RunReport, "report")
        parser.link_arguments("trainer.max_steps", "model.max_steps")
        parser.link_arguments("data.vocab_size", "model.llama.vocab_size")


def main(args: Any = None) -> LlamaCLI:
    """Runs the command line."""
    # Lightning's use of a torch function that torch renamed; nothing that anybody here could do about it
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")
    # A checkpoint here holds the state after the optimizer step, which is what resuming needs.
    warnings.filterwarnings("ignore", message="Using ModelCheckpoint with manual optimization")
    return LlamaCLI(
        LlamaPretrainModule,
        PretrainingDataModule,
        seed_everything_default=1234,
        save_config_kwargs={"overwrite": True},
        args=args,
    )


if __name__ == "__main__":
    main()
