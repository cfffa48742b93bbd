"""What ``import neuron_lightning`` needs, does, and leaves alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MAY_BE_MISSING = [
    "transformers",
    "tokenizers",
    "matplotlib",
    "torch_xla",
    "torch_neuronx",
    "neuronx_distributed",
]

BLOCK = f"""
import importlib.metadata as metadata, sys
missing, from_name = {MAY_BE_MISSING!r}, metadata.Distribution.from_name
def hide(name):
    if name in missing:
        raise metadata.PackageNotFoundError(name)
    return from_name(name)
metadata.Distribution.from_name = hide
sys.modules.update(dict.fromkeys(missing))  # an import of a module that is None here fails
"""


def run_python(code: str) -> str:
    """Standard output of ``code`` in a fresh interpreter; fails with its traceback."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_imports_without_optional_packages_and_resolves_every_public_name() -> None:
    code = BLOCK + (
        "import neuron_lightning as nl, json\n"
        "eager = sorted(set(nl.__all__) & set(vars(nl)))\n"
        "found = {name: getattr(nl, name) is not None for name in nl.__all__}\n"
        "print(json.dumps([eager, found]))"
    )
    eager, found = json.loads(run_python(code).splitlines()[-1])
    assert eager == []
    assert all(found.values())
    assert {
        "NeuronXLAStrategy",
        "NeuronLTModule",
        "neuronx_distributed_config",
        "parallel_state",
        "xm",
    } <= set(found)


def test_the_models_data_and_optimizers_import_without_optional_packages() -> None:
    modules = ["models.llama", "models.llama_hf", "data", "data.tokenizer", "optim", "checkpoint", "parallel"]
    code = BLOCK + "\n".join(f"import neuron_lightning.{module}" for module in modules) + "\nprint('fine')"
    assert run_python(code).strip() == "fine"


def test_importing_registers_strategy_and_accelerator() -> None:
    code = (
        "import neuron_lightning\n"
        "from lightning.pytorch.strategies import StrategyRegistry\n"
        "from lightning.pytorch.accelerators import AcceleratorRegistry\n"
        "print('neuron' in StrategyRegistry.available_strategies(),"
        " 'neuron' in AcceleratorRegistry.available_accelerators())"
    )
    assert run_python(code).strip() == "True True"


def test_an_unknown_name_is_an_attribute_error() -> None:
    import neuron_lightning

    with pytest.raises(AttributeError, match="NeuronXLAStrategie"):
        _ = neuron_lightning.NeuronXLAStrategie


def test_importing_makes_no_process_group_and_touches_no_device() -> None:
    code = (
        "import neuron_lightning, torch, torch.distributed as dist\n"
        "from neuron_lightning.backends.select import _Holder\n"
        "print(dist.is_initialized(), torch.cuda.is_initialized(), _Holder.backend)"
    )
    assert run_python(code).strip() == "False False None"
