"""NeuronLTModule's contract without processes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from neuron_lightning import NeuronLightningDataModule, NeuronLTModule, initialize_parallel_model
from neuron_lightning.errors import ConfigError, DataError
from neuron_lightning.lightning.module import loss_of
from neuron_lightning.lightning.strategy_data import check_token_ids, vocab_size_of


class Model(nn.Module):
    """Takes keywords, as Hugging Face models do."""

    def __init__(self, width=4):
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.scale = nn.Parameter(torch.ones(width, width))

    def forward(self, x, y=None):
        out = self.norm(self.linear(x)) * self.scale.diagonal()
        return {"loss": (out - y).square().mean(), "out": out} if y is not None else out


def module(**options):
    return NeuronLTModule({}, torch.optim.AdamW, model_fn=Model, opt_kwargs={"lr": 0.1}, **options)


def test_setup_builds_the_model_once():
    lt = module(model_kwargs={"width": 6})
    lt.setup("fit")
    model = lt.model
    lt.setup("validate")
    lt.configure_model()
    assert lt.model is model
    assert model.linear.weight.shape == (6, 6)
    assert model.module is model
    assert [name for name, _ in lt.named_parameters() if "module" in name] == []
    assert lt.averaged_loss.shape == (1,)
    assert lt.averaged_loss.dtype == torch.float64


def test_forward_reaches_the_model():
    lt = module()
    lt.setup()
    x = torch.ones(2, 4)
    assert torch.equal(lt(x), lt.model(x))
    assert lt({"x": x, "y": x})["loss"].shape == ()
    assert torch.equal(lt(x=x), lt.model(x))


def test_weight_decay_is_the_users():
    lt = module()
    lt.setup()
    assert [g["weight_decay"] for g in lt.get_param_groups_by_weight_decay()] == [0.01, 0.0]
    lt.opt_kwargs["weight_decay"] = 0.3
    decayed, exempt = lt.get_param_groups_by_weight_decay()
    assert (decayed["weight_decay"], exempt["weight_decay"]) == (0.3, 0.0)
    assert {p.dim() for p in decayed["params"]} == {2}
    assert len(exempt["params"]) == 3
    decayed, exempt = lt.get_param_groups_by_weight_decay(no_decay=["scale"])
    assert any(p is lt.model.scale for p in exempt["params"])


def test_configure_optimizers():
    lt = module(
        scheduler_cls=torch.optim.lr_scheduler.StepLR, scheduler_args=(3,), scheduler_kwargs={"gamma": 0.1}
    )
    lt.setup()
    (optimizer,), (scheduler,) = lt.configure_optimizers()
    assert scheduler["scheduler"].step_size == 3
    assert optimizer.grad_norm is None
    assert optimizer.param_groups[0]["lr"] == 0.1


@pytest.mark.parametrize("build", [lambda: None, lambda: "model", lambda: (nn.Linear(1, 1),)])
def test_model_fn_that_returns_no_module(build):
    with pytest.raises(ConfigError, match=r"model_fn must return a torch.nn.Module, but .*lambda.* returned"):
        initialize_parallel_model({}, build)


def test_meta_device_init_draws_on_the_device():
    config = {"model_init_config": {"meta_device_init": True}}
    torch.manual_seed(3)
    model = initialize_parallel_model(config, nn.Linear, False, 4, 4)
    assert model.weight.device.type == "cpu"
    assert model.weight.std() > 0


def test_values_that_cannot_work_together():
    with pytest.raises(ConfigError, match=r"Trainer\(accumulate_grad_batches=4\)"):
        module(manual_opt=False, grad_accum_steps=4)
    with pytest.raises(ConfigError, match="grad_accum_steps must be a positive integer, not 0"):
        module(grad_accum_steps=0)


def test_loss_of_what_models_return():
    one = torch.tensor(1.0)

    class Output:
        loss = one

    for outputs in (one, Output(), {"loss": one}, (one, "logits")):
        assert loss_of(outputs) is one
    for outputs in (torch.ones(3), {"logits": one}, None, ()):
        with pytest.raises(ConfigError, match="the model must return its loss"):
            loss_of(outputs)


def test_vocabulary_is_found_in_the_model():
    assert vocab_size_of(Model()) is None
    lt = module()
    lt.setup()
    lt.model.config = type("Config", (), {"vocab_size": 7})()
    assert vocab_size_of(lt) == 7


@pytest.mark.parametrize(
    ("batch", "named"),
    [
        (
            {"input_ids": torch.tensor([[0, 9], [10, 1]])},
            r"batch\['input_ids'\].* id 10 at position \(1, 0\)",
        ),
        ({"labels": torch.tensor([[-100, -1]])}, r"batch\['labels'\].* id -1 at position \(0, 1\)"),
        ({"input_ids": torch.tensor([-100])}, r"id -100"),
    ],
)
def test_token_ids_outside_the_vocabulary(batch, named):
    with pytest.raises(DataError, match=named):
        check_token_ids(batch, 10)


def test_token_ids_inside_the_vocabulary():
    check_token_ids({"input_ids": torch.tensor([[0, 9]]), "labels": torch.tensor([[-100, 9]])}, 10)
    check_token_ids({"input_ids": torch.empty(0, dtype=torch.long), "x": torch.ones(3) * 99}, 10)
    check_token_ids([torch.tensor([99])], 10)


def test_data_module_hands_its_arguments_through():
    seen = []

    def loader(*args, **kwargs):
        seen.append((args, kwargs))
        return [1, 2]

    dm = NeuronLightningDataModule(loader, "folder", 8, data_args=(3, "x"), data_kwargs={"k": 1})
    assert dm.train_dataloader() == [1, 2]
    assert seen == [(("folder", 8, 1, 0, 3, "x"), {"k": 1})]
    assert dm.val_dataloader() == []


def test_data_module_mistakes():
    with pytest.raises(ConfigError, match="data_args must be a tuple"):
        NeuronLightningDataModule(lambda: None, "f", 1, data_args="seed")
    with pytest.raises(ConfigError, match="must be callable"):
        NeuronLightningDataModule(None, "f", 1)
    with pytest.raises(DataError, match="must return a data loader, not NoneType"):
        NeuronLightningDataModule(lambda *a: None, "f", 1).train_dataloader()
