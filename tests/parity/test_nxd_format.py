"""NxD's layout against code that follows its published format and uses nothing of ours."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from neuron_lightning import checkpoint
from neuron_lightning.checkpoint.formats import neuron
from neuron_lightning.checkpoint.formats import nxd as reader
from neuron_lightning.cli.main import main
from neuron_lightning.errors import CheckpointError
from neuron_lightning.models.llama import LlamaConfig, LlamaForCausalLM
from neuron_lightning.models.llama_nxd import NXD_LLAMA
from tests.parity import nxd_format as nxd
from tests.parity.nxd_format import Case
from tests.unit.formats_cases import write_config

SHAPE = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "max_position_embeddings": 32,
    "rms_norm_eps": 1e-6,
}
STEP = 7
CASES = [
    Case(tp=tp, dp=dp, zero1=dp > 1 or core, xser=xser, core=core, masters=core or dp > 1)
    for tp, dp, xser, core in itertools.product((1, 2, 4, 8), (1, 2), (True, False), (True, False))
] + [
    Case(tp=4, fused_qkv=False),
    Case(tp=4, dp=3, zero1=True, masters=True),
    Case(tp=8, kv_heads=1),
    Case(tp=2, kv_heads=8, fused_qkv=False, core=True),
    Case(tp=8, dp=2, zero1=True, masters=True, blocked=True),
    Case(tp=4, fused_qkv=False, core=True, xser=False, blocked=True),
    Case(tp=2, blocked=True),
]


def name_of(case: Case) -> str:
    flags = [f for f in ("zero1", "xser", "core", "fused_qkv", "masters", "blocked") if getattr(case, f)]
    return f"tp{case.tp}-dp{case.dp}-kv{case.kv_heads}-{'-'.join(flags)}"


def full_state(case: Case, seed: int) -> dict[str, Tensor]:
    """Random tensors of the model, by Hugging Face's names."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(shape, generator=generator) * 0.2
    hidden, inner = SHAPE["hidden_size"], SHAPE["intermediate_size"]
    full = {"model.embed_tokens.weight": draw(48, hidden), "lm_head.weight": draw(48, hidden)}
    full["model.norm.weight"] = 1 + draw(hidden)
    for i in range(2):
        layer, kv = f"model.layers.{i}", case.kv_heads * case.head_dim
        full |= {
            f"{layer}.self_attn.q_proj.weight": draw(32, hidden),
            f"{layer}.self_attn.k_proj.weight": draw(kv, hidden),
            f"{layer}.self_attn.v_proj.weight": draw(kv, hidden),
            f"{layer}.self_attn.o_proj.weight": draw(hidden, 32),
            f"{layer}.mlp.gate_proj.weight": draw(inner, hidden),
            f"{layer}.mlp.up_proj.weight": draw(inner, hidden),
            f"{layer}.mlp.down_proj.weight": draw(hidden, inner),
            f"{layer}.input_layernorm.weight": 1 + draw(hidden),
            f"{layer}.post_attention_layernorm.weight": 1 + draw(hidden),
        }
    return full


def states_of(case: Case) -> dict[str, dict[str, Tensor]]:
    keys = ("exp_avg", "exp_avg_sq") + (("master",) if case.masters else ())
    return {key: full_state(case, seed) for seed, key in enumerate(keys, 1)}


def ours(name: str) -> str:
    """Our canonical name of a Hugging Face tensor of a model that a module holds as ``model``."""
    name = re.sub(r"\.([qkv])_proj\.weight$", r".qkv_proj.weight_\1", name)
    name = name.replace(".gate_proj.weight", ".gate_up_proj.weight_0")
    return "model." + name.replace(".up_proj.weight", ".gate_up_proj.weight_1")


def expected(case: Case) -> dict[str, Tensor]:
    """What our folder must hold."""
    found = {f"model/{ours(n)}": t for n, t in full_state(case, 0).items()}
    for key, full in states_of(case).items():
        found |= {f"optimizer.0/{ours(n)}/{key}": t for n, t in full.items()}
    return found


def read_ours(path: Path) -> dict[str, Tensor]:
    return {name: entry.full().clone() for name, entry in neuron.read(path).tensors.items()}


