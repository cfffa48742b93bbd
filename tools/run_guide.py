"""Run the code blocks of NxD Lightning's developer guide as they stand, and print the losses.

    torchrun --nproc-per-node 2 tools/run_guide.py nxd_lightning_guide.txt --tensor_parallel_size 2

The guide's text is read from PATH; its ``.. code:: ipython3`` blocks are executed unchanged, in order. Supplied
are only what the guide takes for granted: the imports, ``flags``, the configs, and the function that makes the
data, which takes the tuple that the guide's own data module hands on (it nests ``data_args`` by a stray comma).

First the blocks up to the training run are executed. Then (``--checkpointing``) they are executed again for half
the steps with the guide's ModelCheckpoint, and its last block resumes from what that wrote: the losses of the
resumed half must be those of the uninterrupted run.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import textwrap
import typing
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

import neuron_lightning as nl
from neuron_lightning.data import create_pretraining_dataloader, prepare_pretraining_data
from neuron_lightning.models.llama import LlamaConfig, LlamaForCausalLM
from neuron_lightning.optim.schedules import get_cosine_schedule_with_warmup

_FENCE = re.compile(r"^\.\. code:: ipython3\s*$")
_MODULE_CLASS = "NeuronLlamaLTModule"


def code_blocks(text: str) -> list[str]:
    """The ``ipython3`` blocks of a reStructuredText file, dedented."""
    lines = text.splitlines()
    blocks = []
    for number, line in enumerate(lines):
        if _FENCE.match(line):
            body = []
            for following in lines[number + 1 :]:
                if following.strip() and not following.startswith(" "):
                    break
                body.append(following)
            blocks.append(textwrap.dedent("\n".join(body)).strip("\n"))
    return blocks


def sort_blocks(blocks: list[str]) -> dict[str, list[str]]:
    """Blocks by what they are: ``definitions``, ``setup``, ``train``, ``checkpoint`` and ``resume``."""
    kinds: dict[str, list[str]] = {k: [] for k in ("definitions", "setup", "train", "checkpoint", "resume")}
    for block in blocks:
        if block.startswith(("class ", "def ")):
            kind = "definitions"
        elif block.startswith("trainer = "):
            kind = "train"
        elif "ModelCheckpoint(" in block:
            kind = "checkpoint"
        elif "ckpt_path" in block:
            kind = "resume"
        else:
            kind = "setup"
        kinds[kind].append(block)
    missing = [kind for kind, found in kinds.items() if not found]
    if missing:
        sys.exit(f"run_guide: the file has no block for {', '.join(missing)}; is it the developer guide?")
    return kinds


class LossRecorder(Callback):
    """Keeps the loss that the guide's module logs, by optimizer step, once its own hooks have run."""

    def __init__(self) -> None:
        self.losses: dict[int, float] = {}

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        """The metrics of the step before are complete now."""
        self._keep(trainer)

    def on_train_end(self, trainer: Any, *_: Any) -> None:
        """And those of the last step."""
        self._keep(trainer)

    def _keep(self, trainer: Any) -> None:
        if "loss" in trainer.callback_metrics:
            self.losses[trainer.global_step] = float(trainer.callback_metrics["loss"])


def namespace_for(flags: argparse.Namespace) -> dict[str, Any]:
    """The names that the guide's blocks use and do not define."""

    def create_llama_pretraining_dataset(
        data_dir: str, batch_size: int, dp_size: int, dp_rank: int, data_args: tuple[int, ...]
    ) -> Any:
        (seed,) = data_args  # the guide's data module wraps its tuple in another one
        return create_pretraining_dataloader(
            data_dir, batch_size, dp_size, dp_rank, seed, seq_len=flags.seq_len, attention_mask=True
        )

    def configure_scheduler(optimizer: Any, warmup_steps: int, max_steps: int) -> Any:
        return get_cosine_schedule_with_warmup(optimizer, warmup_steps, max_steps, min_lr_ratio=0.1)

    supplied = {name: getattr(nl, name) for name in nl.__all__}
    supplied.update(
        torch=torch,
        Trainer=lightning.Trainer,
        LightningDataModule=lightning.LightningDataModule,
        ModelCheckpoint=ModelCheckpoint,
        **{name: getattr(typing, name) for name in ("Callable", "Dict", "Tuple")},
        LlamaForCausalLM=LlamaForCausalLM,
        flags=flags,
        nxd_config=nl.neuronx_distributed_config(
            tensor_parallel_size=flags.tensor_parallel_size,
            sequence_parallel=flags.sequence_parallel,
            optimizer_config={"zero_one_enabled": flags.zero1},
        ),
        model_config=LlamaConfig(
            vocab_size=flags.vocab_size,
            hidden_size=flags.hidden_size,
            intermediate_size=flags.intermediate_size,
            num_hidden_layers=flags.num_layers,
            num_attention_heads=flags.num_heads,
            num_key_value_heads=flags.num_kv_heads,
            max_position_embeddings=flags.seq_len,
        ),
        optimizer_cls=torch.optim.AdamW,
        configure_scheduler=configure_scheduler,
        create_llama_pretraining_dataset=create_llama_pretraining_dataset,
    )
    return supplied


