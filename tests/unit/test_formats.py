"""Conversions: every format there and back, in bounded memory, and nothing half-done."""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict

from neuron_lightning import checkpoint
from neuron_lightning.checkpoint.boxes import Box
from neuron_lightning.checkpoint.formats import contents, names, neuron
from neuron_lightning.checkpoint.formats import convert as formats
from neuron_lightning.cli.main import main
from neuron_lightning.errors import CheckpointError
from neuron_lightning.models.llama import LlamaConfig
from neuron_lightning.models.llama_nxd import NXD_LLAMA
from tests.unit import formats_cases as cases

ROUND_TRIPS = {
    "dcp": [],
    "lightning": [],
    "nxd": ["--tp", "4"],
    "nxd zero1": ["--tp", "2", "--dp", "3", "--zero1"],
    "nxd core": ["--tp", "4", "--dp", "2", "--zero1", "--core", "--no-xser"],
    "nxd plain": ["--tp", "8", "--no-xser"],
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with our checkpoint ``ours`` and its ``config.json``; bf16 with master weights."""
    folder = tmp_path_factory.mktemp("trained")
    config = LlamaConfig(**cases.SHAPE)
    cases.Trained(config, torch.bfloat16).save(folder / "ours")
    cases.write_config(folder / "config.json", config)
    return folder


def run(*arguments: object) -> None:
    assert main([str(argument) for argument in arguments]) == 0


def same(a: Path, b: Path, without: tuple[str, ...] = ()) -> None:
    first, second = cases.tensors_of(a), cases.tensors_of(b)
    first = {name: tensor for name, tensor in first.items() if not name.endswith(without or ("\0",))}
    assert sorted(first) == sorted(second)
    assert [
        n for n in first if not torch.equal(contents.as_bytes(first[n]), contents.as_bytes(second[n]))
    ] == []


@pytest.mark.parametrize("case", ROUND_TRIPS)
def test_there_and_back_is_bit_for_bit_the_same(trained: Path, tmp_path: Path, case: str) -> None:
    kind, extra = case.split()[0], ROUND_TRIPS[case]
    run(
        "convert", trained / "ours", tmp_path / "x", "--to", kind, "--config", trained / "config.json", *extra
    )
    run("convert", tmp_path / "x", tmp_path / "back", "--to", "neuron", "--config", trained / "config.json")
    sharded = kind != "nxd" or "--zero1" in extra  # a plain NxD optimizer has no place for master weights
    same(trained / "ours", tmp_path / "back", () if sharded else ("/master",))
    before, after = neuron.read(trained / "ours"), neuron.read(tmp_path / "back")
    assert after.groups == before.groups
    assert after.scalars == before.scalars
    assert after.trainer["global_step"] == 2
    assert after.trainer["lr_schedulers"] == [{"last_epoch": 2}]


@pytest.mark.parametrize("case", ["dcp", "lightning", "nxd zero1"])
def test_a_converted_checkpoint_resumes_as_the_first_one_does(
    trained: Path, tmp_path: Path, case: str
) -> None:
    kind, extra = case.split()[0], ROUND_TRIPS[case]
    run(
        "convert", trained / "ours", tmp_path / "x", "--to", kind, "--config", trained / "config.json", *extra
    )
    run("convert", tmp_path / "x", tmp_path / "back", "--to", "neuron", "--config", trained / "config.json")
    losses = []
    for path in (trained / "ours", tmp_path / "back"):
        model = cases.Trained(LlamaConfig(**cases.SHAPE), torch.bfloat16, steps=0)
        model.load(path)
        losses.append([model.train_step(step) for step in range(2, 5)])
    assert losses[0] == losses[1]


def test_hugging_face_folder_and_one_file_there_and_back(trained: Path, tmp_path: Path) -> None:
    weights = checkpoint.read_full_state(trained / "ours")
    config = ["--config", trained / "config.json"]
    run("convert", trained / "ours", tmp_path / "hf", "--to", "hf", "--max-file-size", "8K", *config)
    files = sorted(p.name for p in (tmp_path / "hf").glob("*.safetensors"))
    assert len(files) > 3
    assert max((tmp_path / "hf" / name).stat().st_size for name in files) < 12_000
    run("convert", tmp_path / "hf", tmp_path / "back", "--to", "neuron", "--prefix", "model.")
    run("merge", trained / "ours", tmp_path / "one.safetensors")
    run("convert", tmp_path / "one.safetensors", tmp_path / "again", "--to", "neuron")
    for path in (tmp_path / "back", tmp_path / "again"):
        read = checkpoint.read_full_state(path)
        assert sorted(read) == sorted(weights)
        assert all(torch.equal(read[name], weights[name]) for name in weights)


def test_files_of_bounded_size_are_one_checkpoint(tmp_path: Path) -> None:
    model = cases.generated(4)
    neuron.write(tmp_path / "a", model, max_file_bytes=600_000)
    assert len(list((tmp_path / "a").glob("part-*.model.safetensors"))) == 5
    assert torch.equal(checkpoint.read_full_state(tmp_path / "a")["big.weight"][:, 0], torch.arange(512.0))


def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    megabytes, allowed = 192, 64
    neuron.write(tmp_path / "ours", cases.generated(megabytes))
    command = [sys.executable, cases.__file__, str(tmp_path / "ours"), str(tmp_path)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, cwd=Path(__file__).parents[2], env=None
    )
    assert done.returncode == 0, done.stderr
    peaks = json.loads(done.stdout.splitlines()[-1])
    assert len(peaks) == 9
    assert max(peaks.values()) < allowed, peaks


@pytest.mark.parametrize("kind", ["neuron", "hf", "file", "dcp", "nxd", "lightning"])
def test_a_failed_conversion_leaves_nothing(tmp_path: Path, kind: str) -> None:
    def fails(box: Box) -> torch.Tensor:
        raise CheckpointError("the disk is gone")

    broken = contents.Contents(
        tensors={
            "model/a.weight": cases.entry(torch.ones(4, 4)),
            "model/b.weight": contents.Entry(torch.float32, (4, 4), fails),
        }
    )
    options = formats.ConvertOptions(target=kind, rules={".*": "rows"})
    with pytest.raises(CheckpointError, match="the disk is gone"):
        formats.write(tmp_path / "x", broken, options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["neuron", "hf", "file", "dcp", "nxd", "lightning"])
def test_nothing_is_overwritten_unless_it_is_allowed(tmp_path: Path, kind: str) -> None:
    model = contents.Contents(tensors={"model/a.weight": cases.entry(torch.ones(4, 4))})
    options = formats.ConvertOptions(target=kind, rules={".*": "rows"})
    formats.write(tmp_path / "x", model, options)
    with pytest.raises(CheckpointError, match="exists: choose another name"):
        formats.write(tmp_path / "x", model, options)
    two = contents.Contents(tensors={"model/a.weight": cases.entry(torch.full((4, 4), 2.0))})
    again = formats.ConvertOptions(target=kind, rules={".*": "rows"}, overwrite=True)
    formats.write(tmp_path / "x", two, again)
    assert formats.read(tmp_path / "x", again).weights()["a.weight"].full().sum() == 32
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_what_is_there_is_recognised(tmp_path: Path) -> None:
    model = contents.Contents(tensors={"model/a.weight": cases.entry(torch.ones(4, 4))})
    for kind in formats.FORMATS:
        formats.write(tmp_path / kind, model, formats.ConvertOptions(target=kind, rules=NXD_LLAMA))
        assert formats.detect(tmp_path / kind) == kind
    with pytest.raises(CheckpointError, match="there is no checkpoint at"):
        formats.detect(tmp_path / "missing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"no checkpoint of a known format \(it holds nothing\)"):
        formats.detect(tmp_path / "empty")


def test_rename_rules(tmp_path: Path) -> None:
    rename = names.from_rules({r"^backbone\.": "model.", r"(\d+)\.attn": r"\1.self_attn"})
    assert rename("backbone.layers.3.attn.q.weight") == "model.layers.3.self_attn.q.weight"
    with pytest.raises(CheckpointError, match="no regular expression"):
        names.from_rules({"(": ""})
    model = contents.Contents(tensors={f"model/{n}": cases.entry(torch.ones(2)) for n in ("a.x", "b.x")})
    with pytest.raises(CheckpointError, match=r"model/a\.x and model/b\.x would both be called model/x"):
        model.renamed(names.from_rules({r"^[ab]\.": ""}))
    (tmp_path / "rules.json").write_text("[]", encoding="utf-8")
    with pytest.raises(CheckpointError, match="one JSON object"):
        names.read_rules(tmp_path / "rules.json")


def test_slices_are_all_of_a_tensor_in_order() -> None:
    for shape in ((), (7,), (3, 5), (2, 3, 4), (1, 1000), (0, 4)):
        tensor = torch.arange(torch.Size(shape).numel()).reshape(shape)
        pieces = [cases.entry(tensor).read(box).reshape(-1) for box in contents.slices(shape, 4, 16)]
        assert torch.equal(torch.cat(pieces) if pieces else tensor.reshape(-1), tensor.reshape(-1))
        assert all(piece.numel() <= 4 for piece in pieces)


class Executes:
    """Pickles to a call that leaves a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("where", ["dcp metadata", "dcp value", "lightning"])
def test_a_pickle_with_code_is_refused(tmp_path: Path, where: str) -> None:
    kind = where.split()[0]
    model = contents.Contents(tensors={"model/a.weight": cases.entry(torch.ones(4, 4))})
    formats.write(tmp_path / "x", model, formats.ConvertOptions(target=kind))
    harm = Executes(tmp_path / "executed")
    if where == "dcp metadata":
        (tmp_path / "x" / ".metadata").write_bytes(pickle.dumps(harm))
    elif where == "dcp value":
        shutil.rmtree(tmp_path / "x")
        dcp.save(
            {"model": {"a": torch.ones(2)}, "neuron_lightning": harm},
            checkpoint_id=tmp_path / "x",
            no_dist=True,
        )
    else:
        torch.save({"state_dict": {"a.weight": torch.ones(4, 4)}, "hyper_parameters": harm}, tmp_path / "x")
    with pytest.raises(CheckpointError, match="refused"):
        formats.convert(tmp_path / "x", tmp_path / "ours", formats.ConvertOptions(target="neuron"))
    assert not (tmp_path / "executed").exists()
    assert not (tmp_path / "ours").exists()


def test_metadata_that_names_files_elsewhere_is_refused(tmp_path: Path) -> None:
    model = contents.Contents(tensors={"model/a.weight": cases.entry(torch.ones(4, 4))})
    formats.write(tmp_path / "x", model, formats.ConvertOptions(target="dcp"))
    path = tmp_path / "x" / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    for info in metadata.storage_data.values():
        info.relative_path = "../elsewhere"
    path.write_bytes(pickle.dumps(metadata))
    with pytest.raises(
        CheckpointError, match=r"names the file '\.\./elsewhere', which is not in its folder: refused"
    ):
        formats.read(tmp_path / "x", formats.ConvertOptions(target="neuron"))
    formats.write(tmp_path / "hf", model, formats.ConvertOptions(target="hf"))
    index = {"weight_map": {"a.weight": "../x/model.safetensors"}}
    (tmp_path / "hf" / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"names the file '\.\./x/model\.safetensors'"):
        formats.read(tmp_path / "hf", formats.ConvertOptions(target="neuron"))


def test_a_folder_that_torch_wrote_from_a_training(tmp_path: Path) -> None:
    """By the recipe of torch's documentation: get_state_dict, nested under model and optimizer."""
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    weights, state = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=tmp_path / "dcp", no_dist=True)
    formats.convert(tmp_path / "dcp", tmp_path / "ours", formats.ConvertOptions(target="neuron"))
    found = cases.tensors_of(tmp_path / "ours")
    assert all(torch.equal(found[f"model/{name}"], tensor) for name, tensor in model.state_dict().items())
    moment = optimizer.state[model[1].weight]["exp_avg"]
    assert torch.equal(found["optimizer.0/1.weight/exp_avg"], moment)
    described = neuron.read(tmp_path / "ours")
    assert described.scalars["optimizer.0/0.bias"] == {"step": 1.0}
    assert described.groups[0][0]["params"] == ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert described.groups[0][0]["options"]["lr"] == 0.1
