"""What cannot be saved or loaded is the same error on all ranks, names file and remedy, and costs nothing saved before."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from neuron_lightning import checkpoint
from neuron_lightning.errors import CheckpointError
from neuron_lightning.testing import RankPool
from tests.dist import checkpoint_cases as cases
from tests.faults import reshard_ranks
from tests.faults.reshard_ranks import Layout

LAYOUT = Layout(2, 1, True, False)
NOBODY = 65534


def message_of(work: Callable[[], object]) -> str:
    """The error of ``work``."""
    try:
        work()
    except CheckpointError as error:
        return str(error)
    return "no error"


@contextmanager
def nobody(ranks: list[int]) -> Iterator[None]:
    """Some ranks do without the rights of root, to whom permissions mean nothing."""
    if dist.get_rank() in ranks:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


def rank_saves(path: str, powerless: list[int]) -> str:
    with reshard_ranks.laid_out(LAYOUT):
        model, optimizer = reshard_ranks.build("bf16", LAYOUT, seed=0)
        with nobody(powerless):
            return message_of(lambda: reshard_ranks.save(path, "deduped", model, optimizer))


def rank_loads(path: str, powerless: list[int]) -> list[str]:
    with reshard_ranks.laid_out(LAYOUT):
        model, optimizer = reshard_ranks.build("bf16", LAYOUT, seed=1)
        named = dict(model.named_parameters())
        with nobody(powerless):
            return [
                message_of(lambda: checkpoint.load_module_state(path, model.state_dict(), named)),
                message_of(lambda: checkpoint.load_optimizer_state(path, [optimizer], named)),
                message_of(lambda: checkpoint.verify_checkpoint(path)),
            ]


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="gives up root's rights on one rank")


@pytest.fixture
def saved(pool2: RankPool, tmp_path: Path) -> Path:
    for folder in (tmp_path, *tmp_path.parents):
        if folder.stat().st_uid == os.geteuid() and folder.parts[1:2] == ("tmp",) and len(folder.parts) > 2:
            folder.chmod(0o755)  # pytest's folders are closed to others
    path = tmp_path / "runs" / "step=3.ckpt"
    assert pool2.run(rank_saves, str(path), []) == ["no error"] * 2
    return path


@needs_root
@pytest.mark.parametrize("powerless", [[0], [1], [0, 1]])
def test_no_permission_to_read(pool2: RankPool, saved: Path, powerless: list[int]) -> None:
    for file in saved.iterdir():
        file.chmod(0o600)
    for messages in zip(*pool2.run(rank_loads, str(saved), powerless), strict=True):
        assert messages[0] == messages[1]
        assert "Permission denied" in messages[0]
        assert f"{saved}/" in messages[0]
        assert "give user 65534 the right" in messages[0]
    assert pool2.run(rank_loads, str(saved), []) == [["no error"] * 3] * 2


@needs_root
@pytest.mark.parametrize("powerless", [[0], [1], [0, 1]])
@pytest.mark.parametrize("name", ["step=3.ckpt", "step=6.ckpt"])
def test_no_permission_to_write(pool2: RankPool, saved: Path, powerless: list[int], name: str) -> None:
    messages = pool2.run(rank_saves, str(saved.with_name(name)), powerless)
    assert messages[0] == messages[1]
    assert "Permission denied" in messages[0]
    assert str(saved.with_name(name)) in messages[0]
    assert "give user 65534 the right" in messages[0]
    assert [path.name for path in saved.parent.iterdir()] == ["step=3.ckpt"]
    assert pool2.run(rank_loads, str(saved), []) == [["no error"] * 3] * 2


def rank_loads_into_another_model(path: str, kind: str) -> tuple[str, bool]:
    with reshard_ranks.laid_out(LAYOUT):
        model, _ = reshard_ranks.build(kind, LAYOUT, seed=1)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        message = message_of(
            lambda: checkpoint.load_module_state(path, model.state_dict(), dict(model.named_parameters()))
        )
        return message, all(torch.equal(before[name], t) for name, t in model.state_dict().items())


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (
            "tied32",
            "model.layers.0.self_attn.qkv_proj.weight_k is (8, 32) in the checkpoint and (4, 32) in the module",
        ),
        ("llama64", "missing in the checkpoint: model.layers.1.input_layernorm.weight"),
        ("plain64", "missing in the checkpoint: scale, shift, embed.weight"),
    ],
)
def test_a_checkpoint_of_another_model(pool2: RankPool, saved: Path, kind: str, said: str) -> None:
    (first, untouched), (second, also) = pool2.run(rank_loads_into_another_model, str(saved), kind)
    assert first == second
    assert said in first
    assert str(saved) in first
    assert "Load it into the model that wrote it" in first
    assert untouched
    assert also


def rank_loads_other_optimizers(path: str) -> list[str]:
    with reshard_ranks.laid_out(LAYOUT):
        model, optimizer = reshard_ranks.build("bf16", LAYOUT, seed=1)
        named = dict(model.named_parameters())
        other = cases.ParallelOptimizer(
            torch.optim.AdamW(model.parameters()), zero1=True, master_weights=True
        )
        return [
            message_of(lambda: checkpoint.load_optimizer_state(path, [optimizer, optimizer], named)),
            message_of(lambda: checkpoint.load_optimizer_state(path, [other], named)),
            message_of(
                lambda: checkpoint.load_optimizer_state(
                    path, [cases.make(True, torch.float32, 0, 0)[1]], named
                )
            ),
        ]


def test_a_checkpoint_of_other_optimizers(pool2: RankPool, saved: Path) -> None:
    first, second = pool2.run(rank_loads_other_optimizers, str(saved))
    assert first == second
    assert f"{saved} holds the state of 1 optimizer(s), but 2 are to be loaded" in first[0]
    assert f"has 1 parameter group(s), the checkpoint {saved} 2" in first[1]
    assert "register it in the module" in first[2]


def rank_saves_alone(path: str) -> str:
    """A parameter that one rank holds in another shape."""
    with reshard_ranks.laid_out(Layout(1, 2, False, False)):
        model = nn.Linear(3, 2 + dist.get_rank())
        return message_of(
            lambda: checkpoint.write_checkpoint(
                path,
                module_state=model.state_dict(),
                parameters=dict(model.named_parameters()),
                trainer_state={"global_step": 3},
            )
        )


def test_ranks_with_different_models_save_nothing(pool2: RankPool, saved: Path) -> None:
    first, second = pool2.run(rank_saves_alone, str(saved))
    assert first == second
    assert "all ranks must hold parts of the same global tensor" in first
    assert pool2.run(rank_loads, str(saved), []) == [["no error"] * 3] * 2
