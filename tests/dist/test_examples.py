"""The example programs, started as a user starts them: by torchrun, and compared with each other."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples" / "llama"
STEPS = 6
BATCH = 8
BYTES = 400_000
SHAPE = {"hidden_size": 32, "intermediate_size": 64}

GUIDE = """
.. code:: ipython3

    class NeuronLlamaLTModule(NeuronLTModule):
        def training_step(self, batch, batch_idx):
            ...
        ...

Text between the blocks.

.. code:: ipython3

    def training_step(self, batch, batch_idx):
        xm.mark_step()
        self.should_print = False
        outputs = self.model(**batch)
        loss = outputs.loss / self.grad_accum_steps
        loss.backward()
        self.averaged_loss += loss.detach()
        if (batch_idx + 1) % self.grad_accum_steps == 0:
            self.should_print = True
            self.loss = xm.all_reduce(
                xm.REDUCE_SUM,
                self.averaged_loss / self.trainer.strategy.data_parallel_size,
                groups=parallel_state.get_data_parallel_group(as_list=True),
            ).detach()
            self.averaged_loss.zero_()
            self.optimizers().step()
            self.optimizers().zero_grad()
            self.lr_schedulers().step()
        return loss

.. code:: ipython3

    class NeuronLightningDataModule(LightningDataModule):
        def __init__(self, dataloader_fn: Callable, data_dir: str, batch_size: int, data_args: Tuple = ()):
            super().__init__()
            self.dataloader_fn, self.data_dir, self.batch_size = dataloader_fn, data_dir, batch_size
            self.data_args = data_args,

        def train_dataloader(self):
            strategy = self.trainer.strategy
            return self.dataloader_fn(
                self.data_dir, self.batch_size, strategy.data_parallel_size, strategy.data_parallel_rank, *self.data_args
            )

.. code:: ipython3

    model = NeuronLlamaLTModule(
        model_fn = LlamaForCausalLM,
        nxd_config = nxd_config,
        model_args = (model_config,),
        opt_cls = optimizer_cls,
        scheduler_cls = configure_scheduler,
        opt_kwargs = {"lr": flags.lr},
        scheduler_args = (flags.warmup_steps, flags.max_steps),
        grad_accum_steps = flags.grad_accum_usteps,
        manual_opt = True,
    )
    dm = NeuronLightningDataModule(
        create_llama_pretraining_dataset, flags.data_dir, flags.batch_size, data_args = (flags.seed,),
    )

.. code:: ipython3

    strategy = NeuronXLAStrategy(nxd_config = nxd_config)
    plugins = [NeuronXLAPrecisionPlugin()]
    callbacks = [NeuronTQDMProgressBar()]

.. code:: ipython3

    trainer = Trainer(
        strategy = strategy, max_steps = flags.steps_this_run, plugins = plugins, callbacks = callbacks,
        enable_checkpointing = flags.save_checkpoint, logger = NeuronTensorBoardLogger(save_dir=flags.log_dir),
        log_every_n_steps = 1,
    )
    trainer.fit(model=model, datamodule=dm)

.. code:: ipython3

    callbacks.append(
        ModelCheckpoint(
            save_top_k = flags.num_kept_checkpoint, monitor="global_step", mode="max",
            every_n_train_steps = flags.checkpoint_freq, dirpath = flags.checkpoint_dir,
        )
    )

.. code:: ipython3

     trainer.fit(model=model, datamodule=dm, ckpt_path=ckpt_path)
"""
"""A shortened guide of our own, of the same blocks; NEURON_LIGHTNING_GUIDE names the real one where there is one."""


def torchrun(ranks: int, script: Path, *arguments: str, succeeds: bool = True) -> str:
    """What the program printed; fails with its output if it did not end as expected."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    done = subprocess.run(
        [*command, str(script), *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        check=False,
    )
    assert (done.returncode == 0) is succeeds, done.stdout[-6000:]
    return done.stdout


def logged(folder: Path) -> dict[int, float]:
    """The losses in a TensorBoard folder by optimizer step."""
    sys.path.insert(0, str(EXAMPLES))
    try:
        from report import read_scalars
    finally:
        sys.path.remove(str(EXAMPLES))
    return dict(read_scalars(folder, "loss"))


def layout(ranks: int) -> tuple[int, int]:
    """(tensor parallel, data parallel) of a number of ranks."""
    return {1: (1, 1), 2: (2, 1), 4: (2, 2)}[ranks]


def pretrain(ranks: int, folder: Path, *more: str, zero1: bool, max_steps: int = STEPS) -> str:
    """``pretrain.py`` with the guide's no-decay list and weight decay, a batch of ``BATCH`` in all, accumulated."""
    tp, dp = layout(ranks)
    arguments = {
        "config": str(EXAMPLES / "configs" / "quickstart.yaml"),
        "trainer.max_steps": max_steps,
        "trainer.log_every_n_steps": 1,
        "trainer.val_check_interval": 4,
        "trainer.limit_val_batches": 2,
        "trainer.logger.init_args.save_dir": folder,
        "trainer.strategy.init_args.tensor_parallel_size": tp,
        "trainer.strategy.init_args.zero1": str(zero1).lower(),
        "trainer.strategy.init_args.sequence_parallel": str(tp > 1).lower(),
        "model.llama.num_hidden_layers": 2,
        "model.llama.max_position_embeddings": 32,
        **{f"model.llama.{name}": value for name, value in SHAPE.items()},
        "model.lr": 1e-3,
        "model.warmup_steps": 2,
        "model.min_lr_ratio": 0.1,
        "model.betas": "[0.9, 0.999]",
        "model.weight_decay": 0.01,
        "model.no_decay": '["bias", "LayerNorm"]',
        "model.grad_accum_steps": 2,
        "data.data_dir": folder.parent / "data",
        "data.max_bytes": BYTES,
        "data.vocab_size": 512,
        "data.seq_len": 32,
        "data.batch_size": BATCH // dp // 2,
        "report.sample_tokens": 8,
    }
    flat = [part for name, value in arguments.items() for part in (f"--{name}", str(value))]
    return torchrun(ranks, EXAMPLES / "pretrain.py", "fit", *flat, *more)


