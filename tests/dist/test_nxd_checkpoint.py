"""NxD's ``save_checkpoint`` and ``load_checkpoint`` in a training loop without a Trainer."""

from __future__ import annotations

import os

import pytest
import torch
import torch.distributed as dist
from torch import nn

import neuron_lightning as nl
from neuron_lightning import parallel_state
from neuron_lightning.compat.checkpoint import close_background_saver
from neuron_lightning.errors import CheckpointError
from neuron_lightning.parallel import ColumnParallelLinear, RowParallelLinear, mesh


class Net(nn.Module):
    """Sharded over the tensor-parallel ranks."""

    def __init__(self):
        super().__init__()
        self.up = ColumnParallelLinear(8, 16, gather_output=False)
        self.down = RowParallelLinear(16, 4, input_is_parallel=True)

    def forward(self, x):
        return self.down(self.up(x))


def build(tp, zero1):
    torch.manual_seed(1)
    mesh.initialize(tp=tp)
    config = nl.neuronx_distributed_config(
        tensor_parallel_size=tp, optimizer_config={"zero_one_enabled": zero1}
    )
    model = nl.initialize_parallel_model(config, Net)
    optimizer = nl.initialize_parallel_optimizer(config, torch.optim.AdamW, model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5)
    return model, optimizer, scheduler


def train(model, optimizer, scheduler, steps):
    losses = []
    for step in steps:
        x = torch.randn(4, 8, generator=torch.Generator().manual_seed(step))
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        losses.append(float(loss))
    return losses


def rank_saves_and_loads(folder, background, before, after):
    try:
        assert not nl.has_checkpoint(folder)
        with pytest.raises(CheckpointError, match="there is no checkpoint in"):
            nl.load_checkpoint(folder, model=None)
        model, optimizer, scheduler = build(*before)
        for step in (1, 2, 3, 10):
            train(model, optimizer, scheduler, [step])
            nl.save_checkpoint(
                folder, f"step_{step}", model, optimizer, scheduler, user_content={"step": step, "names": ("a",)},
                num_kept_ckpts=2, async_save=background, use_xser=True, num_workers=4,
            )  # fmt: skip
        nl.finalize_checkpoint()
        dist.barrier()
        assert nl.has_checkpoint(folder)
        names = sorted(os.listdir(folder))
        expected = train(model, optimizer, scheduler, range(11, 15))
        parallel_state.destroy_model_parallel()
        model, optimizer, scheduler = build(*after)
        content = nl.load_checkpoint(folder, None, model, optimizer, scheduler)
        found = train(model, optimizer, scheduler, range(11, 15))
        older = nl.load_checkpoint(folder, "step_3", model)
        with pytest.raises(CheckpointError, match=r"could not read .*step_1"):
            nl.load_checkpoint(folder, "step_1", model)
        return names, content, older["step"], expected, found
    finally:
        close_background_saver()
        parallel_state.destroy_model_parallel()


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize(
    ("before", "after"), [((2, False), (2, False)), ((2, False), (1, True)), ((1, True), (2, True))]
)
def test_a_loop_saves_keeps_two_and_goes_on(pool2, tmp_path, background, before, after):
    for names, content, older, expected, found in pool2.run(
        rank_saves_and_loads, str(tmp_path), background, before, after
    ):
        assert names == ["step_10", "step_3"]  # by number, not by name
        assert content == {"step": 10, "names": ("a",)}
        assert older == 3
        assert found == pytest.approx(expected, rel=1e-5)


def rank_names_without_numbers(folder):
    try:
        model, _, _ = build(1, False)
        for tag in ("c", "b", "a"):
            nl.save_checkpoint(folder, tag, model, user_content=tag, num_kept_ckpts=2)
        dist.barrier()
        return sorted(os.listdir(folder)), nl.load_checkpoint(folder)
    finally:
        parallel_state.destroy_model_parallel()


def test_tags_without_a_number_are_in_the_order_of_saving(pool2, tmp_path):
    assert pool2.run(rank_names_without_numbers, str(tmp_path)) == [(["a", "b"], "a")] * 2


def test_what_cannot_be_saved(tmp_path):
    with pytest.raises(CheckpointError, match="needs the module itself as model=, not dict"):
        nl.save_checkpoint(tmp_path, 1, model={})
    with pytest.raises(CheckpointError, match="num_kept_ckpts must be at least 1"):
        nl.save_checkpoint(tmp_path, 1, model=nn.Linear(1, 1), num_kept_ckpts=0)
    try:
        nl.save_checkpoint(tmp_path, 1, model=nn.Linear(1, 1))
        with pytest.raises(CheckpointError, match=r"needs model=…"):
            nl.load_checkpoint(tmp_path, 1, optimizer=object())
    finally:
        parallel_state.destroy_model_parallel()
