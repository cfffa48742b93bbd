"""Checkpoints in an object store without renames: always one that loads, whatever fails and whenever."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
import torch
from fsspec.implementations.memory import MemoryFile, MemoryFileSystem

from neuron_lightning import checkpoint
from neuron_lightning.checkpoint import AsyncSaver, points
from neuron_lightning.errors import CheckpointError
from tests.unit.test_checkpoint_folder import Model, same, trained

URL = "store://bucket/run/a"


class Store(MemoryFileSystem):
    """An object store: objects appear when their writing ends, nothing can be renamed; and it can fail."""

    protocol = "store"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    calls_left: int | None = None
    calls = 0

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(path.removeprefix("store://"))

    @classmethod
    def spend(cls) -> None:
        cls.calls += 1
        if cls.calls_left is not None:
            if cls.calls_left <= 0:
                raise LookupError("503 slow down")
            cls.calls_left -= 1

    def mv(self, *_: Any, **__: Any) -> None:
        raise NotImplementedError("objects have no rename")

    rename = move = mv

    def _open(self, path: str, mode: str = "rb", **kwargs: Any) -> Any:
        self.spend()
        if mode != "wb":
            return super()._open(path, mode, **kwargs)
        return Upload(self, path)

    def pipe_file(self, path: str, value: bytes, **kwargs: Any) -> None:
        self.spend()
        path = self._strip_protocol(path)
        self.store[path] = MemoryFile(self, path, value)

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **kwargs: Any) -> bytes:
        self.spend()
        return super().cat_file(path, start, end, **kwargs)

    def rm_file(self, path: str) -> None:
        self.spend()
        super().rm_file(path)

    def rm(self, path: Any, recursive: bool = False, maxdepth: int | None = None) -> None:
        for one in [path] if isinstance(path, str) else path:
            self.rm_file(self._strip_protocol(one))


class Upload(io.BytesIO):
    """Becomes an object when it is closed, unless it is discarded."""

    def __init__(self, fs: Store, path: str) -> None:
        super().__init__()
        self.fs, self.path = fs, path

    def close(self) -> None:
        value = b"" if self.closed else self.getvalue()
        closed, _ = self.closed, super().close()
        if not closed:
            self.fs.pipe_file(self.path, value)

    def discard(self) -> None:
        super().close()


@pytest.fixture(autouse=True)
def store() -> Iterator[type[Store]]:
    fsspec.register_implementation("store", Store, clobber=True)
    Store.store.clear()
    Store.pseudo_dirs[:] = [""]
    Store.calls_left, Store.calls = None, 0
    yield Store
    points.clear()


def save(url: str, model: torch.nn.Module, **kwargs: Any) -> None:
    kwargs.setdefault("trainer_state", {"global_step": 3, "epoch": 1, "score": torch.tensor(0.5)})
    checkpoint.write_checkpoint(
        url, module_state=model.state_dict(), parameters=dict(model.named_parameters()), **kwargs
    )


def load(url: str, model: torch.nn.Module) -> None:
    checkpoint.load_module_state(url, model.state_dict(), dict(model.named_parameters()))


def names() -> list[str]:
    return sorted(path.removeprefix("/bucket/run/a/") for path in Store.store)


def test_round_trip(store: type[Store]) -> None:
    model, optimizer = trained(0, lambda p: torch.optim.AdamW(p, lr=0.1), 2)
    save(URL, model, optimizers=[optimizer], rank_state={"n": 7, "t": torch.ones(2)})
    fresh, resumed = trained(1, lambda p: torch.optim.AdamW(p, lr=0.1), 0)
    load(URL, fresh)
    checkpoint.load_optimizer_state(URL, [resumed], dict(fresh.named_parameters()))
    assert same(model, fresh)
    for got, want in zip(resumed.export_state(), optimizer.export_state(), strict=True):
        assert all(torch.equal(got.tensors[k], want.tensors[k]) for k in want.tensors)
    assert checkpoint.read_trainer_state(URL)["score"] == 0.5
    assert checkpoint.read_rank_state(URL, 0)["n"] == 7
    assert checkpoint.read_rank_state(URL, 1) is None
    assert torch.equal(checkpoint.read_full_state(URL)["0.weight"], model[0].weight)
    checkpoint.verify_checkpoint(URL)


def test_listing_and_removal() -> None:
    for step in (20, 3):
        save(f"store://bucket/run/step={step}", Model(), trainer_state={"global_step": step})
    fsspec.filesystem("store").pipe_file("/bucket/run/step=9/attempt-0123456789abcdef.trainer.json", b"{}")
    infos = checkpoint.list_checkpoints("store://bucket/run/")
    assert [(i.step, i.path) for i in infos] == [
        (3, "store://bucket/run/step=3"),
        (20, "store://bucket/run/step=20"),
    ]
    assert checkpoint.list_checkpoints("store://bucket/nothing") == []
    for info in infos:
        checkpoint.remove_checkpoint(info.path)
        assert not checkpoint.is_checkpoint(info.path)
    checkpoint.remove_checkpoint("store://bucket/run/step=20")
    assert checkpoint.list_checkpoints("store://bucket/run") == []


def test_every_file_of_an_attempt_carries_its_id_and_the_old_ones_go() -> None:
    save(URL, Model(0))
    before = names()
    save(URL, Model(1))
    after = names()
    assert set(before) & set(after) == {"manifest.json"}
    assert len(after) == len(before) == 4
    other = Model(2)
    load(URL, other)
    assert same(other, Model(1))


def test_whatever_call_fails_there_is_always_one_that_loads(store: type[Store]) -> None:
    save(URL, Model(0))
    store.calls = 0
    save(URL, Model(0))
    total = store.calls
    assert total > 10
    outcomes = set()
    for survived in range(total):
        store.store.clear()
        save(URL, Model(0))
        store.calls_left = survived
        try:
            save(URL, Model(4))
            expected = 4
        except CheckpointError as error:
            assert "503 slow down" in str(error)  # noqa: PT017 - the call may also succeed
            expected = 0
        store.calls_left = None
        other = Model(9)
        load(URL, other)
        assert same(other, Model(expected))
        outcomes.add(expected)
        save(URL, Model(5))
        assert len(names()) == 4
    assert outcomes == {0, 4}


class Killed(BaseException):
    """The process is gone: nothing after it runs."""


@pytest.mark.parametrize(
    "point", ["prepared", "share_opened", "share_written", "before_rename", "after_rename"]
)
def test_what_a_crash_leaves_is_ignored_and_goes_with_the_next_save(point: str) -> None:
    def die() -> None:
        raise Killed

    save(URL, Model(0))
    points.on(point, die)
    with contextlib.suppress(Killed):
        save(URL, Model(4))
    points.clear()
    assert (len(names()) > 4) == point.endswith("_rename")
    checkpoint.verify_checkpoint(URL)
    other = Model(9)
    load(URL, other)
    assert same(other, Model(4 if point == "after_rename" else 0))
    save(URL, Model(5))
    assert len(names()) == 4
    load(URL, other)
    assert same(other, Model(5))


def test_damage_names_the_object(store: type[Store]) -> None:
    save(URL, Model(0))
    for name in names():
        path = f"/bucket/run/a/{name}"
        raw = store.store[path].getvalue()
        damaged = bytearray(raw)
        damaged[len(raw) // 2] ^= 1
        fsspec.filesystem("store").pipe_file(path, bytes(damaged))
        with pytest.raises(CheckpointError, match=name):
            checkpoint.verify_checkpoint(URL)
        fsspec.filesystem("store").pipe_file(path, raw[:-1])
        with pytest.raises(CheckpointError, match=name):
            checkpoint.verify_checkpoint(URL)
        fsspec.filesystem("store").rm_file(path)
        with pytest.raises(CheckpointError, match=name):
            checkpoint.verify_checkpoint(URL)
        fsspec.filesystem("store").pipe_file(path, raw)
    fsspec.filesystem("store").pipe_file("/bucket/run/a/other", b"x")
    with pytest.raises(CheckpointError, match="'other', which its manifest does not list"):
        checkpoint.verify_checkpoint(URL)


def test_what_is_no_checkpoint_is_left_alone() -> None:
    fsspec.filesystem("store").pipe_file("/bucket/run/a/notes.txt", b"precious")
    with pytest.raises(CheckpointError, match=r"notes\.txt.*left as it is"):
        save(URL, Model())
    with pytest.raises(CheckpointError, match=r"notes\.txt.*left as it is"):
        checkpoint.remove_checkpoint(URL)
    with pytest.raises(CheckpointError, match="there is no checkpoint at"):
        load(URL, Model())
    assert names() == ["notes.txt"]


def test_unknown_schemes_are_explained() -> None:
    with pytest.raises(CheckpointError, match="nosuch://x/y cannot be used: Protocol not known"):
        save("nosuch://x/y", Model())


def test_a_file_url_is_the_path(tmp_path: Path) -> None:
    save(f"file://{tmp_path}/a", Model(1))
    assert sorted(f.name for f in tmp_path.iterdir()) == ["a"]
    assert (tmp_path / "a" / "trainer.json").is_file()
    other = Model(2)
    load(f"local://{tmp_path}/a", other)
    assert same(other, Model(1))
    assert [i.path for i in checkpoint.list_checkpoints(f"file://{tmp_path}")] == [str(tmp_path / "a")]


def test_memory_urls_and_the_asynchronous_saver() -> None:
    url = "memory://runs/a"
    model = Model(1)
    with AsyncSaver() as saver:
        saver.save(
            url, module_state=model.state_dict(), parameters=dict(model.named_parameters()), trainer_state={}
        )
        saver.wait()
    other = Model(2)
    load(url, other)
    assert same(other, Model(1))
    checkpoint.remove_checkpoint(url)
    assert not checkpoint.is_checkpoint(url)
