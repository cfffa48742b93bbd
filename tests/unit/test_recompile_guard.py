"""The guard with ``torch.compile``: it is there by itself, names the cause, and can fail the run."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from neuron_lightning import NeuronXLAStrategy, RecompileGuard
from neuron_lightning.errors import ConfigError, RecompileError
from neuron_lightning.lightning.recompiles.dynamo import is_compiled
from neuron_lightning.lightning.recompiles.operators import OperatorRecord, differences
from neuron_lightning.lightning.recompiles.reads import ReadWatch


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * 2


class Compiled(LightningModule):
    """One compiled layer; the batch gets shorter at step ``change``."""

    def __init__(self, change: int | None = None) -> None:
        super().__init__()
        self.layer = Layer()
        self.layer.compile(backend="eager", dynamic=False)
        self.change = change

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        rows = 2 if self.global_step == self.change else 3
        return self.layer(batch[:rows]).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)

    def train_dataloader(self) -> Any:
        return DataLoader(torch.ones(30, 4), batch_size=3)


class Plain(Compiled):
    def __init__(self) -> None:
        super().__init__()
        self.layer = Layer()


def fit(module: LightningModule, *callbacks: Callback) -> list[Any]:
    trainer = Trainer(
        strategy=NeuronXLAStrategy(), accelerator="cpu", devices=1, max_steps=8, callbacks=list(callbacks),
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module)
    return trainer.callbacks  # type: ignore[attr-defined, no-any-return]


def test_a_new_shape_is_named_with_the_compilers_reason() -> None:
    guard = RecompileGuard()
    with pytest.warns(UserWarning, match="RecompileGuard: step 5 compiled 1 graph"):
        fit(Compiled(change=5), guard)
    assert guard.num_recompiles == 1
    assert "size mismatch at index 0. expected 3, actual 2" in guard.reports[0]
    _, line = inspect.getsourcelines(Layer.forward)
    assert f"test_recompile_guard.py:{line} in forward" in guard.reports[0]


def test_it_can_fail_the_run() -> None:
    with pytest.raises(
        RecompileError, match=r"1 graph\(s\) were compiled after .* max_recompiles is 0.*step 5"
    ):
        fit(Compiled(change=5), RecompileGuard(max_recompiles=0))


def test_a_steady_run_passes_and_warm_up_may_compile() -> None:
    guard = RecompileGuard(max_recompiles=0)
    fit(Compiled(change=1), guard)
    assert (guard.num_recompiles, guard.reports) == (0, [])


def test_it_is_added_where_something_is_compiled_and_once() -> None:
    def kinds(callbacks: list[Any]) -> list[str]:
        return [type(c).__name__ for c in callbacks if isinstance(c, RecompileGuard)]

    assert kinds(fit(Compiled())) == ["RecompileGuard"]
    assert kinds(fit(Compiled(), RecompileGuard())) == ["RecompileGuard"]
    assert kinds(fit(Plain())) == []
    assert not is_compiled(Plain())
    assert is_compiled(nn.Sequential(torch.compile(nn.Linear(1, 1), backend="eager")))


@pytest.mark.parametrize("options", [{"max_recompiles": -1}, {"max_recompiles": 1.5}, {"warmup_steps": True}])
def test_numbers_that_make_no_sense_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="must be an integer of 0 or more"):
        RecompileGuard(**options)


def test_what_is_different_between_two_steps_is_named() -> None:
    x = torch.ones(4, 2)

    def step(rows: int, factor: float, extra: bool) -> list[Any]:
        with OperatorRecord("cpu") as record:
            y = x[:rows] * factor
            if extra:
                y = y + 1
            y.sum()
        return record.calls

    reference = step(4, 0.5, False)
    assert differences(reference, step(4, 0.5, False)) == []
    (number,) = differences(reference, step(4, 1.0, False))
    assert "test_recompile_guard.py" in number
    assert "the Python number 1.0, it was 0.5" in number
    assert any(
        "shape ((2, 2), 'float32'), it was ((4, 2)" in said
        for said in differences(reference, step(2, 0.5, False))
    )
    assert "is called where" in differences(reference, step(4, 0.5, True))[0]


def test_reads_are_noted_and_the_tensor_class_is_left_as_it_was() -> None:
    before = {name: vars(torch.Tensor).get(name) for name in ("item", "tolist", "__bool__", "__float__")}
    watch = ReadWatch("cpu")
    watch.begin()
    assert torch.ones(1).item() == float(torch.ones(1)) == 1.0
    assert torch.ones(1, device="meta").shape == (1,)
    watch.end()
    assert {what for _, what in watch.found} == {".item()", "float()"}
    assert all("test_recompile_guard.py" in str(place) for place, _ in watch.found)
    assert before == {name: vars(torch.Tensor).get(name) for name in before}
