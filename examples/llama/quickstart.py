"""`make quickstart`: pretrain a small Llama on this machine, tensor parallel and with ZeRO-1.

It looks at what is there, decides how many ranks to start, and hands over to torchrun. Run again, it resumes
from the last checkpoint, or says that the run is complete. Options that it does not know go to ``pretrain.py``
(for example ``--model.lr 1e-3``).
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import torch.distributed.run as torchrun
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from neuron_lightning.backends import select_backend
from neuron_lightning.checkpoint.folder import is_checkpoint, read_trainer_state

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parent.parent
GLOBAL_BATCH = 8
CPU_RANKS = 4


@dataclass(frozen=True)
class Plan:
    """How many ranks, and what each does."""

    num_ranks: int
    tensor_parallel: int
    num_sequences_per_rank: int
    why: str


def plan_ranks(asked: int | None) -> Plan:
    """Four ranks on the CPU; on accelerators as many as there are, in pairs if there are two or more."""
    backend, reason = select_backend()
    available = backend.device_count()
    if backend.name == "cpu":
        num_ranks, why = CPU_RANKS, f"cpu ({reason})"
    else:
        num_ranks, why = max(1, available - available % 2), f"{available} {backend.name} device(s)"
    num_ranks = asked or num_ranks
    tensor_parallel = 2 if num_ranks % 2 == 0 else 1
    replicas = num_ranks // tensor_parallel
    return Plan(num_ranks, tensor_parallel, max(1, GLOBAL_BATCH // replicas), why)


def last_checkpoint(folder: Path) -> tuple[int, Path] | None:
    """(step, path) of the furthest checkpoint in ``folder`` that was written to its end."""
    found = [p for p in folder.glob("*") if is_checkpoint(p)] if folder.is_dir() else []
    steps = [(int(read_trainer_state(path)["global_step"]), path) for path in found]
    return max(steps, default=None)


def parse() -> tuple[argparse.Namespace, list[str]]:
    """This script's options, and those for ``pretrain.py``."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--fresh", action="store_true", help="forget the earlier run and start over")
    parser.add_argument(
        "--max-steps", type=int, default=600, help="optimizer steps in all (default %(default)s)"
    )
    parser.add_argument("--nproc", type=int, help="ranks to start (default: as the machine offers)")
    parser.add_argument("--run-dir", type=Path, default=Path("runs/quickstart"), help="default %(default)s")
    parser.add_argument("--data", help="your own text: a file, a folder, a glob, JSON lines, .bin or .npy")
    return parser.parse_known_args()


def torchrun_command(
    options: argparse.Namespace, plan: Plan, resume: Path | None, rest: list[str]
) -> list[str]:
    """The command line that trains."""
    run_dir: Path = options.run_dir
    settings = {
        "--trainer.max_steps": str(options.max_steps),
        "--trainer.strategy.init_args.tensor_parallel_size": str(plan.tensor_parallel),
        "--trainer.logger.init_args.save_dir": str(run_dir),
        "--data.batch_size": str(plan.num_sequences_per_rank),
        "--model.warmup_steps": str(max(1, min(20, options.max_steps // 10))),
        "--data.data": options.data,
        "--ckpt_path": None if resume is None else str(resume),
    }
    chosen = [part for name, value in settings.items() if value is not None for part in (name, value)]
    launcher = ["torchrun", "--standalone", "--nproc-per-node", str(plan.num_ranks)]
    script = [str(HERE / "pretrain.py"), "fit", "--config", str(HERE / "configs" / "quickstart.yaml")]
    return [*launcher, *script, *chosen, *rest]


def main() -> None:
    """Decides, says what it decided, and runs torchrun."""
    options, rest = parse()
    if options.fresh and options.run_dir.exists():
        shutil.rmtree(options.run_dir)
        print(f"quickstart: removed {options.run_dir}")
    last = last_checkpoint(options.run_dir / "checkpoints")
    if last is not None and last[0] >= options.max_steps:
        print(
            f"quickstart: this run is complete: {last[1]} is at step {last[0]} of {options.max_steps}.\n"
            f"  look at it   make tensorboard, {options.run_dir}/loss.png\n"
            f'  go on        make quickstart ARGS="--max-steps {last[0] + 300}"\n'
            "  start over   make quickstart-fresh"
        )
        return
    plan = plan_ranks(options.nproc)
    command = torchrun_command(options, plan, last[1] if last else None, rest)
    print(
        f"quickstart: {plan.num_ranks} ranks on {plan.why}: tensor parallel {plan.tensor_parallel} x data parallel "
        f"{plan.num_ranks // plan.tensor_parallel}, ZeRO-1, sequence parallel; "
        + (f"resuming from {last[1]} (start over: make quickstart-fresh)" if last else "a new run")
        + f"\n{shlex.join(command)}",
        flush=True,
    )
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    try:
        torchrun.main(command[1:])
    except SignalException:
        sys.exit(130)
    except ChildFailedError:  # the rank that failed first has shown its traceback
        sys.exit(1)


if __name__ == "__main__":
    main()