def execute(blocks: list[str], namespace: dict[str, Any]) -> None:
    """Executes blocks in order; a method that stands alone joins the guide's module class."""
    for block in blocks:
        exec(compile(block, "<guide>", "exec"), namespace)
        match = re.match(r"def (\w+)\(self", block)
        if match:
            setattr(namespace[_MODULE_CLASS], match.group(1), namespace[match.group(1)])


def train(kinds: dict[str, list[str]], flags: argparse.Namespace) -> dict[int, float]:
    """The guide from its first block to ``trainer.fit``; returns the loss of every optimizer step."""
    namespace, recorder = prepared_namespace(kinds, flags, [])
    execute(kinds["train"], namespace)
    return recorder.losses


def train_and_resume(kinds: dict[str, list[str]], flags: argparse.Namespace) -> dict[int, float]:
    """Half the steps with the guide's ModelCheckpoint, then its last block for the rest."""
    half = flags.steps_this_run // 2
    saving = {"save_checkpoint": True, "checkpoint_freq": half}
    first = argparse.Namespace(**{**vars(flags), **saving, "steps_this_run": half})
    namespace, _ = prepared_namespace(kinds, first, kinds["checkpoint"])
    execute(kinds["train"], namespace)
    checkpoint = namespace["trainer"].checkpoint_callback.best_model_path

    second = argparse.Namespace(**{**vars(flags), **saving})
    namespace, recorder = prepared_namespace(kinds, second, kinds["checkpoint"])
    namespace["ckpt_path"] = checkpoint
    # The guide's training block ends in a fit() from step 0; its resume block stands in for that line.
    construction = kinds["train"][0].rsplit("trainer.fit(", 1)[0]
    execute([construction, *kinds["resume"]], namespace)
    return recorder.losses


def prepared_namespace(
    kinds: dict[str, list[str]], flags: argparse.Namespace, extra: list[str]
) -> tuple[dict[str, Any], LossRecorder]:
    """The names after every block before the Trainer's, and the recorder among the callbacks."""
    namespace, recorder = namespace_for(flags), LossRecorder()
    lightning.seed_everything(flags.seed, verbose=False)
    execute([*kinds["definitions"], *kinds["setup"], *extra], namespace)
    namespace["callbacks"].append(recorder)
    return namespace, recorder


def parse() -> argparse.Namespace:
    """PATH, and the flags that the guide reads."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("path", type=Path, help="the guide's .txt or .rst")
    add("--checkpointing", action="store_true", help="also run the guide's checkpoint and resume blocks")
    add("--data", help="text, JSON lines or token ids (default: Python's standard library)")
    add("--data_dir", default="runs/data")
    add("--max_bytes", type=int)
    add("--log_dir", default="runs/run_guide")
    add("--seed", type=int, default=1234)
    add("--tensor_parallel_size", type=int, default=1)
    add("--zero1", action="store_true")
    add("--sequence_parallel", action="store_true")
    add("--batch_size", type=int, default=4)
    add("--grad_accum_usteps", type=int, default=1)
    add("--max_steps", type=int, default=20)
    add("--steps_this_run", type=int)
    add("--warmup_steps", type=int, default=10)
    add("--lr", type=float, default=1e-3)
    add("--checkpoint_dir", default="runs/run_guide/checkpoints")
    add("--num_kept_checkpoint", type=int, default=1)
    add("--vocab_size", type=int, default=4096)
    add("--seq_len", type=int, default=128)
    add("--hidden_size", type=int, default=128)
    add("--intermediate_size", type=int, default=352)
    add("--num_layers", type=int, default=2)
    add("--num_heads", type=int, default=8)
    add("--num_kv_heads", type=int, default=4)
    flags = parser.parse_args()
    flags.steps_this_run = flags.steps_this_run or flags.max_steps
    flags.save_checkpoint, flags.checkpoint_freq = False, flags.steps_this_run
    return flags


def main() -> None:
    """Runs the blocks, prints one line of JSON per optimizer step on rank 0."""
    flags = parse()
    kinds = sort_blocks(code_blocks(flags.path.read_text(encoding="utf-8")))
    flags.data_dir = str(
        prepare_pretraining_data(
            flags.data, flags.data_dir, vocab_size=flags.vocab_size, max_bytes=flags.max_bytes
        ).path
    )
    losses = {"guide": train(kinds, flags)}
    if flags.checkpointing:
        losses["resumed"] = train_and_resume(kinds, flags)
    if lightning.pytorch.utilities.rank_zero_only.rank == 0:
        for run, by_step in losses.items():
            for step, loss in by_step.items():
                print(json.dumps({"run": run, "step": step, "loss": loss}), flush=True)


if __name__ == "__main__":
    main()
