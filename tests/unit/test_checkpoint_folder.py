"""Folders written and read by one process: exact round trips, damage found and named, nothing lost, nothing executed."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from neuron_lightning import checkpoint
from neuron_lightning.checkpoint import commit, manifest, points
from neuron_lightning.checkpoint.plan import Planner
from neuron_lightning.errors import CheckpointError
from neuron_lightning.optim import ParallelOptimizer
from tests.faults import mutations


class Model(nn.Module):
    """Every kind of entry: weights of several dtypes, tied ones, buffers, a scalar, an empty tensor."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.embed = nn.Embedding(12, 6)
        self.head = nn.Linear(6, 12, bias=False)
        self.norm = nn.BatchNorm1d(6)
        self.low = nn.Parameter(torch.empty(5, 3, dtype=torch.bfloat16))
        self.high = nn.Parameter(torch.empty(4, dtype=torch.float64))
        self.scalar = nn.Parameter(torch.empty(()))
        self.register_buffer("flags", torch.tensor([True, False]))
        self.register_buffer("nothing", torch.zeros(0, 3))
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=generator))
            self.norm.running_mean.copy_(torch.randn(6, generator=generator))
        self.head.weight = self.embed.weight


def save(path: Path, model: nn.Module, optimizers: Any = (), **kwargs: Any) -> None:
    kwargs.setdefault("trainer_state", {"global_step": 3, "epoch": 1})
    checkpoint.write_checkpoint(
        path,
        module_state=model.state_dict(),
        parameters=dict(model.named_parameters()),
        optimizers=optimizers,
        **kwargs,
    )


def load(path: Path, model: nn.Module, **kwargs: Any) -> tuple[list[str], list[str]]:
    return checkpoint.load_module_state(path, model.state_dict(), dict(model.named_parameters()), **kwargs)


