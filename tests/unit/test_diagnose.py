"""Each diagnosis on environments made by hand, the real one of this machine, and what ``env`` shows of them."""

from __future__ import annotations

import importlib.util
import logging
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from neuron_lightning.backends import diagnose, environment, select, visible_cores
from neuron_lightning.backends.diagnose import check
from neuron_lightning.backends.environment import Environment
from neuron_lightning.cli import env
from neuron_lightning.cli.main import main
from neuron_lightning.errors import ConfigError, LaunchError

ROOT = Path(__file__).resolve().parents[2]
XLA_MODULES = frozenset({"torch_xla", "libneuronxla", "torch_neuronx"})
XLA_VERSIONS = {
    "torch-neuronx": "2.9.0.2.15.32035+de43f57c",
    "torch-xla": "2.9.0",
    "libneuronxla": "2.2.17544.0",
}

PLAIN = Environment(variables={}, distributions={}, modules=frozenset(), torch_version="2.13.0+cpu")
XLA = Environment(
    variables={"PJRT_DEVICE": "NEURON"},
    distributions=XLA_VERSIONS,
    modules=XLA_MODULES,
    torch_version="2.9.0+cpu",
    instance_type="trn1.32xlarge",
    device_nodes=16,
)
NATIVE = Environment(
    variables={},
    distributions={"torch-neuronx": "2.13.3.0"},
    modules=frozenset({"torch_neuronx"}),
    torch_version="2.13.0+cpu",
    knows_neuron=True,
    neuron_devices=64,
    instance_type="trn2.48xlarge",
    device_nodes=16,
)
BOTH = replace(
    NATIVE, distributions=XLA_VERSIONS | NATIVE.distributions, modules=XLA_MODULES, torch_version="2.13.0"
)


def having(found: Environment, **variables: str) -> Environment:
    """The same with these variables set; an empty one is unset."""
    kept = {name: value for name, value in {**found.variables, **variables}.items() if value}
    return replace(found, variables=kept)


def warnings(found: Environment, backend: str, *arguments: Any, **options: Any) -> list[str]:
    """The messages of warnings; fails if there is an error."""
    check(found, backend, *arguments, **options)
    return [finding.message for finding in diagnose.diagnose(found, backend, *arguments, **options)]


@pytest.mark.parametrize(
    ("found", "backend", "local_ranks"),
    [(PLAIN, "cpu", 4), (PLAIN, "cuda", 8), (XLA, "xla", 32), (NATIVE, "neuron", 64), (NATIVE, "cpu", None)],
)
def test_sound_set_ups(found: Environment, backend: str, local_ranks: int | None) -> None:
    assert warnings(found, backend, local_ranks, requested=True) == []


# -- PJRT_DEVICE -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["cpu", "cuda", "xla"])
@pytest.mark.parametrize(
    ("modules", "missing"),
    [
        ({"torch_xla", "torch_neuronx"}, "libneuronxla"),
        (set(), "torch_xla and libneuronxla"),
        ({"libneuronxla"}, "torch_xla"),
    ],
)
def test_a_neuron_pjrt_device_needs_its_plugin(modules: set[str], missing: str, backend: str) -> None:
    found = replace(XLA, modules=frozenset(modules), instance_type=None)
    with pytest.raises(ConfigError) as caught:
        check(found, backend)
    said = str(caught.value)
    assert re.search(
        rf"PJRT_DEVICE=NEURON means .* but {missing} cannot be imported, so no Neuron core", said
    )
    assert "Unset PJRT_DEVICE" in said
    assert "install torch 2.9, torch-xla 2.9 and torch-neuronx 2.9" in said


def test_a_neuron_pjrt_device_that_nobody_reads_is_a_warning() -> None:
    for found, backend, requested in (
        (NATIVE, "neuron", False),
        (PLAIN, "cpu", True),
        (having(PLAIN, NEURON_LIGHTNING_BACKEND="cpu"), "cpu", False),
    ):
        (message,) = warnings(having(found, PJRT_DEVICE="NEURON"), backend, requested=requested)
        assert f"it has no effect on backend {backend!r}. Unset PJRT_DEVICE" in message


