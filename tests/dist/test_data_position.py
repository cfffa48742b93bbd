"""Mid-epoch resumes read exactly the samples that are left, whatever the loader is."""

from __future__ import annotations

import multiprocessing
import random
from collections.abc import Sequence

import pytest
import torch
from lightning.pytorch import Trainer
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, Sampler

from neuron_lightning import NeuronModelCheckpoint, NeuronXLAStrategy, parallel_state
from neuron_lightning.data.sampler import PositionalSampler
from neuron_lightning.errors import DataError
from neuron_lightning.parallel import mesh
from tests.dist import strategy_cases as cases
from tests.dist.test_strategy_resume import Noisy

STEPS = 13  # of 8 batches an epoch


class Shuffled(Sampler):
    """A user's sampler that draws from Python's generator."""

    def __init__(self, size):
        self.size = size

    def __len__(self):
        return self.size

    def __iter__(self):
        order = list(range(self.size))
        random.shuffle(order)
        return iter(order)


class Stream(IterableDataset):
    """Endless unless told its length by nobody; no state."""

    def __iter__(self):
        yield from cases.dataset(torch.float32)


class Rows(Sequence):
    """A loader that is a plain sequence of batches."""

    def __len__(self):
        return 8

    def __getitem__(self, index):
        return [t[4 * index : 4 * index + 4] for t in cases.dataset(torch.float32).tensors]


class StatefulStream:
    """torchdata's protocol, without a length, and a position that runs ahead of what is trained on."""

    def __init__(self, rank):
        self.rank, self.position = rank, 0

    def __iter__(self):
        rows = cases.dataset(torch.float32)
        while self.position < 32:
            start, self.position = self.position, self.position + 4
            ids = torch.arange(start + 2 * self.rank, start + 2 * self.rank + 2)
            yield [t[ids] for t in rows.tensors]
        self.position = 0

    def state_dict(self):
        return {"position": self.position, "rank": self.rank}

    def load_state_dict(self, state):
        assert state["rank"] == self.rank  # each replica gets its own
        self.position = state["position"]


