"""A byte-level BPE, trained locally: any UTF-8 text can be encoded, and nothing is downloaded."""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from neuron_lightning.data.atomic import replace_file
from neuron_lightning.data.progress import progress_bar
from neuron_lightning.data.sources import Document
from neuron_lightning.errors import ConfigError, DataError

END_OF_TEXT = "<|endoftext|>"
_BYTES = 256


class BpeTokenizer:
    """Text to token ids and back.

    Every byte is a token, so nothing is ever unknown. ``<|endoftext|>`` is id 0; written in a text, it is
    encoded as ordinary characters.

    Args:
        tokenizer: a ``tokenizers.Tokenizer`` (see :meth:`train` and :meth:`load`).
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._tokenizer.encode_special_tokens = True
        end = tokenizer.token_to_id(END_OF_TEXT)
        if end is None:
            raise DataError(
                f"the tokenizer has no {END_OF_TEXT} token, which separates documents: add it as a special token."
            )
        self.end_of_text_id = int(end)

    @classmethod
    def train(
        cls,
        documents: Iterable[Document],
        vocab_size: int,
        *,
        total_bytes: int = 0,
        show_progress: bool = True,
    ) -> BpeTokenizer:
        """Learns merges from ``documents``.

        Args:
            documents: the text to learn from.
            vocab_size: tokens wanted; a small text may give fewer.
            total_bytes: size of all documents, for the progress bar.
            show_progress: show a bar when it takes more than two seconds.

        Raises:
            ConfigError: ``vocab_size`` cannot even hold every byte and the special token, or the package
                ``tokenizers`` is missing.
        """
        if vocab_size <= _BYTES:
            raise ConfigError(
                f"vocab_size must be at least {_BYTES + 1} ({_BYTES} bytes and {END_OF_TEXT}), not {vocab_size}."
            )
        lib = _tokenizers()
        tokenizer = lib.Tokenizer(lib.models.BPE())
        tokenizer.pre_tokenizer = lib.pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = lib.decoders.ByteLevel()
        trainer = lib.trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=sorted(lib.pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        with progress_bar("training the tokenizer", total_bytes, disable=not show_progress) as bar:
            tokenizer.train_from_iterator(_texts(documents, bar), trainer)
        return cls(tokenizer)

    @classmethod
    def load(cls, path: str | Path) -> BpeTokenizer:
        """Reads a ``tokenizer.json``.

        Raises:
            DataError: the file is missing, not a tokenizer, or has no end-of-text token.
        """
        file = Path(path)
        lib = _tokenizers()
        try:
            text = file.read_text(encoding="utf-8")
            fields = json.loads(text)
        except (OSError, ValueError) as error:
            raise DataError(
                f"the tokenizer {file} cannot be read ({error}): give a tokenizer.json."
            ) from error
        if not isinstance(fields, dict) or "model" not in fields:
            raise DataError(f'{file} is no tokenizer.json of the tokenizers package: it has no "model".')
        return cls(lib.Tokenizer.from_str(text))

    @property
    def vocab_size(self) -> int:
        """Number of ids, special tokens included."""
        return int(self._tokenizer.get_vocab_size())

    @property
    def digest(self) -> str:
        """Hexadecimal digest of the tokenizer's whole definition."""
        return hashlib.blake2b(self._tokenizer.to_str().encode(), digest_size=16).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``; no end-of-text token is added."""
        return list(self._tokenizer.encode(text).ids)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of several texts at once, on several threads."""
        return [encoding.ids for encoding in self._tokenizer.encode_batch(list(texts))]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ``ids``; end-of-text tokens are left out, incomplete UTF-8 becomes U+FFFD."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))

    def save(self, path: str | Path) -> None:
        """Writes a ``tokenizer.json`` that ``transformers.PreTrainedTokenizerFast(tokenizer_file=…)`` reads too."""
        with replace_file(Path(path)) as temporary:
            temporary.write_text(self._tokenizer.to_str(pretty=True), encoding="utf-8")


def _texts(documents: Iterable[Document], bar: Any) -> Iterator[str]:
    for document in documents:
        yield document.text
        bar.update(document.num_bytes)


def _tokenizers() -> Any:
    try:
        library = importlib.import_module("tokenizers")
    except ImportError as error:
        raise ConfigError(
            "tokenising text needs the package tokenizers, which is not installed: install the extra, "
            "pip install 'neuron-lightning[llama]', or pass ready token files (.bin, .npy) as data."
        ) from error
    for module in ("decoders", "models", "pre_tokenizers", "trainers"):
        importlib.import_module(f"tokenizers.{module}")
    return library
