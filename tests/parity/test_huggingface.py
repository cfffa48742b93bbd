"""One rank of ours against Hugging Face's model, optimizer and clipping."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers")

from tests.parity import huggingface as hf


def test_fp32_training_is_hugging_faces() -> None:
    table = hf.fp32_table()
    print(table)
    assert not hf.fp32_failures(table)
    assert float(hf.train_ours(hf.torch.float32).losses[-1]) < 4.5, "the model must have learned something"


@pytest.mark.slow  # bf16 is emulated on most hosts
def test_bf16_training_is_as_close_to_fp32_as_hugging_faces() -> None:
    table = hf.bf16_table(steps=40)  # `make test-parity` takes all 100; some processors emulate bf16, slowly
    print(table)
    assert not hf.bf16_failures(table)
    ours = table["ours, fp32 master weights"]
    assert ours["loss"] < table["Hugging Face, all bf16"]["loss"] / 5, "master weights must help"


def test_failures_are_found() -> None:
    names = ("loss, step 1", "grad norm, step 1", "loss", "grad norm", "logits, step 1")
    bad = {"ours": dict.fromkeys(names, 2e-4), "Hugging Face, all bf16": dict.fromkeys(names, 0.9e-4)}
    assert len(hf.fp32_failures(bad)) == 4
    assert len(hf.bf16_failures(bad)) == 3
