"""The Dockerfiles, read without building them: their parts exist, are known, and agree with setup.py."""

from __future__ import annotations

import fnmatch
import json
import re
import runpy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import setuptools
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]
FILES = {
    path.name.removesuffix(".Dockerfile"): path for path in sorted((ROOT / "docker").glob("*.Dockerfile"))
}
NEURON = ["neuron", "xla"]
INSTRUCTIONS = {
    "ADD", "ARG", "CMD", "COPY", "ENTRYPOINT", "ENV", "EXPOSE", "FROM", "HEALTHCHECK", "LABEL", "ONBUILD", "RUN",
    "SHELL", "STOPSIGNAL", "USER", "VOLUME", "WORKDIR",
}  # fmt: skip
UBUNTU_PYTHON = {"24.04": "3.12", "26.04": "3.14"}
PREDEFINED = {"PATH", "VERSION_CODENAME"}
"""Variables that a Dockerfile of ours may read without setting them: the base image's, and /etc/os-release's."""


@dataclass(frozen=True)
class Instruction:
    """One instruction with its continuation lines joined and its comments gone."""

    name: str
    value: str

    @property
    def words(self) -> list[str]:
        """The arguments, without the flags in front of them."""
        return [word for word in self.value.split() if not word.startswith("--")]


def parse(text: str) -> list[Instruction]:
    """The instructions of a Dockerfile (no here-documents and no other escape character than the backslash)."""
    lines = [
        line.rstrip() for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")
    ]
    joined = re.sub(r"\\\n", " ", "\n".join(lines))
    parts = [line.strip().partition(" ") for line in joined.splitlines()]
    return [Instruction(name, " ".join(value.split())) for name, _, value in parts]


def read(name: str) -> list[Instruction]:
    return parse(FILES[name].read_text(encoding="utf-8"))


def values(name: str, instruction: str) -> list[str]:
    return [found.value for found in read(name) if found.name == instruction]


def arguments(name: str) -> dict[str, str]:
    """Build arguments and their defaults."""
    return dict(value.partition("=")[::2] for value in values(name, "ARG"))  # type: ignore[misc]


@pytest.fixture(scope="module")
def packaging() -> Mapping[str, Any]:
    """What setup.py passes to setuptools."""
    caught: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setuptools, "setup", lambda **options: caught.update(options))
        runpy.run_path(str(ROOT / "setup.py"))
    return caught


def allowed(requirements: list[str], package: str) -> SpecifierSet:
    """The versions of a package that requirements leave."""
    found = [Requirement(text) for text in requirements]
    (wanted,) = [r.specifier for r in found if r.name.replace("_", "-") == package]
    return wanted


def test_the_parser() -> None:
    text = "# syntax\nFROM a:1\nRUN x \\\n    # why\n    && y \\\n\n    z\nCOPY --chown=me a b /c/\n"
    assert parse(text) == [
        Instruction("FROM", "a:1"),
        Instruction("RUN", "x && y z"),
        Instruction("COPY", "--chown=me a b /c/"),
    ]
    assert parse(text)[2].words == ["a", "b", "/c/"]


def test_there_is_one_for_each_way_to_train() -> None:
    assert list(FILES) == ["cpu", "neuron", "xla"]


@pytest.mark.parametrize("name", FILES)
def test_every_instruction_is_known(name: str) -> None:
    assert [found for found in read(name) if found.name not in INSTRUCTIONS or not found.value] == []


@pytest.mark.parametrize("name", FILES)
def test_the_base_is_pinned_to_a_tag_with_a_python_that_the_package_takes(
    name: str, packaging: Mapping[str, Any]
) -> None:
    (base,) = values(name, "FROM")
    assert read(name)[0].name == "FROM"
    image, _, tag = base.partition(":")
    assert image in ("ubuntu", "python")
    version = UBUNTU_PYTHON[tag] if image == "ubuntu" else tag.partition("-")[0]
    assert f"Programming Language :: Python :: {version}" in packaging["classifiers"]


