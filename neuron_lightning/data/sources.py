"""Where documents come from: text files, folders, globs and JSON lines, read as a stream of UTF-8 pieces."""

from __future__ import annotations

import glob
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from neuron_lightning.errors import DataError

_JSON_LINES = (".jsonl", ".ndjson")
_TOKENS = (".bin", ".npy")
_PIECE_BYTES = 1 << 20
_KINDS = "a text file, a folder of text files, a glob, JSON lines (.jsonl) or packed tokens (.bin, .npy)"


@dataclass(frozen=True)
class Document:
    """A document, or a piece of one.

    Attributes:
        name: stable name of the whole document: file, or ``file:line`` for JSON lines.
        text: its text.
        num_bytes: bytes of the source that this piece stands for (for progress).
        ends: whether the document ends here; only then an end-of-text token follows.
    """

    name: str
    text: str
    num_bytes: int
    ends: bool = True


@dataclass(frozen=True)
class TextSource:
    """A fixed, ordered list of files that hold documents.

    Attributes:
        files: the files, in the order in which they are read.
        root: names of documents are relative to it, so that they do not depend on where the data lies.
    """

    files: tuple[Path, ...]
    root: Path

    @property
    def num_bytes(self) -> int:
        """Size of all files together."""
        return sum(file.stat().st_size for file in self.files)

    def stamp(self) -> str:
        """Hexadecimal digest of every file's name, size and modification time: changes when the data does."""
        digest = hashlib.blake2b(digest_size=16)
        for file in self.files:
            stat = file.stat()
            digest.update(f"{self.name(file)}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
        return digest.hexdigest()

    def name(self, file: Path) -> str:
        """The file's name as documents carry it."""
        return file.relative_to(self.root).as_posix()

    def documents(self) -> Iterator[Document]:
        """Streams every document, in order.

        Raises:
            DataError: a file is binary, not UTF-8, not JSON lines, or lacks the ``text`` field; names file and line.
        """
        for file in self.files:
            if file.suffix in _JSON_LINES:
                yield from _json_lines(file, self.name(file))
            else:
                yield from _text(file, self.name(file))


def is_token_file(path: Path) -> bool:
    """Whether ``path`` names packed tokens rather than text."""
    return path.suffix in _TOKENS


def open_source(data: str | Path | Sequence[str | Path]) -> TextSource:
    """Finds the files behind ``data``: a file, a folder (searched recursively), a glob, or a list of these.

    Raises:
        DataError: nothing is there, or what is there is empty.
    """
    specs = [data] if isinstance(data, (str, Path)) else list(data)
    files = sorted({file.resolve() for spec in specs for file in _expand(spec)})
    if not files:
        raise DataError(f"data {data!r} names no file: give {_KINDS}.")
    for file in files:
        if file.stat().st_size == 0 and len(files) == 1:
            raise DataError(f"{file} is empty (0 bytes): training data must hold text; give {_KINDS}.")
    files = [file for file in files if file.stat().st_size > 0]
    if not files:
        raise DataError(f"every file of data {data!r} is empty (0 bytes): give {_KINDS}.")
    return TextSource(tuple(files), _common_folder(files))


def _expand(spec: str | Path) -> list[Path]:
    path = Path(spec).expanduser()
    if path.is_file():
        return [path]
    if path.is_dir():
        found = [p for p in path.rglob("*") if p.is_file() and not _hidden(p.relative_to(path))]
        if not found:
            raise DataError(f"folder {path} holds no file: put text or JSON lines files there.")
        return found
    matches = [Path(p) for p in glob.glob(str(path), recursive=True)]
    found = [p for p in matches if p.is_file()]
    if not found:
        raise DataError(f"{spec} does not exist and matches no file: give {_KINDS}.")
    return found


def _hidden(relative: Path) -> bool:
    return any(part.startswith(".") for part in relative.parts)


def _common_folder(files: Sequence[Path]) -> Path:
    common = files[0].parent
    while not all(file.is_relative_to(common) for file in files):
        common = common.parent
    return common


def _text(file: Path, name: str) -> Iterator[Document]:
    line = 1
    with file.open("rb") as stream:
        piece = _read_lines(stream.readlines(_PIECE_BYTES))
        while piece:
            following = _read_lines(stream.readlines(_PIECE_BYTES))
            yield Document(name, _decode(piece, file, line), len(piece), ends=not following)
            line += piece.count(b"\n")
            piece = following


def _read_lines(lines: list[bytes]) -> bytes:
    return b"".join(lines)


def _decode(raw: bytes, file: Path, first_line: int) -> str:
    if b"\0" in raw:
        line = first_line + raw[: raw.index(b"\0")].count(b"\n")
        raise DataError(
            f"{file}, line {line}: a NUL byte, so this is a binary file and not text; give UTF-8 text, JSON lines "
            "(.jsonl), or packed tokens named .bin or .npy."
        )
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = first_line + raw[: error.start].count(b"\n")
        raise DataError(
            f"{file}, line {line}: byte 0x{raw[error.start]:02x} is not valid UTF-8; convert the file "
            f"(for example: iconv -f LATIN1 -t UTF-8), or leave it out."
        ) from error


def _json_lines(file: Path, name: str) -> Iterator[Document]:
    with file.open("rb") as stream:
        for number, raw in enumerate(stream, start=1):
            if raw.strip():
                text = _text_field(_decode(raw, file, number), file, number)
                yield Document(f"{name}:{number}", text, len(raw))


def _text_field(line: str, file: Path, number: int) -> str:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{file}, line {number}: not JSON ({error.msg} at column {error.colno}); every line of a JSON lines "
            'file is one object such as {"text": "..."}.'
        ) from error
    if not isinstance(record, dict) or not isinstance(record.get("text"), str):
        found = f"fields {sorted(record)}" if isinstance(record, dict) else f"a {type(record).__name__}"
        raise DataError(
            f'{file}, line {number}: no string field "text" (found {found}); rename the field that holds the '
            'text to "text".'
        )
    return str(record["text"])
