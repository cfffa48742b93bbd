"""Documents to one flat file of token ids, memory-mapped when read, with a JSON sidecar beside it.

``train.bin`` holds raw little-endian ``uint16`` (or ``uint32`` from 65,536 ids on): documents one after another,
each closed by the end-of-text id. It knows no sequence length: any length can be cut from it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from neuron_lightning.data.atomic import replace_file
from neuron_lightning.data.sources import Document
from neuron_lightning.data.tokenizer import BpeTokenizer
from neuron_lightning.errors import DataError

FORMAT = 1
_BATCH_BYTES = 1 << 20
_DTYPES = ("uint16", "uint32")


@dataclass(frozen=True, kw_only=True)
class Sidecar:
    """What ``train.json`` says about ``train.bin``.

    Attributes:
        num_tokens: ids in the file.
        dtype: ``uint16`` or ``uint32``, little-endian.
        vocab_size: ids of the tokenizer; every id in the file is below it.
        end_of_text_id: the id that closes documents.
        num_documents: documents in the file.
        tokenizer_digest: see ``BpeTokenizer.digest``.
        source_digest: digest of all names and texts that went in, in order.
        format: version of this description.
    """

    num_tokens: int
    dtype: str
    vocab_size: int
    end_of_text_id: int
    num_documents: int
    tokenizer_digest: str
    source_digest: str
    format: int = FORMAT


class TokenFile:
    """A flat sequence of token ids on disk, mapped lazily and once per process (so it pickles to workers).

    Args:
        path: ``.npy`` (one-dimensional integers), or ``.bin`` with its sidecar; a ``.bin`` without one is
            taken as uint16.

    Raises:
        DataError: missing, empty, truncated, or not one-dimensional integers.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise DataError(f"token file {self.path} does not exist: prepare it first, or correct the path.")
        self.sidecar = _read_sidecar(self.path)
        self._tokens: npt.NDArray[Any] | None = None
        self._check(self.tokens)

    @property
    def tokens(self) -> npt.NDArray[Any]:
        """All ids: (num_tokens,) unsigned integers, read-only."""
        if self._tokens is None:
            self._tokens = self._map()
        return self._tokens

    def __len__(self) -> int:
        return int(self.tokens.shape[0])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_tokens": None}

    def _map(self) -> npt.NDArray[Any]:
        if self.path.suffix == ".npy":
            try:
                return np.asarray(np.load(self.path, mmap_mode="r", allow_pickle=False))
            except (ValueError, EOFError) as error:
                raise DataError(f"{self.path} is not a readable .npy array: {error}") from error
        dtype = np.dtype(self.sidecar.dtype if self.sidecar else "uint16").newbyteorder("<")
        size = self.path.stat().st_size
        if size == 0:
            raise DataError(f"token file {self.path} is empty (0 bytes): prepare it again.")
        if size % dtype.itemsize:
            raise DataError(
                f"{self.path} has {size} bytes, which is no whole number of {dtype} ids: it is truncated."
            )
        return np.memmap(self.path, dtype=dtype, mode="r")

    def _check(self, tokens: npt.NDArray[Any]) -> None:
        if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
            raise DataError(
                f"{self.path} holds a {tokens.ndim}-dimensional array of {tokens.dtype}; token files are "
                "one-dimensional integers: save ids.reshape(-1)."
            )
        if self.sidecar and len(tokens) != self.sidecar.num_tokens:
            raise DataError(
                f"{self.path} holds {len(tokens)} ids but its sidecar says {self.sidecar.num_tokens}: "
                "it is truncated or was replaced; delete both and prepare again."
            )
        if len(tokens) == 0:
            raise DataError(f"token file {self.path} holds no id: prepare it again.")


def pack_documents(
    documents: Iterable[Document], tokenizer: BpeTokenizer, path: str | Path, *, bar: Any = None
) -> TokenFile | None:
    """Encodes ``documents`` into ``path`` and its sidecar; neither exists before it is whole.

    Args:
        documents: what to encode, in order.
        tokenizer: gives the ids.
        path: a ``.bin`` path.
        bar: a tqdm bar over bytes, updated as documents are done.

    Returns:
        The file, or None if there was no document (nothing is written then).
    """
    target = Path(path)
    dtype = np.dtype(_DTYPES[0] if tokenizer.vocab_size <= 1 << 16 else _DTYPES[1]).newbyteorder("<")
    digest = hashlib.blake2b(digest_size=16)
    num_tokens = num_documents = 0
    with replace_file(target) as temporary, temporary.open("wb") as stream:
        for batch in _batches(documents):
            num_tokens += _write(stream, batch, tokenizer, dtype)
            num_documents += sum(document.ends for document in batch)
            for document in batch:
                digest.update(f"{document.name}\0{document.text}\0".encode())
            if bar is not None:
                bar.update(sum(document.num_bytes for document in batch))
    if num_tokens == 0:
        target.unlink()
        return None
    _write_sidecar(
        target,
        Sidecar(
            num_tokens=num_tokens,
            dtype=dtype.name,
            vocab_size=tokenizer.vocab_size,
            end_of_text_id=tokenizer.end_of_text_id,
            num_documents=num_documents,
            tokenizer_digest=tokenizer.digest,
            source_digest=digest.hexdigest(),
        ),
    )
    return TokenFile(target)


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += document.num_bytes
        if size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _write(stream: BinaryIO, batch: list[Document], tokenizer: BpeTokenizer, dtype: np.dtype[Any]) -> int:
    ids: list[int] = []
    for document, encoded in zip(batch, tokenizer.encode_batch([d.text for d in batch]), strict=True):
        ids.extend(encoded)
        if document.ends:
            ids.append(tokenizer.end_of_text_id)
    stream.write(np.asarray(ids, dtype=dtype).tobytes())
    return len(ids)


def _sidecar_path(path: Path) -> Path:
    return path.with_suffix(".json")


def _write_sidecar(path: Path, sidecar: Sidecar) -> None:
    with replace_file(_sidecar_path(path)) as temporary:
        temporary.write_text(json.dumps(asdict(sidecar), indent=1) + "\n", encoding="utf-8")


def _read_sidecar(path: Path) -> Sidecar | None:
    file = _sidecar_path(path)
    if path.suffix != ".bin" or not file.is_file():
        return None
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
        sidecar = Sidecar(**fields)
    except (ValueError, TypeError) as error:
        raise DataError(
            f"the sidecar {file} cannot be read ({error}): delete it and prepare again."
        ) from error
    if sidecar.format != FORMAT or sidecar.dtype not in _DTYPES:
        raise DataError(
            f"{file}: format {sidecar.format}, dtype {sidecar.dtype}; this release reads format {FORMAT} with "
            f"{' or '.join(_DTYPES)}: prepare the data again."
        )
    return sidecar