def loader_of(kind, workers=0):
    data = cases.dataset(torch.float32)
    layout = mesh.current()
    dp, rank = layout.sizes["dp"], layout.coordinates["dp"]
    options = {"num_workers": workers, "persistent_workers": workers > 0}
    if kind == "random":
        return DataLoader(data, batch_size=4, shuffle=True, **options)
    if kind == "own generator":
        generator = torch.Generator().manual_seed(3)
        return DataLoader(data, batch_size=4, sampler=RandomSampler(data, generator=generator), **options)
    if kind == "batches":
        return DataLoader(data, batch_sampler=BatchSampler(Shuffled(32), 4, drop_last=False), **options)
    if kind == "positional":
        sampler = PositionalSampler(data, num_replicas=dp, rank=rank, seed=3, group_size=4)
        return DataLoader(data, batch_size=4 // dp, sampler=sampler, drop_last=True, **options)
    if kind == "sequence":
        return Rows()
    if kind == "stateful":
        return StatefulStream(rank)
    return DataLoader(Stream(), batch_size=4, **options)


class Reads(Noisy):
    """Makes its loader when the layout is known."""

    kind, workers = "random", 0

    def train_dataloader(self):
        return loader_of(self.kind, self.workers)


def allow_workers():
    """Ranks of a pool are daemons, which may have no children of their own."""
    multiprocessing.process.current_process()._config["daemon"] = False


def fit(folder, kind, workers, ckpt_path=None, steps=STEPS, override=(), tp=1, **options):
    module = cases.new(Reads)
    module.kind, module.workers = kind, workers
    trainer = Trainer(
        strategy=NeuronXLAStrategy(tensor_parallel_size=tp, resume_override=override), precision="32-true",
        callbacks=[NeuronModelCheckpoint(folder, every_n_train_steps=1, save_top_k=-1, filename="{step}")],
        **{**cases.QUIET, "enable_checkpointing": True, "logger": False, "max_steps": steps, "max_epochs": -1,
           "use_distributed_sampler": False, **options},
    )  # fmt: skip
    trainer.fit(module, ckpt_path=ckpt_path)
    return module


def rank_resumes(folder, kind, workers, tp):
    allow_workers()
    try:
        whole = fit(f"{folder}/whole", kind, workers, tp=tp)
        for step in (3, 8, 11):
            again = fit(
                f"{folder}/{step}", kind, workers, ckpt_path=f"{folder}/whole/step={step}.ckpt", tp=tp
            )
            assert again.seen == whole.seen[len(whole.seen) - len(again.seen) :], step
            assert len(again.seen) == len(whole.seen) * (STEPS - step) // STEPS
            for name, value in cases.trained(whole).items():
                assert torch.equal(cases.trained(again)[name], value), (step, name)
        return len(set(whole.seen[: len(whole.seen) * 8 // STEPS]))
    finally:
        parallel_state.destroy_model_parallel()


@pytest.mark.parametrize(
    ("kind", "workers"),
    [("random", 0), ("random", 2), ("own generator", 0), ("batches", 0), ("batches", 1), ("sequence", 0)],
)
def test_one_process(pool1, tmp_path, kind, workers):
    assert pool1.run(rank_resumes, str(tmp_path), kind, workers, 1) == [32]  # every id once an epoch


@pytest.mark.parametrize(
    ("kind", "workers", "tp"),
    [("positional", 0, 1), ("positional", 2, 1), ("stateful", 0, 1), ("random", 0, 2), ("batches", 1, 2)],
)
def test_two_ranks(pool2, tmp_path, kind, workers, tp):
    ids = pool2.run(rank_resumes, str(tmp_path), kind, workers, tp)
    assert ids == [32 // (2 // tp)] * 2


def rank_streams(folder):
    try:
        fit(folder, "iterable", 0, steps=3)
        with pytest.raises(DataError) as caught:
            fit(folder, "iterable", 0, ckpt_path=f"{folder}/step=3.ckpt", steps=5)
        allowed = fit(
            f"{folder}/o", "iterable", 0, ckpt_path=f"{folder}/step=3.ckpt", steps=5, override=["data"]
        )
        return str(caught.value), allowed.seen
    finally:
        parallel_state.destroy_model_parallel()


def test_an_iterable_without_state_is_an_error_in_the_middle_of_an_epoch(pool2, tmp_path):
    for message, seen in pool2.run(rank_streams, str(tmp_path)):
        assert "after 3 batch(es) of the epoch, but Stream cannot be continued there" in message
        assert "StatefulDataLoader" in message
        assert seen == list(range(8))  # it starts over where that was asked for


def rank_changes_layout(folder, accumulate):
    """Data-parallel 2 without accumulation, then one replica (tensor-parallel 2) with it, and back."""
    try:
        whole = fit(f"{folder}/whole", "positional", 0)
        again = fit(
            f"{folder}/again",
            "small",
            0,
            ckpt_path=f"{folder}/whole/step=3.ckpt",
            tp=2,
            accumulate_grad_batches=2,
        )
        return whole.seen, again.seen
    finally:
        parallel_state.destroy_model_parallel()


original = loader_of


def small_or(kind, workers=0):
    """Batches of two on one replica: the global batch of four is reached by accumulation."""
    if kind != "small":
        return original(kind, workers)
    data = cases.dataset(torch.float32)
    sampler = PositionalSampler(data, num_replicas=1, rank=0, seed=3, group_size=4)
    return DataLoader(data, batch_size=2, sampler=sampler, drop_last=True)


loader_of = small_or


def test_a_changed_layout_goes_on_with_the_next_sample(pool2, tmp_path):
    (first, again), (second, other) = pool2.run(rank_changes_layout, str(tmp_path), 2)
    together = [i for a, b in zip(first[::1], second[::1], strict=True) for i in (a, b)]
    assert again == other
    assert again == together[3 * 4 :]
