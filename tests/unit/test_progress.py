"""The bar: what it shows, where, how often, and that it reads no tensor between logged steps."""

from __future__ import annotations

import io
import re
import sys
from collections import Counter, OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from neuron_lightning.lightning import linebar, progress, throughput
from neuron_lightning.lightning.progress import NeuronTQDMProgressBar


class Module(LightningModule):
    """Automatic optimization; logs nothing by itself unless asked."""

    def __init__(self, log: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 1)
        self.names = log

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.layer(batch[0]).square().mean()
        for name in self.names:
            self.log(name, 100.0 + self.global_step, prog_bar=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", 7.25, prog_bar=True)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_loss", 1.0)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.layer(batch[0])

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.125)
        optimizer.grad_norm = torch.tensor(0.75)
        return optimizer


class Manual(Module):
    """Manual optimization over windows of two; logs the step in the hook that runs after the callbacks, as NxD does."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.layer(batch[0]).square().mean()
        self.manual_backward(loss / 2)
        if batch_idx % 2:
            self.optimizers().step()
            self.optimizers().zero_grad()
        return loss

    def on_train_batch_end(self, *args: Any) -> None:
        self.log("loss", 100.0 + self.global_step, prog_bar=True)


def data(samples: int = 16, batch: int = 2) -> DataLoader:
    return DataLoader(TensorDataset(torch.randn(samples, 3)), batch_size=batch)


def trainer(tmp_path: Path, bar: NeuronTQDMProgressBar, **kwargs: Any) -> Trainer:
    settings = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_model_summary": False,
        "log_every_n_steps": 1,
        "default_root_dir": tmp_path,
        "callbacks": [bar],
    }
    return Trainer(**{**settings, **kwargs})


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    out = capsys.readouterr().out
    assert "\r" not in out
    return out.splitlines()


def test_a_log_file_gets_whole_lines_with_all_values(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer(tmp_path, NeuronTQDMProgressBar(line_seconds=0), max_steps=6).fit(Module(), data())
    found = lines(capsys)
    assert [re.match(r"Epoch 0: step (\d+)/6 \|", line).group(1) for line in found] == list("123456")
    assert all(re.search(r"loss=\S+, lr=1.25e-01, grad_norm=0.75, samples/s=\d", line) for line in found)


def test_lines_are_rare(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer(tmp_path, NeuronTQDMProgressBar(line_seconds=60), max_steps=8).fit(Module(), data())
    found = lines(capsys)
    assert len(found) == 2
    assert "step 1/8" in found[0]
    assert "step 8/8" in found[1]


def test_a_line_holds_the_metrics_of_its_own_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer(tmp_path, NeuronTQDMProgressBar(line_seconds=0), max_steps=4).fit(Manual(), data())
    found = lines(capsys)
    assert len(found) == 4
    for line in found:
        step, loss = re.search(r"step (\d)/4 \| loss=(\d+)", line).groups()
        assert int(loss) == 100 + int(step)


def test_steps_are_counted_over_epochs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer(tmp_path, NeuronTQDMProgressBar(line_seconds=0), max_steps=6).fit(Module(), data(samples=8))
    found = lines(capsys)
    assert "Epoch 0: step 4/6" in found[3]
    assert "Epoch 1: step 6/6" in found[-1]


def test_without_max_steps_batches_of_each_epoch_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer(tmp_path, NeuronTQDMProgressBar(line_seconds=60), max_epochs=2).fit(Module(), data(samples=8))
    found = lines(capsys)
    assert any("Epoch 0: batch 4/4" in line for line in found)
    assert "Epoch 1: batch 4/4" in found[-1]


def test_what_the_module_logs_is_not_added_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module = Module(log=("train_loss", "lr", "global_norm"))
    trainer(tmp_path, NeuronTQDMProgressBar(line_seconds=0), max_steps=2).fit(module, data())
    last = lines(capsys)[-1]
    assert "train_loss=101" in last
    assert last.count("lr=") == last.count("norm=") == last.count("loss=") == 1


def test_no_tensor_is_read_between_logged_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read_at: list[int] = []
    bar = NeuronTQDMProgressBar(line_seconds=0)
    original = progress._number

    def counted(value: Any) -> float:
        if isinstance(value, Tensor):
            read_at.append(bar.trainer.global_step)
        return original(value)

    monkeypatch.setattr(progress, "_number", counted)
    trainer(tmp_path, bar, max_steps=8, log_every_n_steps=4).fit(Module(), data())
    assert sorted(set(read_at)) == [4, 8]
    assert len(read_at) == 4


def test_the_bar_adds_reads_at_logged_steps_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Tensor.item

    def reads(refresh_rate: int) -> Counter[int]:
        bar = NeuronTQDMProgressBar(refresh_rate, line_seconds=0)
        steps: Counter[int] = Counter()

        def item(self: Tensor) -> Any:
            steps[bar.trainer.global_step] += 1
            return original(self)

        monkeypatch.setattr(Tensor, "item", item)
        trainer(tmp_path, bar, max_steps=6, log_every_n_steps=3).fit(Module(), data())
        return steps

    assert set(reads(1) - reads(0)) == {3, 6}


class Terminal(io.StringIO):
    """A stdout that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_one_live_bar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Terminal()
    monkeypatch.setattr(sys, "stdout", screen)
    trainer(tmp_path, NeuronTQDMProgressBar(), max_steps=4).fit(Module(), data())
    shown = screen.getvalue()
    assert "\r" in shown
    last = shown.rstrip().split("\r")[-1]
    assert "4/4" in last
    assert "grad_norm=0.75" in last
    assert shown.count("\n") == 1


