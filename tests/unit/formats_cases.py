"""Checkpoints of every format for the conversion tests, and the memory that a conversion takes."""

from __future__ import annotations

import json
import sys
import threading
import time
from pathlib import Path

import torch
from torch import Tensor

from neuron_lightning import checkpoint
from neuron_lightning.checkpoint.formats import convert as formats
from neuron_lightning.checkpoint.formats import neuron, pickled
from neuron_lightning.checkpoint.formats.contents import Contents, Entry
from neuron_lightning.models.llama import LlamaConfig, LlamaForCausalLM
from neuron_lightning.optim import ParallelOptimizer, get_param_groups_by_weight_decay

SHAPE = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
}


class Trained(torch.nn.Module):
    """A Llama within a module, as a LightningModule holds it, and its optimizer after some steps."""

    def __init__(self, config: LlamaConfig, dtype: torch.dtype = torch.float32, steps: int = 2) -> None:
        super().__init__()
        torch.manual_seed(0)
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            self.model = LlamaForCausalLM(config)
        finally:
            torch.set_default_dtype(before)
        self.steps = steps
        adam = torch.optim.AdamW(get_param_groups_by_weight_decay(self), lr=1e-2, foreach=False)
        self.optimizer = ParallelOptimizer(adam, zero1=False, master_weights=dtype == torch.bfloat16)
        for step in range(steps):
            self.train_step(step)

    def train_step(self, step: int) -> float:
        """One step on a batch that depends on its number only; returns the loss."""
        ids = torch.randint(0, 60, (2, 16), generator=torch.Generator().manual_seed(step))
        loss = self.model(ids, labels=ids).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss.detach())

    def save(self, path: Path) -> None:
        checkpoint.write_checkpoint(
            path,
            module_state=self.state_dict(),
            parameters=dict(self.named_parameters()),
            optimizers=[self.optimizer],
            trainer_state={"global_step": self.steps, "epoch": 0, "lr_schedulers": [{"last_epoch": 2}]},
        )

    def load(self, path: Path) -> None:
        parameters = dict(self.named_parameters())
        checkpoint.load_module_state(path, self.state_dict(), parameters)
        self.optimizer.reload_master_weights()
        checkpoint.load_optimizer_state(path, [self.optimizer], parameters)


def write_config(path: Path, config: LlamaConfig) -> Path:
    path.write_text(json.dumps(config.to_hf()), encoding="utf-8")
    return path


def tensors_of(path: Path) -> dict[str, Tensor]:
    return {name: entry.full().clone() for name, entry in neuron.read(path).tensors.items()}


def entry(tensor: Tensor) -> Entry:
    return pickled.entry_of(tensor)


def generated(megabytes: int) -> Contents:
    """A model that is in no memory: its values are made when they are read."""
    width = 1024
    rows = megabytes * (1 << 20) // (4 * width) // 8

    def make(seed: int, count: int) -> Entry:
        def read(box: object) -> Tensor:
            rows_wanted, start = box.shape[0], box.offset[0]  # type: ignore[attr-defined]
            values = torch.arange(start, start + rows_wanted, dtype=torch.float32)[:, None] + seed
            return values.expand(rows_wanted, width).clone()

        return Entry(torch.float32, (count, width), read)

    tensors = {"model/big.weight": make(0, 4 * rows)}
    tensors |= {f"model/layer.{i}.weight": make(i, rows) for i in range(1, 5)}
    return Contents(tensors=tensors, trainer={"global_step": 1})


def peak_memory(source: str, folder: str) -> None:
    """Converts to every format and back, and prints the greatest growth of anonymous memory since the start, in MB, by conversion."""
    peaks: dict[str, float] = {}
    before = _anonymous()
    root = Path(folder)
    plan = {"rules": {".*": "rows"}, "kv_multiplier": 1, "tp": 2, "weights_only": True}
    for kind in ("file", "hf", "dcp", "nxd", "lightning"):
        back = (
            [(f"{kind} to neuron", root / kind, root / "back")] if kind != "hf" else []
        )  # read as a file is
        for name, start, end in [(f"neuron to {kind}", Path(source), root / kind), *back]:
            target = kind if end.name == kind else "neuron"
            options = formats.ConvertOptions(target=target, overwrite=True, verify=False, **plan)
            with Watch() as watch:
                formats.convert(start, end, options)
            peaks[name] = (watch.peak - before) / 1e6
    print(json.dumps(peaks))


class Watch:
    """Samples this process' anonymous memory."""

    def __enter__(self) -> Watch:
        self.peak = _anonymous()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._done.is_set():
            self.peak = max(self.peak, _anonymous())
            time.sleep(0.002)


def _anonymous() -> int:
    text = Path("/proc/self/status").read_text(encoding="ascii")
    return int(text.partition("RssAnon:")[2].split()[0]) * 1024


if __name__ == "__main__":
    peak_memory(*sys.argv[1:])
