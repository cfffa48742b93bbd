"""Records per optimizer step, samples per rank, reductions, leftovers and disagreeing ranks."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import Callback
from torch.utils.data import DataLoader, DistributedSampler

from neuron_lightning import NeuronLightningDataModule, NeuronXLAStrategy, parallel_state
from neuron_lightning.errors import ConfigError, DataError, ParallelStateError
from neuron_lightning.testing import RankFailure
from tests.dist import strategy_cases as cases


def rank_records(kind, every, **options):
    logger = cases.Records()
    module = cases.new(kind)
    try:
        cases.fit(
            module, NeuronXLAStrategy(zero1=True), replicas=2, epochs=4, logger=logger, log_every_n_steps=every,
            micro_batches=4, **options,
        )  # fmt: skip
    finally:
        parallel_state.destroy_model_parallel()
    return logger.steps, [sorted(record) for _, record in logger.records]


@pytest.mark.parametrize(
    ("kind", "options"),
    [(cases.Mlp, {"accumulate_grad_batches": 2}), (cases.Mlp, {}), (cases.ManualMlp, {})],
)
def test_one_record_per_optimizer_step_at_global_step(pool2, kind, options):
    steps, _ = pool2.run(rank_records, kind, 1, **options)[0]
    count = 16 if kind is cases.Mlp and not options else 8
    assert steps == list(range(1, count + 1))


def test_log_every_n_steps_counts_optimizer_steps(pool2):
    steps, keys = pool2.run(rank_records, cases.ManualMlp, 3)[0]
    assert steps == [3, 6]
    assert keys[0] == ["epoch", "micro"]


def rank_ids(with_data_module):
    seed_everything(3, verbose=False)
    module = cases.new(cases.Mlp)
    strategy = NeuronXLAStrategy()
    trainer = Trainer(strategy=strategy, max_epochs=1, precision="64-true", logger=False, **cases.QUIET)
    try:
        if with_data_module:
            trainer.fit(module, datamodule=NeuronLightningDataModule(sharded_loader, None, 4, data_args=(7,)))
        else:
            trainer.fit(module, DataLoader(cases.dataset(), batch_size=4, shuffle=True))
        return module.seen
    finally:
        parallel_state.destroy_model_parallel()


def sharded_loader(data_dir, batch_size, dp_size, dp_rank, seed):
    """A loader whose sharding Lightning cannot see: by the data set."""
    assert (data_dir, seed) == (None, 7)
    mine = torch.utils.data.Subset(cases.dataset(), range(dp_rank, cases.SAMPLES, dp_size))
    return DataLoader(mine, batch_size=batch_size)


@pytest.mark.parametrize("with_data_module", [False, True])
def test_every_sample_is_seen_once_an_epoch(pool2, with_data_module):
    first, second = pool2.run(rank_ids, with_data_module)
    assert sorted(first + second) == list(range(cases.SAMPLES))
    assert len(first) == len(second)


def rank_reductions():
    strategy = NeuronXLAStrategy(tensor_parallel_size=2)
    module = cases.Mlp()
    found = {}

    class Ask(Callback):
        def on_train_start(self, trainer, pl_module):
            rank = dist.get_rank()
            one = lambda: torch.tensor(float(rank))
            found["mean over dp"] = strategy.reduce(one()).item()
            found["sum over the world"] = strategy.reduce(
                one(), group=dist.group.WORLD, reduce_op="sum"
            ).item()
            found["max"] = strategy.reduce(one(), group=dist.group.WORLD, reduce_op="max").item()
            found["integer mean"] = strategy.reduce(torch.tensor(rank), group=dist.group.WORLD).item()
            found["gathered"] = strategy.all_gather(one()).tolist()
            found["broadcast"] = strategy.broadcast({"rank": rank}, src=2)["rank"]
            found["all"] = strategy.reduce_boolean_decision(rank > 0)
            found["any"] = strategy.reduce_boolean_decision(rank > 0, all=False)
            found["sampler"] = strategy.distributed_sampler_kwargs
            found["place"] = (strategy.data_parallel_rank, strategy.tensor_parallel_rank)
            with pytest.raises(ConfigError, match="unknown reduce_op 'median'"):
                strategy.reduce(one(), reduce_op="median")

    try:
        cases.fit(module, strategy, epochs=1, replicas=2, callbacks=[Ask()])
    finally:
        parallel_state.destroy_model_parallel()
    return found


def test_reductions_use_the_right_group(pool4):
    for rank, found in enumerate(pool4.run(rank_reductions)):
        assert found["mean over dp"] == (rank % 2 + rank % 2 + 2) / 2
        assert found["sum over the world"] == 6
        assert found["max"] == 3
        assert found["integer mean"] == 1
        assert found["gathered"] == [0, 1, 2, 3]
        assert found["broadcast"] == 2
        assert (found["all"], found["any"]) == (False, True)
        assert found["sampler"] == {"num_replicas": 2, "rank": rank // 2}
        assert found["place"] == (rank // 2, rank % 2)


def rank_disagrees():
    zero1 = dist.get_rank() == 1
    try:
        with pytest.raises(ConfigError) as caught:
            cases.fit(cases.Mlp(), NeuronXLAStrategy(zero1=zero1), epochs=1, replicas=2)
    finally:
        parallel_state.destroy_model_parallel()
    return str(caught.value)


def test_ranks_that_disagree_on_the_configuration(pool2):
    for message in pool2.run(rank_disagrees):
        assert "optimizer_config.zero_one_enabled: False on rank(s) 0; True on rank(s) 1" in message


class Wide(cases.Mlp):
    """A model of another size on rank 1."""

    def __init__(self) -> None:
        super().__init__()
        self.up = torch.nn.Linear(8, 16 + 16 * dist.get_rank())
        self.down = torch.nn.Linear(16 + 16 * dist.get_rank(), 4)


def rank_other_model():
    try:
        with pytest.raises(ConfigError) as caught:
            cases.fit(Wide(), NeuronXLAStrategy(), epochs=1, replicas=2)
    finally:
        parallel_state.destroy_model_parallel()
    return str(caught.value)


def test_ranks_that_build_different_models(pool2):
    for message in pool2.run(rank_other_model):
        assert "ranks 0 and 1 differ" in message
        assert "up.weight" in message


def rank_several_runs():
    """fit, fit again, validate, then another layout: leftovers of one never disturb the next."""
    try:
        module = cases.new(cases.Mlp)
        trainer = cases.fit(module, NeuronXLAStrategy(zero1=True), epochs=1, replicas=2)
        loader = DataLoader(cases.dataset(), batch_size=4)
        trainer.fit_loop.max_epochs = 2
        trainer.fit(module, loader)
        validated = trainer.validate(module, loader, verbose=False)
        cases.fit(cases.new(cases.Mlp), NeuronXLAStrategy(tensor_parallel_size=2), epochs=1)
        return validated[0]["val_loss"], trainer.current_epoch
    finally:
        parallel_state.destroy_model_parallel()


def test_several_runs_in_one_process(pool2):
    (loss, epoch), (other, _) = pool2.run(rank_several_runs)
    assert epoch == 2
    assert loss == other > 0


def rank_two_strategies():
    class Second(Callback):
        def on_train_start(self, trainer, pl_module):
            with pytest.raises(ParallelStateError, match="another NeuronXLAStrategy is running"):
                cases.fit(cases.Mlp(), NeuronXLAStrategy(), epochs=1, replicas=2)

    try:
        return cases.fit(
            cases.Mlp(), NeuronXLAStrategy(), epochs=1, replicas=2, callbacks=[Second()]
        ).global_step
    finally:
        parallel_state.destroy_model_parallel()


def test_two_strategies_at_once(pool2):
    assert pool2.run(rank_two_strategies) == [2, 2]


def test_one_rank_sees_the_samples_in_the_order_of_lightnings_ddp(pool1):
    ours, theirs = pool1.run(rank_order)[0]
    assert ours == theirs
    assert sorted(ours) == list(range(cases.SAMPLES))
    assert ours != sorted(ours), "the training data is shuffled, although the loader does not ask for it"


def rank_order():
    seen = []
    for strategy in (NeuronXLAStrategy(), "ddp_find_unused_parameters_true"):
        module = cases.new(cases.Mlp)
        try:
            cases.fit(module, strategy, epochs=1, devices=1, num_nodes=1)
        finally:
            parallel_state.destroy_model_parallel()
        seen.append(module.seen)
    return seen


class Tokens(cases.Mlp):
    """Has a vocabulary."""

    vocab_size = 10

    def training_step(self, batch, batch_idx):
        return self.up.weight.sum() * 0


def rank_bad_token():
    sampler = DistributedSampler(TOKENS, shuffle=False)
    loader = DataLoader(TOKENS, batch_size=2, sampler=sampler)
    trainer = Trainer(strategy=NeuronXLAStrategy(), max_epochs=1, logger=False, **cases.QUIET)
    try:
        trainer.fit(Tokens(), loader)
    finally:
        parallel_state.destroy_model_parallel()


TOKENS = [{"input_ids": torch.tensor([1, 2, 3]), "labels": torch.tensor([-100, 2, 3])} for _ in range(8)]
TOKENS[3] = {"input_ids": torch.tensor([1, 2, 10]), "labels": torch.tensor([1, 2, 3])}


def test_a_token_outside_the_vocabulary(pool2):
    with pytest.raises(RankFailure) as caught:
        pool2.run(rank_bad_token)
    assert caught.value.first_rank == 1
    assert DataError.__name__ in caught.value.tracebacks[1]
    assert (
        "batch['input_ids'] of rank 1 holds the token id 10 at position (1, 2) (shape (2, 3)), but the model's "
        "vocabulary has 10 entries, 0 to 9" in caught.value.tracebacks[1]
    )
