"""Text to a folder that training reads: ``tokenizer.json``, ``train.bin``, ``heldout.bin`` and their sidecars.

The folder's name carries a key of everything that went in, so a changed corpus or vocabulary is built anew
beside the old one. It is built under a file lock in a temporary folder and renamed when whole: of any number of
processes that ask at once, one builds and the others wait.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from neuron_lightning.data.atomic import exclusive
from neuron_lightning.data.corpus import standard_library
from neuron_lightning.data.dataset import TokenDataset
from neuron_lightning.data.pack import FORMAT, TokenFile, pack_documents
from neuron_lightning.data.progress import progress_bar
from neuron_lightning.data.sources import Document, TextSource, is_token_file, open_source
from neuron_lightning.data.tokenizer import BpeTokenizer
from neuron_lightning.errors import ConfigError, DataError

HELDOUT_FRACTION = 0.03
_TOKENIZER_BYTES = 200_000_000
"""Of a larger corpus, the tokenizer learns from this much at its beginning."""


@dataclass(frozen=True, kw_only=True)
class PreparedData:
    """Token ids ready to train on.

    Attributes:
        path: the folder, or the token file that the user gave.
        train: ids to train on.
        heldout: ids of the held-out documents; None where the tail of ``train`` is held out instead (a source
            of one document, or a ready token file).
        tokenizer_path: the ``tokenizer.json``, or None for ready token files.
        heldout_fraction: share that is held out.
    """

    path: Path
    train: TokenFile
    heldout: TokenFile | None
    tokenizer_path: Path | None
    heldout_fraction: float = HELDOUT_FRACTION

    def tokenizer(self) -> BpeTokenizer | None:
        """The tokenizer that made the ids, or None if nobody knows it."""
        return None if self.tokenizer_path is None else BpeTokenizer.load(self.tokenizer_path)

    def dataset(self, split: str, seq_len: int, *, attention_mask: bool = False) -> TokenDataset:
        """Fixed-length sequences of ``split`` (``train`` or ``heldout``).

        Raises:
            ConfigError: another split.
            DataError: too few ids for a single sequence.
        """
        if split not in ("train", "heldout"):
            raise ConfigError(f"unknown split {split!r}: it must be 'train' or 'heldout'.")
        if self.heldout is not None:
            tokens = self.train if split == "train" else self.heldout
            return TokenDataset(tokens, seq_len, attention_mask=attention_mask)
        cut = self._tail_start(seq_len)
        start, stop = (0, cut) if split == "train" else (cut, len(self.train))
        return TokenDataset(self.train, seq_len, start=start, stop=stop, attention_mask=attention_mask)

    def _tail_start(self, seq_len: int) -> int:
        """First id of the held-out tail, on a sequence boundary: whole sequences, at least one."""
        num_sequences = len(self.train) // seq_len
        return max(0, num_sequences - max(1, round(num_sequences * self.heldout_fraction))) * seq_len


def prepare_pretraining_data(
    data: str | Path | Sequence[str | Path] | None = None,
    data_dir: str | Path = "runs/data",
    *,
    vocab_size: int = 4096,
    heldout_fraction: float = HELDOUT_FRACTION,
    max_bytes: int | None = None,
    tokenizer: str | Path | None = None,
    show_progress: bool = True,
) -> PreparedData:
    """Tokenises and packs ``data``, or finds that this was done before.

    Any process may call it, alone or many at once; no process group is needed.

    Args:
        data: text files, a folder, a glob, JSON lines, or a ready ``.bin``/``.npy`` of token ids; None is the
            text of the running Python's standard library.
        data_dir: where prepared folders live.
        vocab_size: size of the tokenizer that is trained.
        heldout_fraction: share of the documents that is never trained on, chosen by a hash of their names.
        max_bytes: cap on the standard library's text; only for ``data=None``.
        tokenizer: a ``tokenizer.json`` to use instead of training one.
        show_progress: show bars for what takes more than two seconds.

    Raises:
        ConfigError: a setting out of range, or ``max_bytes`` with one's own data.
        DataError: the data is missing, empty, binary or malformed.
    """
    if not 0.0 < heldout_fraction < 1.0:
        raise ConfigError(f"heldout_fraction must lie between 0 and 1, not {heldout_fraction}.")
    if isinstance(data, (str, Path)) and is_token_file(Path(data)):
        return _ready_tokens(Path(data).expanduser(), tokenizer, heldout_fraction)
    if data is not None and max_bytes is not None:
        raise ConfigError("max_bytes caps the embedded corpus only: leave it out when data is given.")
    source = standard_library(max_bytes) if data is None else open_source(data)
    given = None if tokenizer is None else BpeTokenizer.load(tokenizer)
    vocabulary = f"vocab {vocab_size}" if given is None else given.digest
    key = _digest(source.stamp(), vocabulary, str(heldout_fraction), str(FORMAT))
    folder = Path(data_dir).expanduser() / f"{'python' if data is None else 'text'}-{key}"
    if not folder.is_dir():
        with exclusive(folder.parent / ".lock"):
            if not folder.is_dir():
                _build(folder, source, given, vocab_size, heldout_fraction, show_progress)
    return open_prepared(folder, heldout_fraction)


def open_prepared(path: str | Path, heldout_fraction: float = HELDOUT_FRACTION) -> PreparedData:
    """Opens a folder that :func:`prepare_pretraining_data` made, or a ready token file.

    Raises:
        DataError: it is neither.
    """
    path = Path(path).expanduser()
    if is_token_file(path):
        return _ready_tokens(path, None, heldout_fraction)
    if not (path / "train.bin").is_file():
        raise DataError(
            f"{path} holds no train.bin: give a folder that prepare_pretraining_data made (its .path), or a "
            ".bin or .npy file of token ids."
        )
    heldout = path / "heldout.bin"
    tokenizer = path / "tokenizer.json"
    return PreparedData(
        path=path,
        train=TokenFile(path / "train.bin"),
        heldout=TokenFile(heldout) if heldout.is_file() else None,
        tokenizer_path=tokenizer if tokenizer.is_file() else None,
        heldout_fraction=heldout_fraction,
    )


def is_heldout(name: str, fraction: float) -> bool:
    """Whether the document of this name is held out: a pure function of the name."""
    draw = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big")
    return draw < fraction * 2.0**64


def _ready_tokens(path: Path, tokenizer: str | Path | None, heldout_fraction: float) -> PreparedData:
    return PreparedData(
        path=path,
        train=TokenFile(path),
        heldout=None,
        tokenizer_path=None if tokenizer is None else Path(tokenizer),
        heldout_fraction=heldout_fraction,
    )


def _build(
    folder: Path,
    source: TextSource,
    given: BpeTokenizer | None,
    vocab_size: int,
    heldout_fraction: float,
    show_progress: bool,
) -> None:
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(
        temporary, ignore_errors=True
    )  # left by a process that died; the lock says that nobody works here
    temporary.mkdir(parents=True)
    try:
        tokenizer = given or BpeTokenizer.train(
            _first_bytes(_split(source, heldout_fraction, heldout=False)),
            vocab_size,
            total_bytes=min(source.num_bytes, _TOKENIZER_BYTES),
            show_progress=show_progress,
        )
        tokenizer.save(temporary / "tokenizer.json")
        with progress_bar("packing", source.num_bytes, disable=not show_progress) as bar:
            train = pack_documents(
                _split(source, heldout_fraction, heldout=False), tokenizer, temporary / "train.bin", bar=bar
            )
            if train is None:  # every document drew "held out": too few to split by document
                pack_documents(source.documents(), tokenizer, temporary / "train.bin", bar=bar)
            else:
                pack_documents(
                    _split(source, heldout_fraction, heldout=True),
                    tokenizer,
                    temporary / "heldout.bin",
                    bar=bar,
                )
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _split(source: TextSource, fraction: float, *, heldout: bool) -> Iterator[Document]:
    return (document for document in source.documents() if is_heldout(document.name, fraction) is heldout)


def _first_bytes(documents: Iterator[Document]) -> Iterator[Document]:
    total = 0
    for document in documents:
        yield document
        total += document.num_bytes
        if total >= _TOKENIZER_BYTES:
            return


def _digest(*parts: str) -> str:
    return hashlib.blake2b("\n".join(parts).encode(), digest_size=8).hexdigest()
