"""Set-up: which torch the environment is built on, what is pinned, and the console script."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement

from neuron_lightning.cli.main import main

ROOT = Path(__file__).resolve().parents[2]
PYTHONS = ["3.10", "3.11", "3.12", "3.13", "3.14"]


@pytest.fixture
def setup_env(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """tools/setup_env.py with its outside world replaced: no accelerator, no /dev/neuron*, no building."""
    spec = importlib.util.spec_from_file_location("setup_env", ROOT / "tools" / "setup_env.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.delenv("IGNORE_NEURON", raising=False)
    monkeypatch.setattr(module, "_torch_with_live_accelerator", lambda: None)
    monkeypatch.setattr(module.glob, "glob", lambda pattern: [])
    monkeypatch.setattr(module, "_build", lambda folder, found: built(folder, found))
    return module


def built(folder: Path, found: Any) -> int:
    """Stands for building; tells what it was asked for."""
    print(f"built {folder.name} on {found}")
    return 0


def pins(python: str) -> dict[str, str]:
    """Package -> pinned version for this Python."""
    environment = {**default_environment(), "python_version": python}
    lines = (ROOT / "tools" / "constraints.txt").read_text().splitlines()
    requirements = [Requirement(line) for line in lines if line and not line.startswith("#")]
    chosen = [r for r in requirements if r.marker is None or r.marker.evaluate(environment)]
    names = [r.name for r in chosen]
    assert len(names) == len(set(names)), "a package is pinned twice"
    return {r.name: str(r.specifier).removeprefix("==") for r in chosen}


@pytest.mark.parametrize("python", PYTHONS)
def test_every_requirement_is_pinned_inside_its_range(python: str) -> None:
    text = (ROOT / "setup.py").read_text()
    pinned = pins(python)
    ranges = [Requirement(r) for r in re.findall(r'"([a-z_\-]+(?:\[\w+\])?>=[^"]+)"', text)]
    wanted = [r for r in ranges if "2.10" not in str(r.specifier)]  # all but the xla extra
    assert len(wanted) >= 10
    assert [r.name for r in wanted if pinned.get(r.name) not in r.specifier] == []
    assert pinned["torch"] == "2.13.0"


def test_no_package_index_is_named() -> None:
    for name in (
        "setup.py",
        "Makefile",
        "tools/constraints.txt",
        "tools/setup_env.py",
        "pyproject.toml",
        ".ci/run",
    ):
        assert not re.search(r"index-url|find-links|https?://", (ROOT / name).read_text()), name


def test_without_accelerator_the_pinned_set_is_installed(
    setup_env: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert setup_env.main([str(tmp_path / "env")]) == 0
    assert capsys.readouterr().out == "built env on None\n"
    assert setup_env._constraints(tmp_path, None) == ROOT / "tools" / "constraints.txt"


def test_a_live_torch_is_built_upon_and_kept(
    setup_env: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(setup_env, "_torch_with_live_accelerator", lambda: ("2.13.0+neuron", "neuron", 8))
    monkeypatch.setattr(setup_env.glob, "glob", lambda pattern: ["/dev/neuron0"])
    assert setup_env.main([str(tmp_path / "env")]) == 0
    assert "2.13.0+neuron" in capsys.readouterr().out
    constraints = setup_env._constraints(tmp_path, "2.13.0+neuron").read_text()
    assert "torch==2.13.0+neuron\n" in constraints
    assert "lightning==2.6.6\n" in constraints
    assert "torch==2.13.0\n" not in constraints


def test_neuron_devices_without_their_torch_stop_with_the_remedy(
    setup_env: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(setup_env.glob, "glob", lambda pattern: ["/dev/neuron0", "/dev/neuron1"])
    assert setup_env.main([str(tmp_path / "env")]) == 1
    said = capsys.readouterr().err
    assert f"{sys.executable} -m pip install torch-neuronx" in said
    assert "(2 under /dev)" in said
    monkeypatch.setenv("IGNORE_NEURON", "1")
    assert setup_env.main([str(tmp_path / "env")]) == 0


def test_an_unfit_python_is_named(
    setup_env: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(setup_env.sys, "version_info", (3, 9, 1))
    assert setup_env.main(["env"]) == 1
    assert "Python 3.10 to 3.14 is needed" in capsys.readouterr().err


def test_the_probe_answers_in_this_python() -> None:
    spec = importlib.util.spec_from_file_location("setup_env", ROOT / "tools" / "setup_env.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = module._torch_with_live_accelerator()
    assert found is None or found[2] >= 1


def test_console_script_tells_backend_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["env"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"^backend: +\w+ \(.+\)$", said, re.MULTILINE)
    assert re.search(r"^torch: +\d", said, re.MULTILINE)
    with pytest.raises(SystemExit, match="2"):
        main(["no-such-command"])


def test_console_script_turns_our_errors_into_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("NEURON_LIGHTNING_BACKEND", "abacus")
    assert main(["env"]) == 1
    assert capsys.readouterr().err.startswith("neuron-lightning: unknown backend 'abacus'")