@pytest.mark.parametrize("value", ["TPU", "CUDA", "neuron", "NEURONS"])
@pytest.mark.parametrize("backend", ["cpu", "xla", "neuron"])
def test_an_unknown_pjrt_device(value: str, backend: str) -> None:
    with pytest.raises(
        ConfigError, match=rf"PJRT_DEVICE='{value}' .*must be 'NEURON' .*'CPU'.*unset PJRT_DEVICE"
    ):
        check(having(XLA, PJRT_DEVICE=value), backend)


# -- two products, versions, instances ---------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["neuron", "xla"])
def test_two_products_and_nobody_says_which(backend: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check(BOTH, backend)
    said = str(caught.value)
    assert "torch 2.13.0 has a device of that name, 64 live" in said
    assert "torch-xla 2.9.0 with libneuronxla 2.2.17544.0" in said
    assert "torch-neuronx (here 2.13.3.0)" in said
    assert "two environments: TorchNeuron for trn2 and trn3; torch 2.9, torch-xla 2.9" in said
    assert "NEURON_LIGHTNING_BACKEND=neuron or NEURON_LIGHTNING_BACKEND=xla" in said


@pytest.mark.parametrize(
    ("variables", "backend", "requested", "reason"),
    [
        ({"NEURON_LIGHTNING_BACKEND": "neuron"}, "neuron", False, "NEURON_LIGHTNING_BACKEND=neuron says so"),
        ({"NEURON_LIGHTNING_BACKEND": "xla"}, "xla", False, "NEURON_LIGHTNING_BACKEND=xla says so"),
        ({"PJRT_DEVICE": "NEURON"}, "xla", False, "PJRT_DEVICE=NEURON says so"),
        (
            {"PJRT_DEVICE": "NEURON"},
            "neuron",
            False,
            "live devices come before PJRT_DEVICE=NEURON; NEURON_LIGHTNING_BACKEND=xla",
        ),
        ({}, "neuron", True, "the Trainer's accelerator asks for it"),
    ],
)
def test_two_products_and_a_choice(
    variables: dict[str, str], backend: str, requested: bool, reason: str
) -> None:
    found = having(replace(BOTH, torch_version="2.9.0"), **variables)
    (message,) = warnings(found, backend, requested=requested)
    assert f"Backend {backend!r} is used: {reason}" in message


def test_two_products_do_not_matter_elsewhere() -> None:
    assert warnings(BOTH, "cpu", requested=True) == []


@pytest.mark.parametrize(
    ("torch_version", "xla_version"), [("2.13.0", "2.9.0"), ("2.9.1", "2.8.1"), ("2.8.0", "2.8.1")]
)
def test_xla_needs_torch_and_torch_xla_of_one_version(torch_version: str, xla_version: str) -> None:
    found = replace(XLA, torch_version=torch_version, distributions=XLA_VERSIONS | {"torch-xla": xla_version})
    with pytest.raises(ConfigError) as caught:
        check(found, "xla")
    said = str(caught.value)
    assert "'xla' needs torch 2.9 and torch-xla of the same version, the last" in said
    assert f"here are torch {torch_version} and torch-xla {xla_version}" in said
    assert "Make an environment with torch 2.9" in said


def test_another_torch_is_a_warning_elsewhere() -> None:
    for torch_version in ("2.8.0", "2.14.0+cpu", "3.0"):
        (message,) = warnings(replace(PLAIN, torch_version=torch_version), "cpu")
        assert f"made for torch 2.9 to 2.13, and this is torch {torch_version}: install one" in message
    for torch_version in ("2.9.0", "2.10.1", "2.13.0a0+git1"):
        assert warnings(replace(PLAIN, torch_version=torch_version), "cuda") == []


def test_the_range_of_torch_is_that_of_setup() -> None:
    oldest, newest, xla_oldest, xla_newest = (
        tuple(map(int, bound.split(".")))
        for pair in re.findall(r'"torch>=([\d.]+),<([\d.]+)"', (ROOT / "setup.py").read_text())
        for bound in pair
    )
    assert oldest == diagnose.OLDEST_TORCH
    assert newest == (diagnose.NEWEST_TORCH[0], diagnose.NEWEST_TORCH[1] + 1)
    assert (xla_oldest, xla_newest) == (
        diagnose.XLA_TORCH,
        (diagnose.XLA_TORCH[0], diagnose.XLA_TORCH[1] + 1),
    )


@pytest.mark.parametrize("instance", ["trn1.2xlarge", "trn1n.32xlarge", "inf2.48xlarge"])
@pytest.mark.parametrize("backend", ["neuron", "cpu"])
def test_the_native_product_on_an_instance_that_it_does_not_support(instance: str, backend: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check(replace(NATIVE, instance_type=instance, neuron_devices=0), backend)
    said = str(caught.value)
    assert f"supports trn2 and trn3 only, and this is a {instance}: its cores are reached through" in said
    assert "set PJRT_DEVICE=NEURON; or start a trn2 or trn3" in said
    assert "torch 2.13.0+cpu" in said


def test_other_products_and_instances_are_no_error() -> None:
    for instance in ("trn2.48xlarge", "trn2u.48xlarge", "trn3.48xlarge", "inf1.xlarge", None):
        assert warnings(replace(NATIVE, instance_type=instance), "neuron") == []
    assert warnings(replace(NATIVE, instance_type="trn1.2xlarge"), "cpu", requested=True) == []


def test_chips_that_stand_idle() -> None:
    (message,) = warnings(replace(PLAIN, device_nodes=16), "cpu")
    assert "16 Neuron chip(s) under /dev" in message
    assert "On trn2 and trn3 install TorchNeuron" in message
    assert "NEURON_LIGHTNING_BACKEND=cpu" in message
    (message,) = warnings(having(XLA, PJRT_DEVICE=""), "cpu")
    assert "on trn1 and inf2 set PJRT_DEVICE=NEURON." in message
    assert warnings(having(replace(PLAIN, device_nodes=16), NEURON_LIGHTNING_BACKEND="cpu"), "cpu") == []


# -- visible cores -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "cores"),
    [("4", [4]), ("0-3", [0, 1, 2, 3]), ("0,2,4-5", [0, 2, 4, 5]), ("7-7", [7]), (" 8 , 9-10 ", [8, 9, 10])],
)
def test_visible_cores(text: str, cores: list[int]) -> None:
    assert visible_cores.parse_visible_cores(text) == cores


@pytest.mark.parametrize(
    ("variable", "text", "message"),
    [
        ("NEURON_RT_VISIBLE_CORES", "0-", "'0-'"),
        ("NEURON_RT_VISIBLE_CORES", "3-0", "at '3-0': it must be core numbers and rising ranges.*0,2,4-5"),
        ("NEURON_RT_VISIBLE_CORES", "0,,2", "at ''"),
        ("NEURON_RT_VISIBLE_CORES", "0-1-2", "at '0-1-2'"),
        ("NEURON_RT_VISIBLE_CORES", "all", "at 'all'.*unset it to use every core"),
        ("NEURON_RT_VISIBLE_CORES", "-1", "at '-1'"),
        ("NEURON_RT_VISIBLE_CORES", "0-99999999", "at '0-99999999'"),
        ("NEURON_RT_VISIBLE_CORES", "0-3,2", r"names core\(s\) \[2\] more than once.*each of them once"),
        ("NEURON_RT_NUM_CORES", "two", "'two' cannot be read: it must be a whole number.*unset"),
        ("NEURON_RT_NUM_CORES", "-1", "'-1' cannot be read"),
    ],
)
@pytest.mark.parametrize("local_ranks", [None, 4])
def test_malformed_cores(variable: str, text: str, message: str, local_ranks: int | None) -> None:
    for found, backend in ((NATIVE, "neuron"), (XLA, "xla")):
        with pytest.raises(ConfigError, match=rf"{variable}=.*{message}"):
            check(having(found, **{variable: text}), backend, local_ranks)


@pytest.mark.parametrize(
    ("variables", "cores", "ranks", "wanted"),
    [
        ({"NEURON_RT_VISIBLE_CORES": "0-3"}, 4, 8, "0-7"),
        ({"NEURON_RT_VISIBLE_CORES": "0,2,4-5"}, 4, 2, "0-1"),
        ({"NEURON_RT_VISIBLE_CORES": "0-31"}, 32, 1, "0"),
        ({"NEURON_RT_VISIBLE_CORES": "0"}, 1, 8, "0-7"),
        ({"NEURON_RT_VISIBLE_CORES": "0-3", "NEURON_RT_NUM_CORES": "8"}, 4, 8, "0-7"),
        ({"NEURON_RT_NUM_CORES": "2"}, 2, 8, "0-7"),
    ],
)
@pytest.mark.parametrize(("found", "backend"), [(NATIVE, "neuron"), (XLA, "xla")])
def test_cores_that_do_not_fit_the_ranks(
    found: Environment, backend: str, variables: dict[str, str], cores: int, ranks: int, wanted: str
) -> None:
    with pytest.raises(LaunchError) as caught:
        check(having(found, **variables), backend, ranks)
    said = str(caught.value)
    assert f"{ranks} rank(s) run on this node and {next(iter(variables.items()))[0]}=" in said
    assert f"leaves them {cores} core(s): start {cores} rank(s) (torchrun --nproc-per-node {cores})" in said
    assert f"set NEURON_RT_VISIBLE_CORES to {ranks} core(s), such as {wanted} (unset" in said


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"NEURON_RT_VISIBLE_CORES": ""},
        {"NEURON_RT_VISIBLE_CORES": "8-11"},
        {"NEURON_RT_VISIBLE_CORES": "0,2,4-5"},
        {"NEURON_RT_VISIBLE_CORES": "0-3", "NEURON_RT_NUM_CORES": "16"},  # the first beats the second
        {"NEURON_RT_NUM_CORES": "4"},
        {"NEURON_RT_NUM_CORES": "1"},  # one each
        {"NEURON_RT_NUM_CORES": "0"},  # all
    ],
    ids=str,
)
def test_cores_that_fit_four_ranks(variables: dict[str, str]) -> None:
    assert warnings(having(NATIVE, **variables), "neuron", 4) == []
    assert warnings(having(XLA, **variables), "xla", 4) == []


