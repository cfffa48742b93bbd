"""Tokenising, packing and loading, from a folder of text to batches."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from neuron_lightning.data import (
    BpeTokenizer,
    PreparedData,
    TokenDataset,
    TokenFile,
    create_pretraining_dataloader,
    open_prepared,
    prepare_pretraining_data,
    standard_library,
)
from neuron_lightning.data.prepare import is_heldout
from neuron_lightning.errors import ConfigError, DataError

_BYTES = 300_000


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def prepared(data_dir: Path) -> PreparedData:
    return prepare_pretraining_data(None, data_dir, vocab_size=512, max_bytes=_BYTES, heldout_fraction=0.2)


def test_round_trip_to_the_very_text(prepared: PreparedData) -> None:
    tokenizer = prepared.tokenizer()
    assert tokenizer is not None
    assert tokenizer.vocab_size == 512
    source = standard_library(_BYTES)
    names = [d.name for d in source.documents()]
    heldout = [d for d in source.documents() if is_heldout(d.name, 0.2)]
    assert 0 < len(heldout) < len(names)
    assert prepared.heldout is not None
    ids = prepared.heldout.tokens.tolist()
    ends = [i for i, token in enumerate(ids) if token == tokenizer.end_of_text_id]
    assert len(ends) == len(heldout)
    assert ends[-1] == len(ids) - 1
    assert tokenizer.decode(ids[: ends[0]]) == heldout[0].text
    assert prepared.train.sidecar is not None
    assert prepared.train.sidecar.num_documents == len(names) - len(heldout)
    assert prepared.train.sidecar.dtype == "uint16"


def test_end_of_text_in_a_text_is_ordinary_text(prepared: PreparedData) -> None:
    tokenizer = prepared.tokenizer()
    assert tokenizer is not None
    ids = tokenizer.encode("a<|endoftext|>b ✓")
    assert tokenizer.end_of_text_id not in ids
    assert tokenizer.decode(ids) == "a<|endoftext|>b ✓"


def test_prepared_once_and_found_again(prepared: PreparedData, data_dir: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in prepared.path.iterdir()}
    again = prepare_pretraining_data(None, data_dir, vocab_size=512, max_bytes=_BYTES, heldout_fraction=0.2)
    assert again.path == prepared.path
    assert {p: p.stat().st_mtime_ns for p in again.path.iterdir()} == before
    assert not list(data_dir.glob(".*.tmp"))


def test_the_same_corpus_gives_the_same_bytes(prepared: PreparedData, tmp_path: Path) -> None:
    again = prepare_pretraining_data(None, tmp_path, vocab_size=512, max_bytes=_BYTES, heldout_fraction=0.2)
    for name in ("tokenizer.json", "train.bin", "train.json", "heldout.bin"):
        assert (again.path / name).read_bytes() == (prepared.path / name).read_bytes()


def _prepare_in_child(
    data: Path, data_dir: Path, results: multiprocessing.SimpleQueue[tuple[int, str]]
) -> None:
    prepared = prepare_pretraining_data(data, data_dir, vocab_size=300)
    results.put((prepared.path.stat().st_ino, str(prepared.path)))


def test_several_processes_at_once_build_once(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox\n" * 2000)
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    results = context.SimpleQueue()
    children = [
        context.Process(target=_prepare_in_child, args=(text, tmp_path / "out", results)) for _ in range(3)
    ]
    for child in children:
        child.start()
    seen = {results.get() for _ in children}
    for child in children:
        child.join()
    assert len(seen) == 1


def test_a_killed_builder_leaves_nothing_that_counts(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox\n" * 2000)
    code = (
        "import os, sys, neuron_lightning.data.prepare as p\n"
        "p.pack_documents = lambda *a, **k: os.kill(os.getpid(), 9)\n"
        "p.prepare_pretraining_data(sys.argv[1], sys.argv[2], vocab_size=300)\n"
    )
    arguments = [sys.executable, "-c", code, str(text), str(tmp_path / "out")]
    assert (
        subprocess.run(arguments, env={**os.environ, "PYTHONPATH": os.getcwd()}, check=False).returncode == -9
    )
    prepared = prepare_pretraining_data(text, tmp_path / "out", vocab_size=300)
    assert len(prepared.train) > 1000
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted([".lock", prepared.path.name])


def test_a_single_document_holds_its_tail_out(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("".join(f"line {i} of the text\n" for i in range(3000)))
    prepared = prepare_pretraining_data(text, tmp_path / "out", vocab_size=300, heldout_fraction=0.1)
    train, heldout = prepared.dataset("train", 32), prepared.dataset("heldout", 32)
    assert len(train) + len(heldout) == len(prepared.train) // 32
    assert len(heldout) == round(0.1 * (len(prepared.train) // 32))
    assert heldout[0]["input_ids"].tolist() == prepared.train.tokens[len(train) * 32 :][:32].tolist()


def test_own_tokenizer(prepared: PreparedData, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("def f(x):\n    return x\n" * 100)
    own = prepare_pretraining_data(tmp_path / "a.txt", tmp_path, tokenizer=prepared.tokenizer_path)
    assert own.train.sidecar is not None
    assert prepared.train.sidecar is not None
    assert own.train.sidecar.tokenizer_digest == prepared.train.sidecar.tokenizer_digest


def test_items(prepared: PreparedData) -> None:
    dataset = prepared.dataset("train", 64)
    item = dataset[3]
    assert set(item) == {"input_ids", "labels"}
    assert item["input_ids"].dtype == torch.int64
    assert item["input_ids"].tolist() == prepared.train.tokens[192:256].tolist()
    assert torch.equal(item["input_ids"], item["labels"])
    assert len(dataset) == len(prepared.train) // 64
    with pytest.raises(IndexError):
        dataset[len(dataset)]
    masked = prepared.dataset("train", 64, attention_mask=True)[0]
    assert masked["attention_mask"].tolist() == [1] * 64
    assert len(pickle.dumps(dataset)) < 10_000


def test_loader_deals_out_the_global_batch(prepared: PreparedData) -> None:
    whole = list(create_pretraining_dataloader(prepared.path, 4, 1, 0, 5, seq_len=64))
    parts = [list(create_pretraining_dataloader(prepared.path, 2, 2, r, 5, seq_len=64)) for r in range(2)]
    assert len(whole) == len(parts[0]) == len(parts[1]) == len(prepared.train) // 64 // 4
    for batch, left, right in zip(whole, *parts, strict=True):
        both = torch.stack([left["input_ids"], right["input_ids"]], dim=1).reshape(4, 64)
        assert torch.equal(batch["input_ids"], both)


def test_batches_do_not_depend_on_workers_nor_touch_the_global_generator(prepared: PreparedData) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    alone = [b["input_ids"] for b in create_pretraining_dataloader(prepared.path, 8, 1, 0, seq_len=256)]
    assert torch.equal(before, torch.get_rng_state())
    helped = [
        b["input_ids"]
        for b in create_pretraining_dataloader(prepared.path, 8, 1, 0, seq_len=256, num_workers=1)
    ]
    assert torch.equal(torch.stack(alone), torch.stack(helped))


@pytest.mark.parametrize("dtype", ["uint16", "int32", "int64"])
def test_ready_npy(tmp_path: Path, dtype: str) -> None:
    np.save(tmp_path / "ids.npy", np.arange(1000, dtype=dtype))
    prepared = prepare_pretraining_data(tmp_path / "ids.npy")
    assert prepared.tokenizer() is None
    assert len(prepared.dataset("train", 10)) == 97
    assert prepared.dataset("heldout", 10)[0]["input_ids"].tolist() == list(range(970, 980))
    loader = create_pretraining_dataloader(tmp_path / "ids.npy", 2, 1, 0, seq_len=10, shuffle=False)
    assert next(iter(loader))["labels"][1].tolist() == list(range(10, 20))


def test_ready_bin_without_a_sidecar_is_uint16(tmp_path: Path) -> None:
    np.arange(100, dtype="<u2").tofile(tmp_path / "ids.bin")
    assert TokenFile(tmp_path / "ids.bin").tokens.tolist() == list(range(100))


def _write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def test_bad_token_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        TokenFile(tmp_path / "no.bin")
    with pytest.raises(DataError, match="empty"):
        TokenFile(_write(tmp_path / "empty.bin", b""))
    with pytest.raises(DataError, match="3 bytes, which is no whole number of uint16"):
        TokenFile(_write(tmp_path / "odd.bin", b"abc"))
    with pytest.raises(DataError, match=r"not a readable \.npy"):
        TokenFile(_write(tmp_path / "text.npy", b"hello"))
    np.save(tmp_path / "float.npy", np.zeros(4))
    with pytest.raises(DataError, match="1-dimensional array of float64"):
        TokenFile(tmp_path / "float.npy")
    np.save(tmp_path / "two.npy", np.zeros((4, 4), dtype="int64"))
    with pytest.raises(DataError, match="2-dimensional"):
        TokenFile(tmp_path / "two.npy")
    np.save(tmp_path / "object.npy", np.asarray([{}], dtype=object))
    with pytest.raises(DataError, match=r"not a readable \.npy"):
        TokenFile(tmp_path / "object.npy")


def test_truncated_file_and_bad_sidecars(tmp_path: Path) -> None:
    np.arange(100, dtype="<u2").tofile(tmp_path / "a.bin")
    sidecar = {
        "num_tokens": 101, "dtype": "uint16", "vocab_size": 300, "end_of_text_id": 0, "num_documents": 1,
        "tokenizer_digest": "", "source_digest": "", "format": 1,
    }  # fmt: skip
    (tmp_path / "a.json").write_text(json.dumps(sidecar))
    with pytest.raises(DataError, match="holds 100 ids but its sidecar says 101"):
        TokenFile(tmp_path / "a.bin")
    (tmp_path / "a.json").write_text(json.dumps({**sidecar, "format": 9}))
    with pytest.raises(DataError, match="format 9"):
        TokenFile(tmp_path / "a.bin")
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(DataError, match=r"sidecar .* cannot be read"):
        TokenFile(tmp_path / "a.bin")


def test_bad_settings(tmp_path: Path) -> None:
    np.save(tmp_path / "ids.npy", np.arange(8))
    tokens = TokenFile(tmp_path / "ids.npy")
    with pytest.raises(DataError, match="8 token ids make no sequence of 16"):
        TokenDataset(tokens, 16)
    with pytest.raises(ConfigError, match="seq_len must be at least 2"):
        TokenDataset(tokens, 1)
    with pytest.raises(ConfigError, match="vocab_size must be at least 257"):
        BpeTokenizer.train([], 256)
    with pytest.raises(ConfigError, match="heldout_fraction"):
        prepare_pretraining_data(None, tmp_path, heldout_fraction=1.5)
    with pytest.raises(ConfigError, match="max_bytes"):
        prepare_pretraining_data(tmp_path / "a.txt", tmp_path, max_bytes=10)
    with pytest.raises(ConfigError, match="unknown split 'test'"):
        open_prepared(tmp_path / "ids.npy").dataset("test", 4)
    with pytest.raises(ConfigError, match="batch_size"):
        create_pretraining_dataloader(tmp_path / "ids.npy", 0, 1, 0, seq_len=4)
    with pytest.raises(DataError, match=r"holds no train\.bin"):
        open_prepared(tmp_path)


def test_bad_tokenizers(tmp_path: Path) -> None:
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(DataError, match='it has no "model"'):
        BpeTokenizer.load(tmp_path / "list.json")
    with pytest.raises(DataError, match="cannot be read"):
        BpeTokenizer.load(tmp_path / "none.json")


def test_a_missing_tokenizers_package_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(ConfigError, match=r"neuron-lightning\[llama\]"):
        prepare_pretraining_data(tmp_path / "a.txt", tmp_path)