def same(a: nn.Module, b: nn.Module) -> bool:
    pairs = zip(a.state_dict().items(), b.state_dict().items(), strict=True)
    return all(n == m and x.dtype == y.dtype and torch.equal(x, y) for (n, x), (m, y) in pairs)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A committed checkpoint with trainer and rank state."""
    trainer = {"global_step": 3, "epoch": 1, "score": torch.tensor(0.5), "loops": {"a": (1, 2)}}
    save(tmp_path / "a", Model(), trainer_state=trainer, rank_state={"rng": torch.arange(5), "n": 7})
    return tmp_path / "a"


@pytest.mark.parametrize("kind", ["deduped", "sharded"])
def test_module_round_trip_is_exact(tmp_path: Path, kind: str) -> None:
    model, other = Model(1), Model(2)
    save(tmp_path / "a", model, state_dict_type=kind)
    assert not same(model, other)
    assert load(tmp_path / "a", other) == ([], [])
    assert same(model, other)
    assert other.head.weight is other.embed.weight


def test_a_kept_planner_saves_what_is_there_now(tmp_path: Path) -> None:
    planner, model, restored = Planner(), Model(1), Model(9)
    for number in range(3):
        with torch.no_grad():
            model.low.add_(1)
            model.norm.running_mean = torch.full((6,), float(number))  # another tensor
        save(tmp_path / "a", model, planner=planner)
        load(tmp_path / "a", restored)
        assert same(model, restored)
    other = nn.Linear(3, 4)
    save(tmp_path / "b", other, planner=planner)
    assert torch.equal(checkpoint.read_full_state(tmp_path / "b")["weight"], other.weight)


def test_tied_weights_are_stored_once(saved: Path) -> None:
    stored = manifest.read(saved)
    assert stored.aliases == {"model/head.weight": "model/embed.weight"}
    assert "model/head.weight" not in stored.tensors
    full = checkpoint.read_full_state(saved)
    assert torch.equal(full["head.weight"], full["embed.weight"])


def test_a_tied_checkpoint_loads_into_an_untied_module_and_back(tmp_path: Path, saved: Path) -> None:
    untied = Model(5)
    untied.head.weight = nn.Parameter(torch.zeros(12, 6))
    assert load(saved, untied) == ([], [])
    assert torch.equal(untied.head.weight, untied.embed.weight)


def test_files_open_with_the_safetensors_library(saved: Path) -> None:
    tensors = load_file(saved / "rank-00000.model.safetensors")
    assert torch.equal(tensors["model/low"], Model().low.detach())
    assert tensors["model/flags"].dtype == torch.bool


def test_trainer_and_rank_state_come_back(saved: Path) -> None:
    trainer = checkpoint.read_trainer_state(saved)
    assert trainer["loops"] == {"a": (1, 2)}
    assert torch.equal(trainer["score"], torch.tensor(0.5))
    rank = checkpoint.read_rank_state(saved, 0)
    assert rank is not None
    assert torch.equal(rank["rng"], torch.arange(5))
    assert checkpoint.read_rank_state(saved, 1) is None
    assert manifest.read(saved).step == 3


def test_disk_holds_the_unique_bytes_only(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(256, 256), nn.Linear(256, 256))
    save(tmp_path / "a", model)
    unique = sum(p.numel() * 4 for p in model.parameters())
    assert sum(f.stat().st_size for f in (tmp_path / "a").iterdir()) <= unique * 1.01


def trained(
    seed: int, opt: Callable[..., torch.optim.Optimizer], steps: int
) -> tuple[nn.Module, ParallelOptimizer]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))
    unused = nn.Linear(2, 2)
    model.add_module("unused", unused)
    optimizer = ParallelOptimizer(opt(model.parameters()), zero1=False)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        x = torch.randn(8, 4, generator=generator)
        optimizer.zero_grad()
        model[2](model[1](model[0](x))).square().mean().backward()
        optimizer.step()
    return model, optimizer


@pytest.mark.parametrize(
    "opt",
    [
        lambda p: torch.optim.AdamW(p, lr=0.1),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        lambda p: torch.optim.SGD(p, lr=0.1),
        lambda p: torch.optim.NAdam(p, lr=0.1),
    ],
)
def test_a_resumed_optimizer_goes_on_bit_exactly(
    tmp_path: Path, opt: Callable[..., torch.optim.Optimizer]
) -> None:
    model, optimizer = trained(0, opt, 3)
    optimizer.param_groups[0]["lr"] = 0.05
    save(tmp_path / "a", model, [optimizer])
    fresh, resumed = trained(1, opt, 0)
    load(tmp_path / "a", fresh)
    checkpoint.load_optimizer_state(tmp_path / "a", [resumed], dict(fresh.named_parameters()))
    assert resumed.param_groups[0]["lr"] == 0.05
    x = torch.randn(8, 4)
    for _ in range(3):
        for m, o in ((model, optimizer), (fresh, resumed)):
            o.zero_grad()
            m[2](m[1](m[0](x))).square().mean().backward()
            o.step()
    assert same(model, fresh)


def test_a_default_device_does_not_move_what_belongs_to_the_host(tmp_path: Path) -> None:
    """As under ``torch.set_default_device``; memory of ``meta``, which holds nothing, would show at once."""
    opt = lambda p: torch.optim.AdamW(p, lr=0.1)
    (model, optimizer), (fresh, resumed) = trained(0, opt, 3), trained(1, opt, 0)
    with torch.device("meta"):
        save(tmp_path / "a", model, [optimizer])
        load(tmp_path / "a", fresh)
        checkpoint.load_optimizer_state(tmp_path / "a", [resumed], dict(fresh.named_parameters()))
        whole = checkpoint.read_full_state(tmp_path / "a")
    assert same(model, fresh)
    assert all(tensor.device.type == "cpu" for tensor in whole.values())
    for mine, theirs in zip(resumed.export_state(), optimizer.export_state(), strict=True):
        assert mine.scalars == theirs.scalars
        assert all(torch.equal(mine.tensors[name], value) for name, value in theirs.tensors.items())


def test_state_that_an_optimizer_already_has_is_overwritten_where_it_is(tmp_path: Path) -> None:
    def adam(p: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(p, lr=0.1)

    model, optimizer = trained(0, adam, 3)
    save(tmp_path / "a", model, [optimizer])
    for steps in (3, 5):
        other, resumed = trained(1, adam, steps)
        load(tmp_path / "a", other)
        checkpoint.load_optimizer_state(tmp_path / "a", [resumed], dict(other.named_parameters()))
        for got, want in zip(resumed.export_state(), optimizer.export_state(), strict=True):
            assert got.scalars == want.scalars
            assert all(torch.equal(got.tensors[key], want.tensors[key]) for key in want.tensors)


def test_optimizer_state_has_canonical_names(tmp_path: Path) -> None:
    model, optimizer = trained(0, lambda p: torch.optim.Adam(p), 2)
    save(tmp_path / "a", model, [optimizer])
    stored = manifest.read(tmp_path / "a")
    assert stored.tensors["optimizer.0/0.weight/exp_avg"].shape == (5, 4)
    assert stored.scalars["optimizer.0/0.weight"] == {"step": 2.0}
    assert not any("unused" in name for name in stored.tensors if name.startswith("optimizer"))


def test_weights_only_checkpoint_has_no_optimizer(tmp_path: Path) -> None:
    model, optimizer = trained(0, lambda p: torch.optim.Adam(p), 1)
    save(tmp_path / "a", model)
    with pytest.raises(CheckpointError, match=r"state of 0 optimizer\(s\), but 1"):
        checkpoint.load_optimizer_state(tmp_path / "a", [optimizer], dict(model.named_parameters()))


def test_another_grouping_is_named(tmp_path: Path) -> None:
    model, optimizer = trained(0, lambda p: torch.optim.Adam(p), 1)
    save(tmp_path / "a", model, [optimizer])
    other = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))
    changed = ParallelOptimizer(torch.optim.Adam(other.parameters()), zero1=False)
    with pytest.raises(CheckpointError, match=r"unused\.bias is in it only in the checkpoint"):
        checkpoint.load_optimizer_state(tmp_path / "a", [changed], dict(other.named_parameters()))


# -- other models -------------------------------------------------------------------------------------------


def test_names_and_shapes_that_differ_are_listed(saved: Path) -> None:
    other = Model()
    other.low = nn.Parameter(torch.zeros(5, 4))
    with pytest.raises(
        CheckpointError, match=r"low is \(5, 3\) in the checkpoint and \(5, 4\) in the module"
    ):
        load(saved, other)
    del other.low
    other.extra = nn.Parameter(torch.zeros(1))
    with pytest.raises(CheckpointError, match=r"missing in the checkpoint: extra.*unexpected in it: low"):
        load(saved, other)
    assert load(saved, other, strict=False) == (["extra"], ["low"])
    assert torch.equal(other.embed.weight, Model().embed.weight)


# -- damage -------------------------------------------------------------------------------------------------


def read_all(path: Path) -> None:
    load(path, Model())
    checkpoint.read_trainer_state(path)
    checkpoint.read_rank_state(path, 0)


def test_one_flipped_bit_in_any_file_is_found_and_the_file_named(saved: Path) -> None:
    names = sorted(f.name for f in saved.iterdir())
    assert len(names) == 6
    for name in names:
        original = (saved / name).read_bytes()
        for position in {0, 7, len(original) // 3, len(original) // 2, len(original) - 1}:
            damaged = bytearray(original)
            damaged[position] ^= 1 << (position % 8)
            (saved / name).write_bytes(damaged)
            with pytest.raises(CheckpointError, match=name):
                read_all(saved)
        (saved / name).write_bytes(original)
    read_all(saved)


@pytest.mark.parametrize("kind", ["truncated", "empty", "missing", "extra", "link", "swapped"])
def test_files_that_are_not_what_was_written(saved: Path, tmp_path: Path, kind: str) -> None:
    victim = saved / "rank-00000.model.safetensors"
    named = victim.name
    if kind == "truncated":
        os.truncate(victim, victim.stat().st_size - 1)
    elif kind == "empty":
        os.truncate(victim, 0)
    elif kind == "missing":
        victim.unlink()
    elif kind == "extra":
        named = "rank-00001.model.safetensors"
        shutil.copy(victim, saved / named)
    elif kind == "link":
        moved = victim.rename(tmp_path / "elsewhere")
        victim.symlink_to(moved)
    else:
        save(tmp_path / "b", Model(9))
        shutil.copy(tmp_path / "b" / named, victim)
    with pytest.raises(CheckpointError, match=named):
        load(saved, Model())


def reseal(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Edits a manifest and gives it a digest that fits again, as an attacker would."""
    document = json.loads((path / "manifest.json").read_bytes())
    document.pop("digest")
    change(document)
    (path / "manifest.json").write_bytes(manifest._seal(document))