def test_other_ranks_show_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bar = NeuronTQDMProgressBar(line_seconds=0)
    run = trainer(tmp_path, bar, max_steps=2)
    run.strategy.__class__ = type(
        "Elsewhere", (type(run.strategy),), {"is_global_zero": property(lambda self: False)}
    )
    run.fit(Module(), data(), data(4))
    assert lines(capsys) == []


def test_refresh_rate_zero_shows_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer(tmp_path, NeuronTQDMProgressBar(refresh_rate=0), max_steps=2).fit(Module(), data())
    assert lines(capsys) == []


def test_validation_sanity_test_and_predict_are_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = trainer(tmp_path, NeuronTQDMProgressBar(line_seconds=0), max_steps=4, val_check_interval=2)
    module = Module()
    run.fit(module, data(), data(8))
    text = "\n".join(lines(capsys))
    assert "Sanity Checking DataLoader 0: batch 2/2" in text
    assert "Validation DataLoader 0: batch 4/4" in text
    assert "val_loss=7.25" in text
    for call, title in ((run.validate, "Validation"), (run.test, "Testing"), (run.predict, "Predicting")):
        call(module, data(8))
        assert f"{title} DataLoader 0: batch 4/4" in capsys.readouterr().out


def test_an_error_leaves_the_line_closed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Failing(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            if batch_idx == 2:
                raise ValueError("broken")
            return super().training_step(batch, batch_idx)

    bar = NeuronTQDMProgressBar(line_seconds=0)
    with pytest.raises(ValueError, match="broken"):
        trainer(tmp_path, bar, max_steps=4).fit(Failing(), data())
    assert lines(capsys)[-1].startswith("Epoch 0: step 2/4")
    assert bar.train_progress_bar.disable


@pytest.mark.parametrize(
    ("batch", "expected"),
    [
        ({"input_ids": torch.zeros(2, 8, dtype=torch.int64), "x": torch.zeros(9)}, (16, "tokens/s")),
        (torch.zeros(3, 5, dtype=torch.int64), (15, "tokens/s")),
        ([torch.zeros(3, 5), torch.zeros(3)], (3, "samples/s")),
        ({"image": torch.zeros(4, 3, 8, 8), "label": torch.zeros(4)}, (4, "samples/s")),
        (OrderedDict(text=["a", "b"]), (0, "samples/s")),
        (None, (0, "samples/s")),
        (torch.tensor(1.0), (0, "samples/s")),
    ],
)
def test_tokens_are_counted_from_shapes(batch: Any, expected: tuple[int, str]) -> None:
    assert throughput.count_batch(batch) == expected


def test_speed_leaves_pauses_out(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(throughput.time, "monotonic", lambda: clock[0])
    speed = throughput.Speedometer()
    assert speed.read() is None
    speed.start()
    speed.add(torch.zeros(5, 10, dtype=torch.int64), replicas=4)
    clock[0] = 2.0
    speed.pause()
    clock[0] = 50.0
    speed.resume()
    assert speed.read() == ("tokens/s", 100.0)
    assert speed.read() is None


def test_a_script_is_not_a_notebook(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not linebar.in_notebook()

    class Kernel:
        @staticmethod
        def get_ipython() -> Any:
            return type("Shell", (), {"config": {"IPKernelApp": {}}})()

    monkeypatch.setitem(sys.modules, "IPython", Kernel)
    assert linebar.in_notebook()
