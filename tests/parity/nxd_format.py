"""NxD's checkpoints by their published format, in code of its own: nothing here uses this package.

What was followed: the folder of ``neuronx_distributed.parallel_layers.checkpointing.save`` (NxD Lightning) and that of
``neuronx_distributed.trainer.checkpoint.save_checkpoint``; ``torch_xla.utils.serialization`` (xser); the state dict of
``torch_xla.distributed.zero_redundancy_optimizer``; the Llama of NxD's examples, and how its checkpoint converter cuts
a full model: key-value heads tiled, query heads and output columns permuted to meet them.

A full model is a dictionary under Hugging Face's names; the optimizer's state is one such dictionary for each key.
"""

from __future__ import annotations

import contextlib
import re
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Full = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """A layout, and the model's head counts."""

    tp: int
    dp: int = 1
    zero1: bool = False
    xser: bool = True
    core: bool = False
    fused_qkv: bool = True
    masters: bool = False
    q_heads: int = 8
    kv_heads: int = 2
    head_dim: int = 4
    layers: int = 2
    blocked: bool = False

    @property
    def repeats(self) -> int:
        """``kv_size_multiplier``."""
        return max(1, self.tp // self.kv_heads)


class TensorReference:
    """Stands for ``torch_xla.utils.serialization.TensorReference``."""

    def __init__(self, tid: int) -> None:
        self.tid = tid


@contextlib.contextmanager
def torch_xla_stub() -> Iterator[None]:
    """Lets pickle find the class under torch_xla's name, as where torch_xla is installed."""
    names = ("torch_xla", "torch_xla.utils", "torch_xla.utils.serialization")
    before = {name: sys.modules.get(name) for name in names}
    for name in names:
        sys.modules[name] = types.ModuleType(name)
    sys.modules[names[2]].TensorReference = TensorReference  # type: ignore[attr-defined]
    module, TensorReference.__module__ = TensorReference.__module__, names[2]
    try:
        yield
    finally:
        TensorReference.__module__ = module
        for name, found in before.items():
            if found is None:
                del sys.modules[name]
            else:
                sys.modules[name] = found


# -- cutting -----------------------------------------------------------------------------------------------------


def query_order(case: Case) -> list[int]:
    """Blocks of query heads in the order of the ranks, by the converter's rules for trn1 and (blocked) trn2."""
    if case.blocked:
        return list(range(case.tp))
    first_of_head = torch.arange(case.kv_heads) * case.tp // case.kv_heads
    if case.tp <= case.kv_heads:
        return list(range(case.tp))
    return torch.cat([first_of_head + i for i in range(case.tp // case.kv_heads)]).tolist()


def repeated(case: Case, t: Tensor) -> Tensor:
    """Key-value heads as often as they are held: one after the other all together, or (blocked) each by itself."""
    if not case.blocked:
        return torch.cat([t] * case.repeats)
    return t.unflatten(0, (case.kv_heads, case.head_dim)).repeat_interleave(case.repeats, 0).flatten(0, 1)


def cut(case: Case, full: Full, rank: int) -> Full:
    """A rank's state dict, in the order of the model, under the names of a LightningModule that holds it as ``model``."""
    rows = lambda t: t.chunk(case.tp, 0)[rank]
    columns = lambda t: t.chunk(case.tp, 1)[rank]
    queries = lambda t: t.chunk(case.tp, 0)[query_order(case)[rank]]
    keys = lambda t: repeated(case, t).chunk(case.tp, 0)[rank]
    local: Full = {"model.embed_tokens.weight": rows(full["model.embed_tokens.weight"])}
    for i in range(case.layers):
        layer = f"model.layers.{i}"
        q, k, v = (full[f"{layer}.self_attn.{x}_proj.weight"] for x in "qkv")
        attention = f"{layer}.self_attn.qkv_proj.weight_"
        if case.fused_qkv:
            local[attention + "qkv"] = torch.cat([queries(q), keys(k), keys(v)])
        else:
            local |= {attention + "q": queries(q), attention + "k": keys(k), attention + "v": keys(v)}
        output = full[f"{layer}.self_attn.o_proj.weight"]
        local[f"{layer}.self_attn.o_proj.weight"] = output.chunk(case.tp, 1)[query_order(case)[rank]]
        gate, up = full[f"{layer}.mlp.gate_proj.weight"], full[f"{layer}.mlp.up_proj.weight"]
        local[f"{layer}.mlp.gate_up_proj.weight"] = torch.cat([rows(gate), rows(up)])
        local[f"{layer}.mlp.down_proj.weight"] = columns(full[f"{layer}.mlp.down_proj.weight"])
        for norm in ("input_layernorm", "post_attention_layernorm"):
            local[f"{layer}.{norm}.weight"] = full[f"{layer}.{norm}.weight"]
    local["model.norm.weight"] = full["model.norm.weight"]
    local["lm_head.weight"] = rows(full["lm_head.weight"])
    return {f"model.{name}": tensor.clone() for name, tensor in local.items()}


def join(case: Case, ranks: list[Full]) -> Full:
    """The full model from all ranks' state dicts: the inverse of :func:`cut`, written down the other way round."""
    full: Full = {}
    place = {block: rank for rank, block in enumerate(query_order(case))}
    ordered = [ranks[place[block]] for block in range(case.tp)]
    distinct = ranks[:: case.repeats] if case.blocked else ranks[: case.tp // case.repeats]
    q_rows, kv_rows = (
        case.q_heads * case.head_dim // case.tp,
        case.kv_heads * case.repeats * case.head_dim // case.tp,
    )
    for name in ranks[0]:
        hf = name.removeprefix("model.")
        stem = hf.rpartition("qkv_proj.")[0]
        if hf.endswith("weight_qkv"):
            sizes = [q_rows, kv_rows, kv_rows]
            full[f"{stem}q_proj.weight"] = torch.cat([r[name].split(sizes)[0] for r in ordered])
            full[f"{stem}k_proj.weight"] = torch.cat([r[name].split(sizes)[1] for r in distinct])
            full[f"{stem}v_proj.weight"] = torch.cat([r[name].split(sizes)[2] for r in distinct])
        elif hf.endswith("weight_q"):
            full[f"{stem}q_proj.weight"] = torch.cat([r[name] for r in ordered])
        elif found := re.search(r"weight_([kv])$", hf):
            full[f"{stem}{found[1]}_proj.weight"] = torch.cat([r[name] for r in distinct])
        elif hf.endswith("o_proj.weight"):
            full[hf] = torch.cat([r[name] for r in ordered], 1)
        elif "gate_up_proj" in hf:
            halves = [r[name].chunk(2) for r in ranks]
            full[hf.replace("gate_up", "gate")] = torch.cat([h[0] for h in halves])
            full[hf.replace("gate_up", "up")] = torch.cat([h[1] for h in halves])
        elif "down_proj" in hf:
            full[hf] = torch.cat([r[name] for r in ranks], 1)
        elif "norm" in hf:
            full[hf] = ranks[0][name]
        else:
            full[hf] = torch.cat([r[name] for r in ranks])
    return full


# -- optimizer ---------------------------------------------------------------------------------------------------


def grouped(names: list[str]) -> list[list[str]]:
    """Parameters with weight decay, and without."""
    exempt = [n for n in names if "norm" in n]
    return [[n for n in names if n not in exempt], exempt]


def shard(case: Case, tensor: Tensor, dp: int) -> Tensor:
    """A data-parallel rank's rows, padded so that all have equally many."""
    missing = -tensor.shape[0] % case.dp
    padded = F.pad(tensor, [0, 0] * (tensor.dim() - 1) + [0, missing])
    return padded.chunk(case.dp)[dp].clone()


def optimizer_state(case: Case, states: dict[str, Full], rank: int, dp: int, step: int) -> dict[str, Any]:
    """A rank's optimizer state dict: torch's own, or the ZeRO-1 optimizer's."""
    local = {key: cut(case, full, rank) for key, full in states.items()}
    names = [name for group in grouped(list(local["exp_avg"])) for name in group]
    sizes = [len(group) for group in grouped(names)]
    starts = [0, sizes[0]]
    groups = [
        {
            "params": list(range(start, start + size)),
            "lr": 0.01,
            "betas": (0.9, 0.95),
            "eps": 1e-8,
            "weight_decay": decay,
        }
        for start, size, decay in zip(starts, sizes, (0.1, 0.0), strict=True)
    ]
    moments = {
        i: {"step": torch.tensor(float(step)), **{k: local[k][name] for k in ("exp_avg", "exp_avg_sq")}}
        for i, name in enumerate(names)
    }
    if not case.zero1:
        return {"state": moments, "param_groups": groups}
    for state in moments.values():
        state.update({k: shard(case, state[k], dp) for k in ("exp_avg", "exp_avg_sq")})
    found = {
        "state": {},
        "param_groups": groups,
        "base_state": moments,
        "shape_info": {i: local["exp_avg"][name].shape for i, name in enumerate(names)},
    }
    if case.masters:
        found["sharded_master_weights"] = {
            i: shard(case, local["master"][n], dp) for i, n in enumerate(names)
        }
    return found


def joined_optimizer(
    case: Case, states: list[list[dict[str, Any]]], model: Full
) -> tuple[dict[str, Full], int]:
    """Full optimizer state from the dictionaries of all ranks (by tensor- and data-parallel rank), and its step."""
    names = [name for group in grouped(list(model)) for name in group]
    by_key: dict[str, list[Full]] = {}
    for shards in states:
        local: dict[str, Full] = {}
        for number, name in enumerate(names):
            if case.zero1:
                rows = shards[0]["shape_info"][number][0]
                for key in ("exp_avg", "exp_avg_sq"):
                    joined = torch.cat([s["base_state"][number][key] for s in shards])[:rows]
                    local.setdefault(key, {})[name] = joined
                if case.masters:
                    masters = [s["sharded_master_weights"][number] for s in shards]
                    local.setdefault("master", {})[name] = torch.cat(masters)[:rows]
            else:
                for key in ("exp_avg", "exp_avg_sq"):
                    local.setdefault(key, {})[name] = shards[0]["state"][number][key]
        for key, found in local.items():
            by_key.setdefault(key, []).append({name: found[name] for name in model})
    first = states[0][0]["base_state" if case.zero1 else "state"]
    return {key: join(case, ranks) for key, ranks in by_key.items()}, int(first[0]["step"])


# -- files -------------------------------------------------------------------------------------------------------


def save(case: Case, value: Any, path: Path) -> None:
    """One rank's file, with xser or without."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not case.xser:
        torch.save(value, path)
        return
    tensors = Path(f"{path}.tensors")
    tensors.mkdir()
    info: dict[int, dict[str, Any]] = {}

    def rewritten(item: Any) -> Any:
        if isinstance(item, Tensor):
            number = len(info)
            info[number] = {"dtype": item.dtype, "shape": item.shape, "expert_model_parallel": False}
            torch.save(item, tensors / f"tensor_{number}.pt")
            return TensorReference(number)
        if isinstance(item, dict):
            return {key: rewritten(inner) for key, inner in item.items()}
        return [rewritten(inner) for inner in item] if isinstance(item, list) else item

    with torch_xla_stub():
        torch.save(rewritten(value), path)
    if case.core:
        torch.save(info, f"{path}.info.pt")


def load(path: Path) -> Any:
    """What a rank's file holds, as torch_xla's own loader returns it."""
    with torch_xla_stub():
        value = torch.load(path, weights_only=False)

    def resolved(item: Any) -> Any:
        if isinstance(item, TensorReference):
            return torch.load(Path(f"{path}.tensors") / f"tensor_{item.tid}.pt")
        if isinstance(item, dict):
            return {key: resolved(inner) for key, inner in item.items()}
        return [resolved(inner) for inner in item] if isinstance(item, list) else item

    return resolved(value)


def paths(case: Case, folder: Path, tp: int, dp: int) -> tuple[Path, Path]:
    """Where a rank's weights and optimizer state are; in NxD Lightning's folder that is one file."""
    if case.core:
        name = f"tp_rank_{tp:02d}_pp_rank_00.pt"
        return folder / "model" / f"dp_rank_00_{name}", folder / "optim" / f"dp_rank_{dp:02d}_{name}"
    name = f"tp_rank_{tp:02d}_pp_rank_00" + (f"_dp_rank_{dp:02d}" if case.zero1 else "")
    path = folder / name if case.xser else folder / name / "checkpoint.pt"
    return path, path


def write(case: Case, folder: Path, model: Full, states: dict[str, Full], step: int) -> None:
    """Writes the checkpoint of a training."""
    for tp in range(case.tp):
        for dp in range(case.dp if case.zero1 else 1):
            weights, optim = paths(case, folder, tp, dp)
            state = optimizer_state(case, states, tp, dp, step)
            if case.core:
                if dp == 0:
                    save(case, cut(case, model, tp), weights)
                save(case, state, optim)
            else:
                document = {
                    "epoch": 0,
                    "global_step": step,
                    "pytorch-lightning_version": "2.4.0",
                    "state_dict": cut(case, model, tp),
                    "loops": {},
                    "callbacks": {},
                    "optimizer_states": [state],
                    "lr_schedulers": [{"last_epoch": step}],
                }
                save(case, document, weights)
    if case.core:
        torch.save({"global_step": step}, folder / "user_content.pt")
        torch.save({"last_epoch": step}, folder / "scheduler.pt")
        for marker in ("checkpoint", "done"):
            (folder / marker).write_text("1", encoding="ascii")


def read(case: Case, folder: Path) -> tuple[Full, dict[str, Full], int]:
    """The full model, the full optimizer state by key, and its step."""
    models, optims = [], []
    for tp in range(case.tp):
        files = [paths(case, folder, tp, dp) for dp in range(case.dp if case.zero1 else 1)]
        weights = load(files[0][0])
        models.append(weights if case.core else weights["state_dict"])
        optims.append([load(f[1]) if case.core else load(f[1])["optimizer_states"][0] for f in files])
    states, step = joined_optimizer(case, optims, models[0])
    return join(case, models), states, step