def convert(source: Path, target: Path, *options: object) -> None:
    arguments = ["convert", source, target, *options]
    assert main([str(argument) for argument in arguments]) == 0


def kv_order(case: Case) -> list[str]:
    return ["--kv-order", "blocked"] if case.blocked else []


def different(a: dict[str, Tensor], b: dict[str, Tensor]) -> list[str]:
    return sorted(a.keys() ^ b.keys()) or [name for name in a if not torch.equal(a[name], b[name])]


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_written_by_the_published_format_and_read_here(tmp_path: Path, case: Case) -> None:
    nxd.write(case, tmp_path / "nxd", full_state(case, 0), states_of(case), STEP)
    convert(tmp_path / "nxd", tmp_path / "ours", "--to", "neuron", *kv_order(case))
    assert different(read_ours(tmp_path / "ours"), expected(case)) == []
    contents = neuron.read(tmp_path / "ours")
    assert contents.trainer["global_step"] == STEP
    assert {tuple(numbers.items()) for numbers in contents.scalars.values()} == {(("step", float(STEP)),)}
    assert [group["options"]["weight_decay"] for group in contents.groups[0]] == [0.1, 0.0]
    assert all("norm" in name for name in contents.groups[0][1]["params"])


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_written_here_and_read_by_the_published_format(tmp_path: Path, case: Case) -> None:
    plain = Case(
        tp=1, core=True, zero1=True, masters=case.masters, kv_heads=case.kv_heads, fused_qkv=case.fused_qkv
    )
    nxd.write(plain, tmp_path / "full", full_state(case, 0), states_of(case), STEP)
    convert(tmp_path / "full", tmp_path / "ours", "--to", "neuron")
    config = {**SHAPE, "num_key_value_heads": case.kv_heads}
    options = ["--tp", case.tp, "--config", write_config(tmp_path / "config.json", LlamaConfig(**config))]
    options += (
        ["--dp", case.dp, "--zero1"] * case.zero1 + ["--core"] * case.core + ["--no-xser"] * (not case.xser)
    )
    convert(tmp_path / "ours", tmp_path / "nxd", "--to", "nxd", *options, *kv_order(case))
    model, states, step = nxd.read(case, tmp_path / "nxd")
    assert different(model, full_state(case, 0)) == []
    assert step == STEP
    assert sorted(states) == sorted(states_of(case))
    for key, full in states_of(case).items():
        assert different(states[key], full) == [], key


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_the_model_computes_what_hugging_faces_does(tmp_path: Path, tp: int) -> None:
    transformers = pytest.importorskip("transformers")
    case = Case(tp=tp, zero1=True, dp=2)
    nxd.write(case, tmp_path / "nxd", full_state(case, 0), states_of(case), STEP)
    convert(tmp_path / "nxd", tmp_path / "ours", "--to", "neuron")
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE))
    theirs.load_state_dict(full_state(case, 0))
    module = torch.nn.Module()
    module.model = LlamaForCausalLM(LlamaConfig(**SHAPE))
    checkpoint.load_module_state(tmp_path / "ours", module.state_dict(), dict(module.named_parameters()))
    ids = torch.randint(0, 48, (2, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert (module.model(ids).logits - theirs(ids).logits).abs().max() < 1e-5


def test_a_padded_vocabulary_is_cut_to_the_models(tmp_path: Path) -> None:
    case = Case(tp=4)
    nxd.write(case, tmp_path / "nxd", full_state(case, 0), states_of(case), STEP)
    config = write_config(tmp_path / "config.json", LlamaConfig(**{**SHAPE, "vocab_size": 45}))
    convert(tmp_path / "nxd", tmp_path / "ours", "--to", "neuron", "--config", config)
    read, full = read_ours(tmp_path / "ours"), full_state(case, 0)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(read[f"model/model.{name}"], full[name][:45])
        assert read[f"optimizer.0/model.{name}/exp_avg"].shape == (45, 32)
    convert(tmp_path / "ours", tmp_path / "back", "--to", "nxd", "--tp", 4, "--config", config)
    again, _, _ = nxd.read(case, tmp_path / "back")
    assert torch.equal(again["lm_head.weight"][:45], full["lm_head.weight"][:45])
    assert not again["lm_head.weight"][45:].any()


def test_tied_weights_are_one(tmp_path: Path) -> None:
    case = Case(tp=2)
    full = full_state(case, 0)
    full["lm_head.weight"] = full["model.embed_tokens.weight"]
    nxd.write(case, tmp_path / "nxd", full, states_of(case), STEP)
    convert(tmp_path / "nxd", tmp_path / "ours", "--to", "neuron", "--weights-only")
    contents = neuron.read(tmp_path / "ours")
    assert contents.aliases == {"model/model.lm_head.weight": "model/model.model.embed_tokens.weight"}


class Executes:
    """Pickles to a call that leaves a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("where", ["document", "tensor", "info", "optim"])
def test_a_pickle_with_code_is_refused(tmp_path: Path, where: str) -> None:
    case = Case(tp=1, dp=2, zero1=True, core=where in ("info", "optim"))
    nxd.write(case, tmp_path / "nxd", full_state(case, 0), states_of(case), STEP)
    weights, optim = nxd.paths(case, tmp_path / "nxd", 0, 0)
    victim = {
        "document": weights,
        "optim": optim,
        "info": Path(f"{weights}.info.pt"),
        "tensor": Path(f"{weights}.tensors") / "tensor_0.pt",
    }[where]
    torch.save({"state_dict": Executes(tmp_path / "executed")}, victim)
    assert main(["convert", str(tmp_path / "nxd"), str(tmp_path / "ours"), "--to", "neuron"]) == 1
    assert not (tmp_path / "executed").exists()
    assert not (tmp_path / "ours").exists()
    torch.load(victim, weights_only=False)
    assert (tmp_path / "executed").exists(), "the pickle is harmless: the test shows nothing"


def test_a_reference_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    case = Case(tp=1)
    nxd.write(case, tmp_path / "nxd", full_state(case, 0), states_of(case), STEP)
    path, _ = nxd.paths(case, tmp_path / "nxd", 0, 0)
    with nxd.torch_xla_stub():
        document = torch.load(path, weights_only=False)
        document["state_dict"]["model.lm_head.weight"] = nxd.TensorReference("/../../elsewhere")  # type: ignore[arg-type]
        torch.save(document, path)
    with pytest.raises(CheckpointError, match="not a number; refused"):
        reader.read(tmp_path / "nxd", reader.NxdReading(rules=NXD_LLAMA))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda p: (p / "tp_rank_01_pp_rank_00_dp_rank_01").unlink(), "it is incomplete"),
        (lambda p: (p / "tp_rank_00_pp_rank_00_dp_rank_00").write_bytes(b"PK\3\4 no"), "is refused"),
    ],
)
def test_missing_and_damaged_files_are_named(tmp_path: Path, capsys, damage, words: str) -> None:  # type: ignore[no-untyped-def]
    case = Case(tp=2, dp=2, zero1=True)
    nxd.write(case, tmp_path / "nxd", full_state(case, 0), states_of(case), STEP)
    damage(tmp_path / "nxd")
    assert main(["convert", str(tmp_path / "nxd"), str(tmp_path / "ours"), "--to", "neuron"]) == 1
    assert words in capsys.readouterr().err
    assert not (tmp_path / "ours").exists()


def test_an_interrupted_save_and_an_unknown_parameter_are_errors(tmp_path: Path, capsys) -> None:  # type: ignore[no-untyped-def]
    case = Case(tp=2, core=True)
    nxd.write(case, tmp_path / "nxd", full_state(case, 0), states_of(case), STEP)
    (tmp_path / "nxd" / "done").unlink()
    assert main(["convert", str(tmp_path / "nxd"), str(tmp_path / "x"), "--to", "neuron"]) == 1
    assert "no 'done' marker" in capsys.readouterr().err
    (tmp_path / "nxd" / "done").touch()
    for tp in range(2):
        path, _ = nxd.paths(case, tmp_path / "nxd", tp, 0)
        state = {**nxd.load(path), "model.adapter.weight": torch.ones(4, 4)}
        path.unlink()
        torch.save(state, path)
    assert main(["convert", str(tmp_path / "nxd"), str(tmp_path / "x"), "--to", "neuron"]) == 1
    assert "no rule says how model.adapter.weight is cut" in capsys.readouterr().err