@pytest.mark.parametrize("name", FILES)
def test_what_is_copied_exists_and_is_not_ignored(name: str) -> None:
    ignored = (ROOT / ".dockerignore").read_text().split()
    copied = [word for found in read(name) if found.name in ("COPY", "ADD") for word in found.words[:-1]]
    sources = [source for source in copied if "://" not in source]
    assert sources
    for source in sources:
        assert (ROOT / source).exists(), source
        assert not [pattern for pattern in ignored if fnmatch.fnmatch(source, pattern)], source


@pytest.mark.parametrize("name", FILES)
def test_it_runs_as_a_user_who_was_made(name: str) -> None:
    *_, user = values(name, "USER")
    assert user not in ("root", "0")
    assert any(re.search(rf"useradd .*{user}\b", value) for value in values(name, "RUN"))
    last = [found.name for found in read(name)]
    assert last.index("USER") < last.index("COPY")


@pytest.mark.parametrize("name", FILES)
def test_every_build_argument_is_used_after_it_is_declared_and_nothing_else_is(name: str) -> None:
    known = set(PREDEFINED)
    unused = set()
    for found in read(name):
        if found.name != "ARG":
            for variable in re.findall(r"\$\{?(\w+)", found.value):
                assert variable in known, variable
                unused.discard(variable)
            continue
        variable, _, default = found.value.partition("=")
        assert default, f"{variable} has no default"
        known.add(variable)
        unused.add(variable)
    assert unused <= {"DEBIAN_FRONTEND"}  # which apt reads from the environment


@pytest.mark.parametrize("name", FILES)
def test_extras_exist(name: str, packaging: Mapping[str, Any]) -> None:
    named = [
        extra
        for value in values(name, "RUN")
        for part in re.findall(r"\.\[([\w,]+)\]", value)
        for extra in part.split(",")
    ]
    assert set(named) <= set(packaging["extras_require"])
    assert name == "cpu" or "llama" in named


@pytest.mark.parametrize("name", NEURON)
def test_versions_agree_with_setup(name: str, packaging: Mapping[str, Any]) -> None:
    given = arguments(name)
    requires = packaging["install_requires"]
    torch = Version(given["TORCH_VERSION"])
    assert torch in allowed(requires, "torch")
    assert Version(given["LIGHTNING_VERSION"]) in allowed(requires, "lightning")
    assert Version(given["TORCH_NEURONX_VERSION"]).release[:2] == torch.release[:2]
    if name == "xla":
        extra = packaging["extras_require"]["xla"]
        assert torch in allowed(extra, "torch")
        assert Version(given["TORCH_XLA_VERSION"]) in allowed(extra, "torch-xla")


def test_the_native_image_has_the_pinned_torch_and_both_the_pinned_lightning() -> None:
    pins = dict(
        re.findall(r"(?m)^(torch|lightning)==([\d.]+)$", (ROOT / "tools" / "constraints.txt").read_text())
    )
    assert arguments("neuron")["TORCH_VERSION"] == pins["torch"]
    assert {arguments(name)["LIGHTNING_VERSION"] for name in NEURON} == {pins["lightning"]}


@pytest.mark.parametrize("name", NEURON)
def test_every_package_of_pip_and_of_neuron_is_pinned(name: str) -> None:
    for command in values(name, "RUN"):
        for words in re.findall(r"(?:pip|apt-get) install ([^&]*)", command):
            packages = [word.strip('"') for word in words.split() if not word.startswith("-")]
            for package in packages:
                if not package.startswith((".", "/")) and (command.startswith("pip") or "neuron" in package):
                    assert re.fullmatch(r"[\w-]+==?\$\{\w+\}\*?", package), package


@pytest.mark.parametrize("name", NEURON)
def test_it_tells_about_itself_by_default_and_runs_anything_else(name: str) -> None:
    assert json.loads(values(name, "CMD")[-1]) == ["neuron-lightning", "env"]
    assert values(name, "ENTRYPOINT") == []


@pytest.mark.parametrize("name", FILES)
def test_what_never_was_built_says_so(name: str) -> None:
    comments = [line for line in FILES[name].read_text().splitlines() if line.startswith("#")]
    assert re.search(r"never been\s+built|never built", " ".join(line.strip("# ") for line in comments))