def test_a_core_of_its_own_for_each_rank() -> None:
    for core, rank in (("0", "0"), ("3", "3"), ("11", "3")):
        own = {"NEURON_RT_VISIBLE_CORES": core, "LOCAL_RANK": rank}
        assert warnings(having(NATIVE, **own), "neuron", 4) == []
        assert (
            warnings(having(XLA, **own, NEURON_PJRT_PROCESS_INDEX=rank), "xla", 4) == []
        )  # torch_xla did it
        with pytest.raises(LaunchError, match="4 rank"):  # which torch_xla refuses as well
            check(having(XLA, **own), "xla", 4)
    shared = {"NEURON_RT_VISIBLE_CORES": "0", "SLURM_LOCALID": "1"}
    with pytest.raises(LaunchError, match="NEURON_RT_VISIBLE_CORES=0 leaves them 1 core"):
        check(having(NATIVE, **shared), "neuron", 4)


def test_ranks_that_are_not_known_yet_are_torchruns() -> None:
    found = having(NATIVE, NEURON_RT_VISIBLE_CORES="0-3")
    assert warnings(found, "neuron") == []
    assert warnings(having(found, LOCAL_WORLD_SIZE="4"), "neuron") == []
    with pytest.raises(LaunchError, match=r"8 rank\(s\) run on this node"):
        check(having(found, LOCAL_WORLD_SIZE="8"), "neuron")