def guide_flags(ranks: int, folder: Path) -> list[str]:
    """The same settings as flags of ``guide.py`` and ``run_guide.py``."""
    tp, dp = layout(ranks)
    flags = {
        "data_dir": folder.parent / "data",
        "max_bytes": BYTES,
        "log_dir": folder,
        "checkpoint_dir": folder / "checkpoints",
        "tensor_parallel_size": tp,
        "batch_size": BATCH // dp // 2,
        "grad_accum_usteps": 2,
        "max_steps": STEPS,
        "warmup_steps": 2,
        "vocab_size": 512,
        "seq_len": 32,
        **SHAPE,
    }
    flat = [part for name, value in flags.items() for part in (f"--{name}", str(value))]
    return [*flat, *(["--sequence_parallel"] if tp > 1 else []), *(["--zero1"] if dp > 1 else [])]


def run_guide(ranks: int, folder: Path, guide: Path) -> dict[str, dict[int, float]]:
    """The losses that ``run_guide.py`` prints, by run."""
    printed = torchrun(
        ranks, ROOT / "tools" / "run_guide.py", str(guide), "--checkpointing", *guide_flags(ranks, folder)
    )
    losses: dict[str, dict[int, float]] = {}
    for line in printed.splitlines():
        if line.startswith('{"run"'):
            record = json.loads(line)
            losses.setdefault(record["run"], {})[record["step"]] = record["loss"]
    return losses


@pytest.fixture
def guide_file(tmp_path: Path) -> Path:
    """The guide's text: the real one if it is there, else ours."""
    real = os.environ.get("NEURON_LIGHTNING_GUIDE")
    if real:
        return Path(real)
    (tmp_path / "guide.txt").write_text(GUIDE)
    return tmp_path / "guide.txt"


@pytest.mark.parametrize(
    "ranks", [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(4, marks=pytest.mark.slow)]
)
def test_guide_and_its_blocks_log_the_losses_of_pretrain(
    ranks: int, tmp_path: Path, guide_file: Path
) -> None:
    printed = pretrain(ranks, tmp_path / "pretrain", zero1=ranks == 4)
    torchrun(ranks, EXAMPLES / "guide.py", *guide_flags(ranks, tmp_path / "guide"))
    expected = logged(tmp_path / "pretrain")
    assert sorted(expected) == list(range(1, STEPS + 1))
    assert expected[STEPS] < expected[1] - 0.05
    assert logged(tmp_path / "guide" / "lightning_logs" / "version_0") == pytest.approx(expected, rel=1e-6)
    blocks = run_guide(ranks, tmp_path / "run_guide", guide_file)
    assert blocks["guide"] == pytest.approx(expected, rel=1e-6)
    second_half = {step: loss for step, loss in expected.items() if step > STEPS // 2}
    assert {s: v for s, v in blocks["resumed"].items() if s > STEPS // 2} == pytest.approx(
        second_half, rel=1e-6
    )
    for words in (
        "held-out loss",
        "A sample, prompted with",
        "TensorBoard log",
        "last checkpoint",
        "loss.png",
    ):
        assert words in printed
    assert (tmp_path / "pretrain" / "loss.png").stat().st_size > 5_000


def quickstart(run_dir: Path, *arguments: str) -> str:
    """What ``quickstart.py`` prints."""
    settings = {
        "run-dir": run_dir,
        "nproc": 2,
        "model.llama.num_hidden_layers": 1,
        **{f"model.llama.{name}": value for name, value in SHAPE.items()},
        "data.data_dir": run_dir.parent / "data",
        "data.max_bytes": BYTES,
        "data.vocab_size": 512,
        "data.seq_len": 32,
        "trainer.val_check_interval": 4,
        "trainer.limit_val_batches": 2,
        "trainer.log_every_n_steps": 1,
        "report.sample_tokens": 4,
    }
    small = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "quickstart.py"), *small, *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:]
    return done.stdout


def test_quickstart_resumes_and_says_when_it_is_complete(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    first = quickstart(run_dir, "--max-steps", "4")
    assert "Layout: tp=2" in first
    assert "ln(vocabulary)" in first
    assert "is complete" in quickstart(run_dir, "--max-steps", "4")
    again = quickstart(run_dir, "--max-steps", "8")
    assert "resuming after step 4" in again
    assert sorted(dict(logged(run_dir)))[-1] == 8


def test_a_binary_data_file_ends_all_ranks_with_file_line_and_remedy(tmp_path: Path) -> None:
    (tmp_path / "picture.txt").write_bytes(b"some text\n\0\1\2")
    settings = {
        "config": EXAMPLES / "configs" / "quickstart.yaml",
        "trainer.logger.init_args.save_dir": tmp_path / "run",
        "data.data": tmp_path / "picture.txt",
        "data.data_dir": tmp_path / "data",
    }
    flat = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
    started = time.monotonic()
    printed = torchrun(2, EXAMPLES / "pretrain.py", "fit", *flat, succeeds=False)
    assert time.monotonic() - started < 90
    assert "picture.txt, line 2: a NUL byte, so this is a binary file" in printed
    assert printed.count("Traceback (most recent call last)") <= 2  # ours once, and torchrun's own
    assert [path.name for path in (tmp_path / "data").glob("*")] == [".lock"]
