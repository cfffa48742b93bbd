"""Pretrain a Llama the way that NxD Lightning's developer guide teaches, step for step.

    torchrun --nproc-per-node 4 examples/llama/guide.py --tensor_parallel_size 2 --zero1 --max_steps 100

Three pieces: a module that spells its training step out (manual optimization), a data module around a function
that makes the loader, and a Trainer with the strategy, the precision plugin, the bar and the logger. A script
written for NxD Lightning differs from this one in its import lines. ``pretrain.py`` trains the same model with
less ceremony; with equal settings both log equal losses.
"""

from __future__ import annotations

import argparse
import warnings
from typing import Any

import torch
from lightning import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

from neuron_lightning import (
    NeuronLightningDataModule,
    NeuronLTModule,
    NeuronTensorBoardLogger,
    NeuronTQDMProgressBar,
    NeuronXLAPrecisionPlugin,
    NeuronXLAStrategy,
    initialize_parallel_optimizer,
    neuronx_distributed_config,
    parallel_state,
    xm,
)
from neuron_lightning.config import NeuronConfig
from neuron_lightning.data import create_pretraining_dataloader, prepare_pretraining_data
from neuron_lightning.models.llama import LlamaConfig, LlamaForCausalLM
from neuron_lightning.optim.schedules import get_cosine_schedule_with_warmup

WEIGHT_DECAY = 0.01
NO_DECAY = ("bias", "LayerNorm")


class NeuronLlamaLTModule(NeuronLTModule):
    """The guide's module: forward, backward, optimizer and logging in the open."""

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """One micro-batch; every ``grad_accum_steps``-th ends in an optimizer step."""
        xm.mark_step()  # the graph of forward and backward begins
        self._print_step_of_loggers(-1)
        self.should_print = False
        outputs = self.model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=batch["labels"]
        )
        loss = outputs.loss / self.grad_accum_steps
        loss.backward()
        self.averaged_loss += loss.detach()
        xm.mark_step()  # and ends
        if not self.automatic_optimization and (batch_idx + 1) % self.grad_accum_steps == 0:
            self._optimizer_step()
        return loss

    def _optimizer_step(self) -> None:
        self.should_print = True
        mean_over_replicas = xm.all_reduce(
            xm.REDUCE_SUM,
            self.averaged_loss / self.trainer.strategy.data_parallel_size,
            groups=parallel_state.get_data_parallel_group(as_list=True),
        )
        self.averaged_loss.zero_()
        optimizer, scheduler = self.optimizers(), self.lr_schedulers()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        xm.mark_step()  # the optimizer has a graph of its own
        self.loss = mean_over_replicas.detach()

    def configure_optimizers(self) -> tuple[list[Optimizer], list[dict[str, Any]]]:
        """The optimizer that ``nxd_config`` describes, and the schedule."""
        param_groups = self.get_param_groups_by_weight_decay()
        optimizer = initialize_parallel_optimizer(
            self.nxd_config, self.opt_cls, param_groups, **self.opt_kwargs
        )
        optimizer.zero_grad()
        scheduler = self.scheduler_cls(optimizer, *self.scheduler_args, **self.scheduler_kwargs)
        return [optimizer], [{"scheduler": scheduler}]

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """Logs the step that the batch ended in, if it did."""
        if not self.should_print or self.automatic_optimization:
            return
        loss = torch.zeros(1) if self.loss is None else self.loss.detach().cpu().item()
        self.log("loss", loss, prog_bar=True)
        self.log("global_step", float(self.global_step), prog_bar=True, on_step=True, on_epoch=True)
        self._print_step_of_loggers(self.global_step)

    def get_param_groups_by_weight_decay(self) -> list[dict[str, Any]]:
        """The guide's own rule: by name alone. (NeuronLTModule's exempts norms and vectors as well.)"""
        named = list(self.model.named_parameters())
        exempt = [any(word in name for word in NO_DECAY) for name, _ in named]
        return [
            {
                "params": [p for (_, p), no in zip(named, exempt, strict=True) if not no],
                "weight_decay": WEIGHT_DECAY,
            },
            {"params": [p for (_, p), no in zip(named, exempt, strict=True) if no], "weight_decay": 0.0},
        ]

    def _print_step_of_loggers(self, step: int) -> None:
        for logger in self.trainer.loggers:
            logger.print_step = step


def create_llama_pretraining_dataset(
    data_dir: str, batch_size: int, dp_size: int, dp_rank: int, seed: int, seq_len: int
) -> DataLoader[dict[str, Tensor]]:
    """This data-parallel rank's loader; the batches carry an attention mask, which the training step reads."""
    return create_pretraining_dataloader(
        data_dir, batch_size, dp_size, dp_rank, seed, seq_len=seq_len, attention_mask=True
    )


