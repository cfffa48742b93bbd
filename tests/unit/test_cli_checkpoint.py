"""``neuron-lightning checkpoint``: what people see, and the exit codes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from neuron_lightning.checkpoint.formats import contents, neuron
from neuron_lightning.cli.main import main
from tests.unit import formats_cases as cases


def write(path: Path, **values: torch.Tensor) -> None:
    tensors = {f"model/{name}": cases.entry(tensor) for name, tensor in values.items()}
    tensors["optimizer.0/a/exp_avg"] = cases.entry(torch.zeros(2, 3))
    groups = [[{"options": {"lr": 0.1}, "params": ["a"]}]]
    scalars = {"optimizer.0/a": {"step": 7.0}}
    found = contents.Contents(
        tensors=tensors, groups=groups, scalars=scalars, trainer={"global_step": 7, "epoch": 1}
    )
    neuron.write(path, found)


def test_inspect(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "a", a=torch.ones(2, 3), b=torch.ones(4, dtype=torch.bfloat16))
    assert main(["checkpoint", "inspect", str(tmp_path / "a"), "--all"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("a folder of this package")
    table = [line.split() for line in lines]
    assert ["step:", "7"] in table
    assert ["model", "2", "10", "0.0", "bfloat16,", "float32"] in table
    assert ["optimizer.0", "exp_avg", "1", "6", "0.0", "float32"] in table
    assert ["model/a", "float32", "2x3"] in table
    assert "optimizer 0, group 0: 1 parameters, lr=0.1" in lines


def test_verify(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "a", a=torch.ones(2, 3))
    write(tmp_path / "b", a=torch.ones(2, 3))
    assert main(["checkpoint", "verify", str(tmp_path / "a")]) == 0
    assert "intact (3 files" in capsys.readouterr().out
    victim = tmp_path / "b" / "part-00001.model.safetensors"
    raw = bytearray(victim.read_bytes())
    raw[-1] ^= 1
    victim.write_bytes(raw)
    assert main(["checkpoint", "verify", str(tmp_path / "a"), str(tmp_path / "b")]) == 1
    out = capsys.readouterr().out
    assert "/a: intact" in out
    assert "DAMAGED" in out
    assert "part-00001.model.safetensors does not match its hash" in out
    assert main(["checkpoint", "verify", str(tmp_path / "none")]) == 1


def test_diff(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "a", a=torch.ones(2, 3), b=torch.ones(4), c=torch.ones(1))
    write(tmp_path / "same", a=torch.ones(2, 3), b=torch.ones(4), c=torch.ones(1))
    other = torch.ones(2, 3)
    other[1, 2] = 1.25
    write(tmp_path / "b", a=other, b=torch.ones(5), d=torch.ones(1))
    assert main(["checkpoint", "diff", str(tmp_path / "a"), str(tmp_path / "same")]) == 0
    assert "equal: 4 tensors, bit for bit" in capsys.readouterr().out
    assert main(["checkpoint", "diff", str(tmp_path / "a"), str(tmp_path / "b")]) == 1
    out = capsys.readouterr().out
    rows = [line.split("  ") for line in out.splitlines()]
    found = {
        row[0].strip(): [part.strip() for part in row[1:] if part.strip()] for row in rows if len(row) > 1
    }
    assert found["model/a"] == ["1 of 6 values differ", "0.25"]
    assert found["model/b"] == ["shape [4] against [5]"]
    assert found["model/c"] == ["only in the first"]
    assert found["model/d"] == ["only in the second"]
    assert out.splitlines()[-1] == "4 differences"


def test_diff_of_nan_and_signed_zero(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "a", a=torch.tensor([[float("nan"), 0.0, 1.0]]), b=torch.tensor([float("nan")]))
    write(tmp_path / "b", a=torch.tensor([[float("nan"), 0.0, 1.0]]), b=torch.tensor([1.0]))
    assert main(["checkpoint", "diff", str(tmp_path / "a"), str(tmp_path / "b")]) == 1
    out = capsys.readouterr().out
    assert "model/a" not in out
    assert "1 of 1 values differ" in out
    assert "nan" in out


def test_an_error_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", str(tmp_path / "none"), str(tmp_path / "x"), "--to", "hf"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("neuron-lightning: there is no checkpoint at")
    assert len(error.splitlines()) == 1
