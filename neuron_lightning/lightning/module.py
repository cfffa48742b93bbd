"""``NeuronLTModule``: a LightningModule that builds its model and optimizer from classes and arguments, as NxD's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.optim import Optimizer

from neuron_lightning.backends import get_backend
from neuron_lightning.config import NeuronConfig
from neuron_lightning.errors import ConfigError
from neuron_lightning.lightning.load import load_from_checkpoint
from neuron_lightning.lightning.model import initialize_parallel_model
from neuron_lightning.optim import get_param_groups_by_weight_decay, initialize_parallel_optimizer
from neuron_lightning.optim.groups import NO_DECAY
from neuron_lightning.parallel import mesh

_DEFAULT_WEIGHT_DECAY = 0.01


class NeuronLTModule(LightningModule):
    """A model, its optimizer and its scheduler, trained by micro-batches that accumulate.

    Every method may be overridden; the guide's ``training_step``, ``configure_optimizers`` and
    ``on_train_batch_end`` run as written.

    Args:
        nxd_config: what :func:`~neuron_lightning.neuronx_distributed_config` returns, or a dict with its keys.
        opt_cls: optimizer class.
        scheduler_cls: called as ``scheduler_cls(optimizer, *scheduler_args, **scheduler_kwargs)``, or None.
        model_args: positional arguments of ``model_fn``.
        model_kwargs: keyword arguments of ``model_fn``.
        opt_args: positional arguments of ``opt_cls`` after the parameters.
        opt_kwargs: keyword arguments of ``opt_cls``; ``weight_decay`` goes to the groups that decay.
        scheduler_args: see ``scheduler_cls``.
        scheduler_kwargs: see ``scheduler_cls``.
        model_fn: builds the model; None if a subclass sets ``self.model`` itself.
        grad_accum_steps: micro-batches per optimizer step, with manual optimization. With automatic
            optimization ``Trainer(accumulate_grad_batches=…)`` says it.
        train_batch_size: samples per micro-batch and replica; kept for scripts that read it.
        logging_interval: optimizer steps between logged values, on top of ``Trainer(log_every_n_steps=…)``.
        log_rank0: kept for scripts that read it; loggers decide which rank writes.
        manual_opt: manual optimization as in the guide; False: Lightning's automatic optimization.
        no_decay: parameters whose name contains one of these get no weight decay, nor do one-dimensional ones.

    Attributes:
        model: the model, once ``setup`` has run.
        loss: loss of the last optimizer step, averaged over its micro-batches and data-parallel ranks; a
            (1,) device tensor.
        lr: learning rate of that step.
        global_norm: its gradient norm before clipping; a 0-d device tensor.
        averaged_loss: (1,) device tensor that sums the micro-batches' losses; float64 where the device has it.
        should_print: whether the last batch ended in an optimizer step.
        print_pp_rank: pipeline stage whose loss is logged.

    Raises:
        ConfigError: values that cannot work together.
    """

    def __init__(
        self,
        nxd_config: Mapping[str, Any] | None = None,
        opt_cls: type[Optimizer] = torch.optim.AdamW,
        scheduler_cls: Callable[..., Any] | None = None,
        model_args: Sequence[Any] = (),
        model_kwargs: Mapping[str, Any] | None = None,
        opt_args: Sequence[Any] = (),
        opt_kwargs: Mapping[str, Any] | None = None,
        scheduler_args: Sequence[Any] = (),
        scheduler_kwargs: Mapping[str, Any] | None = None,
        model_fn: Callable[..., nn.Module] | None = None,
        grad_accum_steps: int = 1,
        train_batch_size: int = 16,
        logging_interval: int = 1,
        log_rank0: bool = False,
        manual_opt: bool = True,
        no_decay: Sequence[str] = NO_DECAY,
    ) -> None:
        super().__init__()
        _check_positive("grad_accum_steps", grad_accum_steps)
        _check_positive("logging_interval", logging_interval)
        if not manual_opt and grad_accum_steps != 1:
            raise ConfigError(
                f"grad_accum_steps={grad_accum_steps} is for manual optimization, but manual_opt is False; "
                f"pass Trainer(accumulate_grad_batches={grad_accum_steps}) and leave grad_accum_steps at 1."
            )
        self.nxd_config = NeuronConfig.from_any(nxd_config)
        self.model_fn, self.model_args, self.model_kwargs = model_fn, model_args, dict(model_kwargs or {})
        self.opt_cls, self.opt_args, self.opt_kwargs = opt_cls, opt_args, dict(opt_kwargs or {})
        self.scheduler_cls, self.scheduler_args = scheduler_cls, scheduler_args
        self.scheduler_kwargs = dict(scheduler_kwargs or {})
        self.grad_accum_steps = grad_accum_steps
        self.train_batch_size = train_batch_size
        self.logging_interval = logging_interval
        self.log_rank0 = log_rank0
        self.no_decay = tuple(no_decay)
        self.automatic_optimization = not manual_opt
        self.model: Any = None
        self.loss: Tensor | None = None
        self.lr: float | None = None
        self.global_norm: Tensor | None = None
        self.averaged_loss: Any = None
        self.should_print = False
        self.print_pp_rank = 0
        self._step_before = 0
        self._closed_step = -1
        self._logged_step = -1

    @classmethod
    def load_from_checkpoint(
        cls,
        checkpoint_path: Any,
        map_location: Any = None,
        hparams_file: Any = None,
        strict: bool | None = None,
        weights_only: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """The module that a checkpoint describes, with its weights, built for the current mesh. All ranks together.

        Args:
            checkpoint_path: a folder of ours, or a Lightning ``.ckpt`` file.
            map_location: a device to move the module to afterwards.
            hparams_file: not used: hyper-parameters are in the checkpoint. Give others in ``kwargs``.
            strict: whether a missing or unexpected name is an error; None: True.
            weights_only: accepted; nothing that runs code is ever read here.
            **kwargs: arguments of the class, ahead of the saved ones; classes and functions must be given here.

        Raises:
            CheckpointError: as :func:`neuron_lightning.load_from_checkpoint`.
            ConfigError: ``hparams_file`` is given.
        """
        if hparams_file is not None:
            raise ConfigError(
                f"hparams_file={hparams_file!r} is not read: pass the hyper-parameters as arguments."
            )
        module = load_from_checkpoint(cls, checkpoint_path, strict=strict is not False, **kwargs)
        return module if map_location is None else module.to(map_location)

    # -- building --------------------------------------------------------------------------------------

    def setup(self, stage: str | None = None) -> None:
        """Builds the model, unless there is one, and the loss accumulator. All ranks together."""
        if self.model is None and self.model_fn is not None:
            with self._init_context():
                self.model = initialize_parallel_model(
                    self.nxd_config, self.model_fn, True, *self.model_args, **self.model_kwargs
                )
        if self.averaged_loss is None:
            dtype = torch.float64 if get_backend().supports_float64 else torch.float32
            self.averaged_loss = torch.zeros(1, dtype=dtype, device=self.device)

    def configure_model(self) -> None:
        """Builds the model if a subclass' ``setup`` did not."""
        if self.model is None:
            NeuronLTModule.setup(self)

    def configure_optimizers(self) -> Any:
        """The optimizer, sharded as ``nxd_config`` says, and the scheduler."""
        optimizer = initialize_parallel_optimizer(
            self.nxd_config,
            self.opt_cls,
            self.get_param_groups_by_weight_decay(),
            *self.opt_args,
            **self.opt_kwargs,
        )
        optimizer.zero_grad()
        if self.scheduler_cls is None:
            return optimizer
        scheduler = self.scheduler_cls(optimizer, *self.scheduler_args, **self.scheduler_kwargs)
        interval = {"interval": "step"} if self.automatic_optimization else {}
        return [optimizer], [{"scheduler": scheduler, **interval}]

    def get_param_groups_by_weight_decay(self, no_decay: Sequence[str] | None = None) -> list[dict[str, Any]]:
        """Parameter groups with ``opt_kwargs["weight_decay"]`` (0.01 if not given) and without decay.

        Args:
            no_decay: name parts of parameters without decay; default: the module's ``no_decay``.
        """
        return get_param_groups_by_weight_decay(
            self.model.named_parameters(),
            weight_decay=self.opt_kwargs.get("weight_decay", _DEFAULT_WEIGHT_DECAY),
            no_decay=self.no_decay if no_decay is None else tuple(no_decay),
        )

    # -- running ---------------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the model; a single dict (or other mapping) is unpacked as keyword arguments."""
        if len(args) == 1 and not kwargs and isinstance(args[0], Mapping):
            return self.model(**args[0])
        return self.model(*args, **kwargs)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """One micro-batch; at the end of an accumulation window also the optimizer step, as in the guide."""
        backend = get_backend()
        backend.mark_step()  # isolates forward and backward in a graph of their own
        self.should_print = False
        loss = loss_of(self(batch))
        if self.automatic_optimization:
            self.averaged_loss += loss.detach() / self.trainer.accumulate_grad_batches
            return loss
        loss = loss / self.grad_accum_steps
        self.manual_backward(loss)
        self.averaged_loss += loss.detach()
        backend.mark_step()
        if (batch_idx + 1) % self.grad_accum_steps == 0:
            self._step()
            self._log_step()
        return loss

    def _step(self) -> None:
        optimizer, scheduler = self.optimizers(), self.lr_schedulers()
        optimizer.step()  # type: ignore[union-attr]
        self._close_window(optimizer)
        optimizer.zero_grad()  # type: ignore[union-attr]
        if scheduler is not None:
            scheduler.step()  # type: ignore[union-attr]
        get_backend().mark_step()

    def _close_window(self, optimizer: Any) -> None:
        """Takes what is logged about a step; nothing here waits for the device."""
        self.should_print = True
        self._note_optimizer(optimizer)
        loss = self.averaged_loss.clone()
        layout = mesh.current()
        if layout.sizes["dp"] > 1:
            get_backend().all_reduce(loss, layout.group("dp"))
            loss /= layout.sizes["dp"]
        self.loss = loss.detach()
        self.averaged_loss.zero_()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Notes the learning rate and the step that this batch begins with."""
        self._step_before = self.trainer.global_step
        if self.automatic_optimization and self.trainer.strategy.optimizers:
            self.lr = self.trainer.strategy.optimizers[0].param_groups[0]["lr"]

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """Logs loss, learning rate, gradient norm and ``global_step`` of a step that nobody has logged yet."""
        if self.automatic_optimization and self.trainer.global_step > self._step_before:
            lr = self.lr
            self._close_window(self.trainer.strategy.optimizers[0])
            self.lr = lr
        if self.should_print:
            self._log_step()

    def _log_step(self) -> None:
        step = self.trainer.global_step
        if self._logged_step == step or step % self.logging_interval:
            return
        self._logged_step = step
        if self._closed_step != step:  # an overridden training_step sets self.loss and leaves the rest to us
            self._note_optimizer(self.trainer.strategy.optimizers[0])
        for name, value in (("loss", self.loss), ("lr", self.lr), ("global_norm", self.global_norm)):
            if value is not None:
                self.log(name, value, prog_bar=True)
        self.log("global_step", float(step), prog_bar=True)

    def _note_optimizer(self, optimizer: Any) -> None:
        self._closed_step = self.trainer.global_step
        self.lr = optimizer.param_groups[0]["lr"]
        self.global_norm = getattr(optimizer, "grad_norm", None)

    def _init_context(self) -> Any:
        return (
            self.trainer.strategy.tensor_init_context() if self._trainer is not None else torch.device("cpu")
        )


def loss_of(outputs: Any) -> Tensor:
    """The loss in what a model returns: itself a tensor, ``.loss``, ``["loss"]`` or the first of a tuple.

    Raises:
        ConfigError: none of these.
    """
    loss = outputs
    if not isinstance(outputs, Tensor):
        loss = getattr(outputs, "loss", None)
        if loss is None and isinstance(outputs, Mapping):
            loss = outputs.get("loss")
        if loss is None and isinstance(outputs, Sequence) and outputs:
            loss = outputs[0]
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        shape = f" of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else ""
        raise ConfigError(
            f"the model must return its loss (a scalar tensor, .loss, ['loss'] or a tuple that starts with it), but "
            f"it returned {type(outputs).__name__}{shape}: pass labels in the batch, or override training_step."
        )
    return loss


def _check_positive(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{name} must be a positive integer, not {value!r}.")
