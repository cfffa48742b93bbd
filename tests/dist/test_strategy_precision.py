"""The six precisions under the strategy, the loss scaler on shards, and gradients that no rank holds."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader

from neuron_lightning import NeuronXLAPrecisionPlugin, NeuronXLAStrategy, parallel_state
from neuron_lightning.backends.native import NativeBackend
from neuron_lightning.errors import ConfigError
from tests.dist import strategy_cases as cases


class Typed(cases.Mlp):
    """Notes what it computes in."""

    def training_step(self, batch, batch_idx):
        batch = [
            b.float() if b.dtype == torch.float64 and self.up.weight.dtype != b.dtype else b for b in batch
        ]
        self.hidden = self.up(batch[0].to(self.up.weight.dtype)).dtype
        batch[0], batch[1] = (b.to(self.up.weight.dtype) for b in batch[:2])
        return super().training_step(batch, batch_idx)


def rank_precision(name, zero1):
    module = cases.new(Typed)
    before = cases.trained(module)
    try:
        plugin = NeuronXLAPrecisionPlugin(precision=name)
        trainer = cases.fit(
            module, NeuronXLAStrategy(zero1=zero1), replicas=2, precision=None, plugins=[plugin], epochs=5
        )
        moved = cases.trained(module)["up.weight"].float() - before["up.weight"]
        states = trainer.optimizers[0].export_state()
        kinds = {t.dtype for s in states for t in s.tensors.values()}
        masters = any("master" in s.tensors for s in states)
        return module.up.weight.dtype, module.hidden, bool(moved.abs().sum() > 0), kinds, masters
    finally:
        parallel_state.destroy_model_parallel()


F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64


@pytest.mark.parametrize(
    ("name", "weights", "computes", "state", "masters"),
    [
        ("32-true", F32, F32, F32, False),
        ("bf16-mixed", F32, BF16, F32, False),
        ("bf16-true", BF16, BF16, F32, True),
        ("16-mixed", F32, F16, F32, False),
        ("16-true", F16, F16, F32, True),
        ("64-true", F64, F64, F64, False),
    ],
)
def test_precision(pool2, name, weights, computes, state, masters):
    for got in pool2.run(rank_precision, name, True):
        assert got == (weights, computes, True, {state}, masters)


def test_half_weights_without_zero1_have_no_master(pool2):
    assert pool2.run(rank_precision, "bf16-true", False)[0][4] is False


class Overflow(cases.Mlp):
    """Infinite gradients on rank 1, in the second batch."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        bad = self.trainer.global_rank == 1 and self.trainer.current_epoch == 1
        return loss * float("inf") if bad else loss


def rank_overflow():
    module = cases.new(Overflow)
    plugin = NeuronXLAPrecisionPlugin(
        precision="16-mixed", scaler=torch.amp.GradScaler("cpu", init_scale=64.0)
    )
    weights = []

    class Watch(cases.Records):
        def log_metrics(self, metrics, step=None):
            weights.append(module.up.weight.detach().clone())

    try:
        cases.fit(
            module.double(), NeuronXLAStrategy(zero1=True), replicas=2, precision=None, plugins=[plugin], epochs=3,
            micro_batches=1, logger=Watch(), log_every_n_steps=1,
        )  # fmt: skip
        state = plugin.state_dict()
        other = NeuronXLAPrecisionPlugin(precision="16-mixed")
        other.load_state_dict(state)
        assert other.state_dict() == state
        return weights, state["scale"]
    finally:
        parallel_state.destroy_model_parallel()


def test_ranks_skip_the_same_overflowing_step(pool2):
    first, second = pool2.run(rank_overflow)
    for weights, scale in (first, second):
        assert scale == 32.0
        assert torch.equal(weights[0], weights[1])
        assert not torch.equal(weights[1], weights[2])
    assert all(torch.equal(a, b) for a, b in zip(first[0], second[0], strict=True))