def configure_scheduler(optimizer: Optimizer, warmup_steps: int, max_steps: int) -> LambdaLR:
    """Warm-up, then a cosine down to a tenth."""
    return get_cosine_schedule_with_warmup(optimizer, warmup_steps, max_steps, min_lr_ratio=0.1)


def parse() -> argparse.Namespace:
    """The flags, under the guide's names where it has one."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", help="text, JSON lines or token ids (default: Python's standard library)")
    add("--data_dir", default="runs/data", help="where tokenised data is kept")
    add("--max_bytes", type=int, help="cap on the standard library's text")
    add("--log_dir", default="runs/guide")
    add("--seed", type=int, default=1234)
    add("--tensor_parallel_size", type=int, default=1)
    add("--zero1", action="store_true")
    add("--sequence_parallel", action="store_true")
    add("--batch_size", type=int, default=4, help="sequences of a micro-batch and replica")
    add("--grad_accum_usteps", type=int, default=1)
    add("--max_steps", type=int, default=100, help="optimizer steps that the schedule spans")
    add("--steps_this_run", type=int, help="stop after this many (default: max_steps)")
    add("--warmup_steps", type=int, default=10)
    add("--lr", type=float, default=1e-3)
    add("--save_checkpoint", action="store_true")
    add("--checkpoint_freq", type=int, default=50)
    add("--checkpoint_dir", default="runs/guide/checkpoints")
    add("--num_kept_checkpoint", type=int, default=2)
    add("--ckpt_path", help="checkpoint to resume from")
    add("--vocab_size", type=int, default=4096)
    add("--seq_len", type=int, default=128)
    add("--hidden_size", type=int, default=128)
    add("--intermediate_size", type=int, default=352)
    add("--num_layers", type=int, default=2)
    add("--num_heads", type=int, default=8)
    add("--num_kv_heads", type=int, default=4)
    return parser.parse_args()


def build_model(flags: argparse.Namespace, nxd_config: NeuronConfig) -> NeuronLlamaLTModule:
    """The guide's call of its module."""
    model_config = LlamaConfig(
        vocab_size=flags.vocab_size,
        hidden_size=flags.hidden_size,
        intermediate_size=flags.intermediate_size,
        num_hidden_layers=flags.num_layers,
        num_attention_heads=flags.num_heads,
        num_key_value_heads=flags.num_kv_heads,
        max_position_embeddings=flags.seq_len,
    )
    return NeuronLlamaLTModule(
        model_fn=LlamaForCausalLM,
        nxd_config=nxd_config,
        model_args=(model_config,),
        opt_cls=torch.optim.AdamW,
        scheduler_cls=configure_scheduler,
        opt_kwargs={"lr": flags.lr},
        scheduler_args=(flags.warmup_steps, flags.max_steps),
        grad_accum_steps=flags.grad_accum_usteps,
        manual_opt=True,
    )


def build_trainer(flags: argparse.Namespace, nxd_config: NeuronConfig) -> Trainer:
    """Strategy, plugins, callbacks and Trainer, in the guide's order."""
    strategy = NeuronXLAStrategy(nxd_config=nxd_config)
    plugins: list[Any] = [NeuronXLAPrecisionPlugin()]
    callbacks: list[Any] = [NeuronTQDMProgressBar()]
    if flags.save_checkpoint:
        callbacks.append(
            ModelCheckpoint(
                save_top_k=flags.num_kept_checkpoint,
                monitor="global_step",
                mode="max",
                every_n_train_steps=flags.checkpoint_freq,
                dirpath=flags.checkpoint_dir,
            )
        )
    return Trainer(
        strategy=strategy,
        max_steps=flags.steps_this_run or flags.max_steps,
        plugins=plugins,
        enable_checkpointing=flags.save_checkpoint,
        logger=NeuronTensorBoardLogger(save_dir=flags.log_dir),
        log_every_n_steps=1,
        callbacks=callbacks,
    )


def main() -> None:
    """Data, config, model, Trainer, fit."""
    # A checkpoint here holds the state after the optimizer step, which is what resuming needs.
    warnings.filterwarnings("ignore", message="Using ModelCheckpoint with manual optimization")
    flags = parse()
    seed_everything(flags.seed)
    prepared = prepare_pretraining_data(
        flags.data, flags.data_dir, vocab_size=flags.vocab_size, max_bytes=flags.max_bytes
    )
    nxd_config = neuronx_distributed_config(
        tensor_parallel_size=flags.tensor_parallel_size,
        sequence_parallel=flags.sequence_parallel,
        optimizer_config={"zero_one_enabled": flags.zero1},
    )
    data_module = NeuronLightningDataModule(
        create_llama_pretraining_dataset,
        str(prepared.path),
        flags.batch_size,
        data_args=(flags.seed, flags.seq_len),
    )
    model = build_model(flags, nxd_config)
    build_trainer(flags, nxd_config).fit(model=model, datamodule=data_module, ckpt_path=flags.ckpt_path)


if __name__ == "__main__":
    main()