@pytest.mark.parametrize(
    ("found", "backend"),
    [
        (PLAIN, "cpu"),
        (PLAIN, "cuda"),
        (having(XLA, PJRT_DEVICE="CPU", NEURON_LIGHTNING_BACKEND="xla"), "xla"),
    ],
)
def test_cores_do_not_matter_elsewhere(found: Environment, backend: str) -> None:
    assert warnings(having(found, NEURON_RT_VISIBLE_CORES="all"), backend, 4) == []


# -- saying it ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rank", "times"), [({}, 1), ({"LOCAL_RANK": "0"}, 1), ({"LOCAL_RANK": "3"}, 0)])
def test_one_rank_of_a_node_warns(rank: dict[str, str], times: int, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="neuron_lightning"):
        check(having(replace(PLAIN, torch_version="2.14.0"), **rank), "cpu")
    assert sum("torch 2.14.0" in record.message for record in caplog.records) == times


def test_warnings_are_said_before_an_error(caplog: pytest.LogCaptureFixture) -> None:
    with (
        caplog.at_level(logging.WARNING, logger="neuron_lightning"),
        pytest.raises(LaunchError, match="2 core"),
    ):
        check(having(replace(NATIVE, torch_version="2.14.0"), NEURON_RT_VISIBLE_CORES="0-1"), "neuron", 4)
    assert "torch 2.14.0" in caplog.text