def rank_scaler_resume(path):
    def train(epochs, resume=None):
        plugin = NeuronXLAPrecisionPlugin(
            precision="16-mixed", scaler=torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=2)
        )
        module = cases.new(Overflow).double()
        trainer = Trainer(
            strategy=NeuronXLAStrategy(zero1=True),
            plugins=[plugin],
            max_epochs=epochs,
            **{**cases.QUIET, "logger": False},
        )
        try:
            trainer.fit(module, DataLoader(cases.dataset(), batch_size=cases.SAMPLES // 2), ckpt_path=resume)
            if resume is None and epochs == 3:
                trainer.save_checkpoint(path)
            return cases.trained(module), plugin.state_dict()
        finally:
            parallel_state.destroy_model_parallel()

    _, early = train(3)
    return early, train(6), train(6, path)


def test_the_scaler_goes_on_where_it_was(pool2, tmp_path):
    for early, (weights, scaler), (resumed_weights, resumed) in pool2.run(rank_scaler_resume, tmp_path / "a"):
        assert early["scale"] == 32.0, "the second of three steps has overflowed"
        assert scaler["scale"] != early["scale"]
        assert resumed == scaler
        assert all(torch.equal(resumed_weights[name], tensor) for name, tensor in weights.items())


class Bare(cases.ManualMlp):
    """Calls backward itself, on inputs that fit its weights."""

    def training_step(self, batch, batch_idx):
        batch[0], batch[1] = batch[0].float(), batch[1].float()
        return super().training_step(batch, batch_idx)


class ReadsGradients(cases.Mlp):
    """Clips by reading p.grad."""

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
        torch.nn.utils.clip_grad_norm_(self.parameters(), 1.0)


class ClipsOurWay(cases.Mlp):
    """Clips through Lightning."""

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
        self.clip_gradients(optimizer, gradient_clip_val=0.3, gradient_clip_algorithm="norm")


def rank_error(kind, precision):
    try:
        with pytest.raises(ConfigError) as caught:
            cases.fit(
                cases.new(kind), NeuronXLAStrategy(zero1=True), replicas=2, precision=None, epochs=1,
                plugins=[NeuronXLAPrecisionPlugin(precision=precision)],
            )  # fmt: skip
    finally:
        parallel_state.destroy_model_parallel()
    return str(caught.value)


def test_unscaled_backward_under_a_scaler(pool2):
    assert (
        "call self.manual_backward(loss) instead of loss.backward()"
        in pool2.run(rank_error, Bare, "16-mixed")[0]
    )


def test_bare_backward_is_right_in_other_precisions(pool2):
    for name in ("32-true", "bf16-mixed"):
        assert len(pool2.run(rank_trains, Bare, name)) == 2


def rank_trains(kind, precision):
    try:
        plugin = NeuronXLAPrecisionPlugin(precision=precision)
        strategy = NeuronXLAStrategy(zero1=True)
        return cases.fit(
            cases.new(kind), strategy, replicas=2, precision=None, epochs=2, plugins=[plugin]
        ).global_step  # fmt: skip
    finally:
        parallel_state.destroy_model_parallel()


def test_clipping_that_reads_gradients_nobody_holds(pool2):
    assert "configure_gradient_clipping reads p.grad" in pool2.run(rank_error, ReadsGradients, "64-true")[0]


def test_clipping_in_the_users_hook_through_lightning(pool2):
    expected = cases.reference(ClipsOurWay, micro_batches=1)
    for got in pool2.run(cases.rank_fit, ClipsOurWay, {"zero1": True}, micro_batches=1):
        assert cases.worst(got, expected) <= 1e-10


def test_what_neuron_devices_cannot_compute():
    neuron = NativeBackend("neuron")
    with pytest.raises(ConfigError, match="'64-true' needs 64-bit arithmetic, which neuron devices lack"):
        NeuronXLAPrecisionPlugin(precision="64-true").check(neuron)
    for name in ("16-mixed", "16-true"):
        with pytest.raises(ConfigError, match=f"{name}.*refused on neuron"):
            NeuronXLAPrecisionPlugin(precision=name).check(neuron)
    NeuronXLAPrecisionPlugin(precision="bf16-true").check(neuron)
