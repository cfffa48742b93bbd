"""A training step that is not logged never waits for the device.

Everything is on the CPU here, so reads of tensors are counted that would be copies from a device there: while
a batch is trained on, by the thread that trains, forward and backward, optimizer, callbacks, bar and logger
included. What happens to the batch before it goes to the device is on the host everywhere and not counted.
"""

from __future__ import annotations

import traceback
from collections import Counter

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

from neuron_lightning import (
    NeuronLTModule,
    NeuronTensorBoardLogger,
    NeuronTQDMProgressBar,
    NeuronXLAStrategy,
    neuronx_distributed_config,
    parallel_state,
)
from tests.dist import strategy_cases as cases
from tests.dist.test_module import Net

READS = {
    "item",
    "tolist",
    "cpu",
    "numpy",
    "__bool__",
    "__float__",
    "__int__",
    "__index__",
    "nonzero",
    "is_nonzero",
}
ATEN_READS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::equal"}


class Counting:
    """Reads by batch, with where they were made."""

    def __init__(self):
        self.batch = -1
        self.on_host = False
        self.reads = Counter()
        self.places = {}

    def note(self, what):
        if self.batch >= 0 and not self.on_host:
            self.reads[self.batch] += 1
            self.places.setdefault(self.batch, what + "\n" + "".join(traceback.format_stack(limit=8)[:-2]))


class Functions(TorchFunctionMode):
    """Counts methods that read a tensor, and moves to the CPU that name it."""

    def __init__(self, counting):
        super().__init__()
        self.counting = counting

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        to_cpu = name == "to" and any(str(a) == "cpu" for a in args[1:] if isinstance(a, str))
        if name in READS or to_cpu:
            self.counting.note(name)
        return func(*args, **(kwargs or {}))


class Operators(TorchDispatchMode):
    """Counts operators that cannot run without reading the device, whoever calls them."""

    def __init__(self, counting):
        super().__init__()
        self.counting = counting

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.name().split(".")[0] in ATEN_READS:
            self.counting.note(func.name())
        return func(*args, **(kwargs or {}))


class Loader(DataLoader):
    """Says which batch is trained on."""

    counting: Counting

    def __iter__(self):
        for number, batch in enumerate(super().__iter__()):
            self.counting.batch = number
            yield batch
            self.counting.batch = -1


class Plain(cases.Mlp):
    """Automatic optimization that logs to the bar in every batch."""

    def training_step(self, batch, batch_idx):
        x, y = batch["x"], batch["y"]
        loss = (self(x.float()) - y.float()).square().mean()
        self.log("loss", loss, prog_bar=True)
        return loss


def rank_counts(folder, manual, every):
    counting = Counting()
    config = neuronx_distributed_config(optimizer_config={"zero_one_enabled": True})
    module = Plain()
    if manual:
        module = NeuronLTModule(
            config, torch.optim.AdamW, torch.optim.lr_scheduler.StepLR, model_fn=Net, model_args=(16,),
            opt_kwargs={"lr": 0.01}, scheduler_args=(3,), grad_accum_steps=2,
        )  # fmt: skip
    strategy = NeuronXLAStrategy(nxd_config=config)
    move = strategy.batch_to_device

    def batch_to_device(*args, **kwargs):
        counting.on_host = True
        try:
            return move(*args, **kwargs)
        finally:
            counting.on_host = False

    strategy.batch_to_device = batch_to_device
    trainer = Trainer(
        strategy=strategy, max_epochs=1, log_every_n_steps=every, accumulate_grad_batches=1 if manual else 2,
        gradient_clip_val=None if manual else 1.0,
        logger=NeuronTensorBoardLogger(save_dir=folder),
        callbacks=[ModelCheckpoint(dirpath=folder, every_n_train_steps=1000), NeuronTQDMProgressBar()],
        enable_model_summary=False, use_distributed_sampler=False,
    )  # fmt: skip
    rows = [{"x": x, "y": y} for x, y, _ in cases.dataset()]
    loader = Loader(rows, batch_size=2)
    loader.counting = counting
    try:
        with Functions(counting), Operators(counting):
            trainer.fit(module, loader)
        return dict(counting.reads), counting.places, trainer.global_step
    finally:
        parallel_state.destroy_model_parallel()


@pytest.mark.parametrize("manual", [False, True])
def test_no_host_synchronisation_on_unlogged_steps(pool2, tmp_path, manual):
    every = 4
    for reads, places, steps in pool2.run(rank_counts, str(tmp_path), manual, every):
        assert steps == 8
        logged = {2 * step - 1 for step in range(every, steps + 1, every)}  # the batch that ends the step
        shown = {batch + 1 for batch in logged}  # the bar shows a logged step when all hooks have run
        unlogged = {batch: places[batch] for batch in reads if batch not in logged | shown}
        assert unlogged == {}, "\n".join(f"batch {b}: {where}" for b, where in unlogged.items())
        assert sum(reads.get(batch, 0) for batch in logged | shown) > 0  # the counting counts