# -- this machine ------------------------------------------------------------------------------------------


def test_collecting_on_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEURON_RT_NUM_CORES", "3")
    monkeypatch.delenv("PJRT_DEVICE", raising=False)
    found = environment.collect()
    assert found.torch_version == torch.__version__
    assert found.variables["NEURON_RT_NUM_CORES"] == "3"
    assert "PJRT_DEVICE" not in found.variables
    for name in environment.MODULES:
        assert (name in found.modules) == (importlib.util.find_spec(name) is not None)
    assert found.knows_neuron == hasattr(torch, "neuron")
    assert found.device_nodes == len([n for n in os.listdir("/dev") if re.fullmatch(r"neuron\d+", n)])
    assert environment.BACKEND_VARIABLE == select.ENVIRONMENT_VARIABLE


def test_checking_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in environment.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NEURON_RT_VISIBLE_CORES", "all")
    diagnose.check_environment("cpu", 2, requested=True)
    with pytest.raises(ConfigError, match="'all'"):
        diagnose.check_environment("neuron", 2, requested=True)


def test_looking_imports_no_torch_xla_and_leaves_the_environment_alone() -> None:
    code = (
        "import os, sys; before = dict(os.environ)\n"
        "from neuron_lightning.backends.environment import collect; collect()\n"
        "print(before == dict(os.environ), [m for m in ('torch_xla', 'libneuronxla', 'torch_neuronx') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "True []"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"product_name": "trn1.32xlarge\n"}, "trn1.32xlarge"),
        ({"product_name": "trn2u.48xlarge\n", "product_version": "\n"}, "trn2u.48xlarge"),
        ({"product_name": "HVM domU\n", "product_version": "4.11.amazon\n"}, None),
        ({"product_name": "Google Compute Engine\n"}, None),
        (
            {"product_name": "Standard PC (Q35 + ICH9, 2009)\n", "product_version": "inf2.xlarge\n"},
            "inf2.xlarge",
        ),
        ({}, None),
    ],
)
def test_instance_type(files: dict[str, str], expected: str | None, tmp_path: Path) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert environment.instance_type(tmp_path) == expected


# -- neuron-lightning env ----------------------------------------------------------------------------------


@pytest.fixture
def show(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str]]:
    """``neuron-lightning env`` on an environment made by hand; exit status and output."""

    def run(found: Environment) -> tuple[int, str]:
        monkeypatch.setattr(env, "collect", lambda: found)
        status = main(["env"])
        return status, capsys.readouterr().out

    monkeypatch.setenv("NEURON_LIGHTNING_BACKEND", "cpu")
    return run


def test_env_shows_what_was_found(show: Callable[..., tuple[int, str]]) -> None:
    status, said = show(having(XLA, NEURON_LIGHTNING_BACKEND="cpu", NEURON_RT_NUM_CORES="4"))
    assert status == 0
    for line in (
        "instance: trn1.32xlarge",
        "Neuron chips: 16 under /dev",
        "neuron device: not a device of this torch",
        "torch-xla 2.9.0",
        "importable: torch_xla, libneuronxla, torch_neuronx",
        "NEURON_LIGHTNING_BACKEND=cpu, PJRT_DEVICE=NEURON, NEURON_RT_NUM_CORES=4",
        "backend: cpu (NEURON_LIGHTNING_BACKEND=cpu)",
        "diagnosis: nothing wrong was found",
    ):
        assert line in re.sub(" +", " ", said)


def test_env_shows_warnings_and_errors(show: Callable[..., tuple[int, str]]) -> None:
    status, said = show(replace(PLAIN, torch_version="2.14.0", variables={"PJRT_DEVICE": "TPU"}))
    assert status == 1
    assert re.search(r"^error: +PJRT_DEVICE='TPU'", said, re.MULTILINE)
    assert re.search(r"^warning: +this package is made for torch", said, re.MULTILINE)
    assert "nothing wrong" not in said


def test_env_shows_what_was_found_when_no_backend_can_be_chosen(
    show: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NEURON_LIGHTNING_BACKEND", "abacus")
    status, said = show(XLA)
    assert status == 1
    assert "trn1.32xlarge" in said
    assert "backend:" not in said