BOX = ("tensors", "model/low", "boxes", 0)
POISON: list[tuple[str, Any]] = [
    ("files/../../x", "names the file"),
    ("files//etc/passwd", "names the file"),
    ("files/a b", "names the file"),
    ("files/..", "names the file"),
    ("version", "format version 99"),
    ("format", "not a manifest"),
    ("negative", "cannot be"),
    ("huge", "cannot be|is not inside"),
    ("outside", "is not inside"),
    ("uncovered", "no rank holds"),
    ("duplicate", "elements are stored"),
    ("dangling", "not there"),
    ("algorithm", "unknown kind"),
    ("dtype", "damaged"),
    ("unlisted", "not listed"),
]


def poison(document: dict[str, Any], what: str) -> None:
    half = document["tensors"]["model/low"]
    if what.startswith("files/"):
        document["files"][what.removeprefix("files/")] = next(iter(document["files"].values()))
    elif what == "version":
        document["version"] = 99
    elif what == "format":
        document["format"] = "something"
    elif what == "negative":
        half["shape"] = [-5, 3]
    elif what == "huge":
        half["shape"] = [1 << 60, 3]
    elif what == "outside":
        half["boxes"][0]["offset"] = [1, 0]
    elif what == "uncovered":
        half["boxes"] = []
    elif what == "duplicate":
        half["boxes"] *= 2
    elif what == "dangling":
        document["aliases"]["model/x"] = "model/y"
    elif what == "algorithm":
        next(iter(document["files"].values()))["algorithm"] = "md5"
    elif what == "dtype":
        half["dtype"] = "load"
    elif what == "unlisted":
        half["boxes"][0]["file"] = "other.safetensors"


@pytest.mark.parametrize(("what", "message"), POISON)
def test_a_poisoned_manifest_is_refused(saved: Path, what: str, message: str) -> None:
    reseal(saved, lambda document: poison(document, what))
    with pytest.raises(CheckpointError, match=message):
        load(saved, Model())


def test_an_edited_manifest_is_refused(saved: Path) -> None:
    raw = (saved / "manifest.json").read_bytes()
    (saved / "manifest.json").write_bytes(raw.replace(b'"step":3', b'"step":4'))
    with pytest.raises(CheckpointError, match=r"manifest\.json does not match its own digest"):
        load(saved, Model())


class Bomb:
    """Leaves a trace if it is ever unpickled."""

    def __reduce__(self) -> Any:
        return os.mkdir, (os.environ["BOMB_PATH"],)


@pytest.mark.parametrize(
    "name", ["manifest.json", "trainer.json", "rank-00000.model.safetensors", "trainer.safetensors"]
)
def test_a_pickle_in_any_slot_is_never_run(
    saved: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BOMB_PATH", str(tmp_path / "exploded"))
    data = pickle.dumps(Bomb())
    (saved / name).write_bytes(data)
    if name != "manifest.json":
        record = {"size": len(data), "hash": hashlib.sha256(data).hexdigest()}
        reseal(saved, lambda document: document["files"][name].update(record))
    with pytest.raises(CheckpointError):
        read_all(saved)
    assert not (tmp_path / "exploded").exists()


# -- the commit ---------------------------------------------------------------------------------------------


def test_a_committed_checkpoint_is_replaced_and_nothing_else_remains(saved: Path) -> None:
    save(saved, Model(4))
    other = Model(0)
    load(saved, other)
    assert same(other, Model(4))
    assert [f.name for f in saved.parent.iterdir()] == ["a"]


def test_replacing_works_where_names_cannot_be_exchanged(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commit, "_exchange", lambda a, b: False)
    save(saved, Model(4))
    other = Model(0)
    load(saved, other)
    assert same(other, Model(4))
    assert [f.name for f in saved.parent.iterdir()] == ["a"]


def test_a_crash_between_two_renames_loses_nothing(saved: Path) -> None:
    saved.rename(commit.replaced(saved))
    assert checkpoint.is_checkpoint(saved)
    other = Model(3)
    load(saved, other)
    assert same(other, Model(0))
    save(saved, Model(6))
    load(saved, other)
    assert same(other, Model(6))
    assert [f.name for f in saved.parent.iterdir()] == ["a"]


def test_a_crash_after_two_renames_leaves_nothing_for_long(saved: Path) -> None:
    shutil.copytree(saved, commit.replaced(saved))
    save(saved, Model(6))
    other = Model(3)
    load(saved, other)
    assert same(other, Model(6))
    assert [f.name for f in saved.parent.iterdir()] == ["a"]


@pytest.mark.parametrize("stage", ["prepare", "write", "manifest", "commit"])
def test_a_kill_at_any_stage_leaves_the_old_checkpoint(saved: Path, stage: str) -> None:
    pid = os.fork()
    if pid == 0:

        def die(at: str, done: int, total: int) -> None:
            if at == stage:
                os.kill(os.getpid(), 9)

        save(saved, Model(4), progress=die)
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 9
    other = Model(1)
    load(saved, other)
    assert same(other, Model(0))
    save(saved, Model(5))
    load(saved, other)
    assert same(other, Model(5))
    assert [f.name for f in saved.parent.iterdir()] == ["a"]


@pytest.mark.parametrize("point", ["share_opened", "share_written", "manifest_written", "before_rename"])
def test_an_error_while_writing_leaves_nothing_behind(saved: Path, point: str) -> None:
    def full_disk() -> None:
        raise OSError(28, "No space left on device")

    points.on(point, full_disk)
    with pytest.raises(CheckpointError, match="No space left on device"):
        save(saved, Model(4))
    points.clear()
    other = Model(1)
    load(saved, other)
    assert same(other, Model(0))
    assert [f.name for f in saved.parent.iterdir()] == ["a"]


def test_state_that_cannot_be_stored_is_named_and_nothing_is_written(tmp_path: Path) -> None:
    state = {"callbacks": {"Mine": {"model": nn.Linear(1, 1)}}}
    with pytest.raises(CheckpointError, match=r"callbacks\.Mine\.model"):
        checkpoint.check_trainer_state(state)
    with pytest.raises(CheckpointError, match=r"callbacks\.Mine\.model"):
        save(tmp_path / "a", Model(), trainer_state=state)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_is_no_checkpoint_is_never_overwritten_or_removed(tmp_path: Path, kind: str) -> None:
    target = tmp_path / "a"
    if kind == "file":
        target.write_text("precious")
    else:
        target.mkdir()
        (target / "notes.txt").write_text("precious")
    with pytest.raises(CheckpointError, match="is not a checkpoint"):
        save(target, Model())
    with pytest.raises(CheckpointError, match="is not a checkpoint"):
        load(target, Model())
    assert not checkpoint.is_checkpoint(target)
    if kind == "folder":
        with pytest.raises(CheckpointError, match="left as it is"):
            checkpoint.remove_checkpoint(target)
        assert (target / "notes.txt").read_text() == "precious"


def test_remove(saved: Path) -> None:
    checkpoint.remove_checkpoint(saved)
    checkpoint.remove_checkpoint(saved)
    assert list(saved.parent.iterdir()) == []
    with pytest.raises(CheckpointError, match="there is no checkpoint at"):
        load(saved, Model())


def test_a_removal_that_was_cut_short_is_finished_by_the_next_save(saved: Path) -> None:
    pid = os.fork()
    if pid == 0:
        points.on("remove_renamed", lambda: os.kill(os.getpid(), 9))
        checkpoint.remove_checkpoint(saved)
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 9
    assert [f.name for f in saved.parent.iterdir()] == ["a.removed"]
    save(saved.with_name("b"), Model())
    assert [f.name for f in saved.parent.iterdir()] == ["b"]


def test_what_a_replacement_left_is_removed_with_it_and_never_takes_its_place(saved: Path) -> None:
    leftover = commit.replaced(saved)
    shutil.copytree(saved, leftover)
    (leftover / "trainer.json").unlink()
    checkpoint.remove_checkpoint(saved)
    assert checkpoint.list_checkpoints(saved.parent) == []
    assert list(saved.parent.iterdir()) == []


def test_a_folder_that_is_being_deleted_is_no_checkpoint_at_any_moment(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commit, "_exchange", lambda a, b: False)
    whole: list[bool] = []
    delete = shutil.rmtree

    def watched(path: Path, *args: Any, **kwargs: Any) -> None:
        whole.append(commit.is_committed(path))
        delete(path, *args, **kwargs)

    monkeypatch.setattr(shutil, "rmtree", watched)
    save(saved, Model(4))
    checkpoint.remove_checkpoint(saved)
    assert whole == [False, False]


def test_what_a_killed_job_left_is_cleared_up_and_nothing_else(saved: Path) -> None:
    parent = saved.parent
    shutil.copytree(saved, parent / "b.tmp")
    shutil.copytree(saved, parent / "c.removed")
    (parent / "empty.tmp").mkdir()
    (parent / "mine.tmp").mkdir()
    (parent / "mine.tmp" / "notes.txt").write_text("precious")
    (parent / "file.tmp").write_text("precious")
    (parent / "link.tmp").symlink_to(saved)
    commit.clear_unfinished(parent)
    assert sorted(f.name for f in parent.iterdir()) == ["a", "file.tmp", "link.tmp", "mine.tmp"]
    checkpoint.verify_checkpoint(saved)


def test_an_interrupted_save_is_explained(tmp_path: Path) -> None:
    commit.temporary(tmp_path / "a").mkdir()
    with pytest.raises(CheckpointError, match="the save was interrupted"):
        load(tmp_path / "a", Model())


def test_unknown_state_dict_type(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="must be one of deduped, sharded, not 'full'"):
        save(tmp_path / "a", Model(), state_dict_type="full")


def test_progress_counts_bytes(tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    save(tmp_path / "a", Model(), progress=lambda *a: seen.append(a))
    load(tmp_path / "a", Model(2), progress=lambda *a: seen.append(a))
    checkpoint.verify_checkpoint(tmp_path / "a", progress=lambda *a: seen.append(a))
    stages = list(dict.fromkeys(stage for stage, _, _ in seen))
    assert stages == ["prepare", "write", "manifest", "commit", "read", "verify"]
    for stage in ("write", "verify", "read"):
        last = [(done, total) for s, done, total in seen if s == stage][-1]
        assert last[0] == last[1] > 0


def test_a_checkpoint_may_be_reached_by_a_link(saved: Path) -> None:
    link = saved.parent / "last"
    link.symlink_to(saved, target_is_directory=True)
    other = Model(2)
    load(link, other)
    assert same(other, Model(0))
    save(link, Model(3))
    load(saved, other)
    assert same(other, Model(0))
    checkpoint.remove_checkpoint(link)
    assert checkpoint.is_checkpoint(saved)


@dataclasses.dataclass
class Flat:
    """A hand-made optimizer piece."""

    param: Tensor
    start: int
    stop: int
    tensors: dict[str, Tensor]
    scalars: dict[str, float]


class HandMade:
    """An optimizer of one parameter whose state has the wrong length."""

    def __init__(self, param: nn.Parameter, length: int) -> None:
        self.param_groups = [{"params": [param]}]
        self.pieces = [Flat(param, 0, param.numel(), {"row": torch.zeros(length)}, {})]

    def export_state(self) -> list[Flat]:
        return self.pieces


def test_state_that_is_not_element_wise_is_refused(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    with pytest.raises(CheckpointError, match=r"'row' of weight has shape \(2,\)"):
        save(tmp_path / "a", model, [HandMade(model.weight, 2)])


def test_a_plain_optimizer_is_refused_with_the_remedy(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    with pytest.raises(CheckpointError, match="AdamW cannot be saved by itself"):
        save(tmp_path / "a", model, [torch.optim.AdamW(model.parameters())])


def test_a_replaced_checkpoint_that_cannot_be_deleted_is_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path / "a", Model(1))
    delete = shutil.rmtree

    def refuse(path: Path, *args: Any, **kwargs: Any) -> None:
        raise PermissionError(1, "Operation not permitted", str(path))

    points.on("parent_synced", lambda: monkeypatch.setattr(shutil, "rmtree", refuse))
    try:
        with pytest.warns(
            UserWarning, match=r"is saved, but the one that it replaced cannot be deleted from .*a\.tmp"
        ):
            save(tmp_path / "a", Model(2))
    finally:
        points.clear()
    monkeypatch.setattr(shutil, "rmtree", delete)
    restored = Model(3)
    load(tmp_path / "a", restored)
    assert same(restored, Model(2))
    save(tmp_path / "a", Model(4))
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def _drop_trainer(document: dict[str, Any]) -> None:
    del document["trainer"]


def _set_option(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(document: dict[str, Any]) -> None:
        document["optimizers"][0][0]["options"][key] = value

    return change


def _name_no_list(document: dict[str, Any]) -> None:
    document["optimizers"][0][0]["params"] = "embed.weight"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_drop_trainer, "does not hold the state of a trainer"),
        (_name_no_list, "does not hold the state of a trainer"),
        (_set_option("params", ["x"]), "does not hold the state of a trainer"),
        (_set_option("lr", "fast"), "lr='fast' in the checkpoint .*, and 0.1 now, of another type"),
        (_set_option("maximize", 3), "maximize=3 in the checkpoint"),
    ],
)
def test_trainer_state_of_another_structure_is_refused(
    tmp_path: Path, change: Callable[[dict[str, Any]], None], said: str
) -> None:
    model = Model()
    model.high, model.low = None, None
    optimizer = ParallelOptimizer(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), zero1=False)
    save(tmp_path / "a", model, [optimizer])
    document = json.loads((tmp_path / "a" / "trainer.json").read_text(encoding="utf-8"))
    change(document)
    mutations.replace_file(tmp_path / "a", "trainer.json", json.dumps(document).encode())
    before = [dict(group) for group in optimizer.param_groups]
    with pytest.raises(CheckpointError, match=said):
        checkpoint.load_optimizer_state(tmp_path / "a", [optimizer], dict(model.named_parameters()))
    assert [dict(group) for group in optimizer.param_groups] == before
    if "does not hold" in said:
        with pytest.raises(CheckpointError, match=said):
            checkpoint.read_trainer_state(tmp_path / "a")
