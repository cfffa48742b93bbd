"""What counts as text, what comes out of it, and what is refused with file and line."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import pytest

from neuron_lightning.data import open_source, standard_library
from neuron_lightning.data.sources import Document
from neuron_lightning.errors import DataError


def _documents(spec: object) -> list[Document]:
    return list(open_source(spec).documents())  # type: ignore[arg-type]


def test_text_file_folder_and_glob(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.txt").write_text("second")
    (tmp_path / "sub" / "a.txt").write_text("third é")
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / ".hidden").write_bytes(b"\0")
    assert [d.name for d in _documents(tmp_path)] == ["a.txt", "b.txt", "sub/a.txt"]
    assert [d.text for d in _documents(str(tmp_path / "**" / "a.txt"))] == ["first", "third é"]
    assert [d.text for d in _documents(tmp_path / "a.txt")] == ["first"]
    assert [d.text for d in _documents([tmp_path / "b.txt", tmp_path / "a.txt"])] == ["first", "second"]


def test_json_lines(tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    file.write_text('{"text": "one", "id": 4}\n\n{"text": "zw\\u00f6lf"}\n')
    assert [(d.name, d.text, d.ends) for d in _documents(file)] == [
        ("x.jsonl:1", "one", True),
        ("x.jsonl:3", "zwölf", True),
    ]


def test_a_long_file_comes_in_pieces_of_one_document(tmp_path: Path) -> None:
    file = tmp_path / "long.txt"
    text = "ä line of text\n" * 200_000
    file.write_text(text)
    pieces = _documents(file)
    assert len(pieces) > 2
    assert "".join(p.text for p in pieces) == text
    assert [p.ends for p in pieces] == [False] * (len(pieces) - 1) + [True]
    assert sum(p.num_bytes for p in pieces) == file.stat().st_size


def test_stamp_follows_the_data(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("one")
    before = open_source(file).stamp()
    assert before == open_source(file).stamp()
    file.write_text("three")
    assert before != open_source(file).stamp()


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("empty.txt", b"", r"empty\.txt is empty \(0 bytes\)"),
        ("binary.txt", b"one\ntwo\0three", r"binary\.txt, line 2: a NUL byte"),
        ("latin.txt", b"one\n\ncaf\xe9\n", r"latin\.txt, line 3: byte 0xe9 is not valid UTF-8"),
        ("broken.jsonl", b'{"text": "a"}\n{"text": \n', r"broken\.jsonl, line 2: not JSON"),
        (
            "field.jsonl",
            b'{"content": "a", "id": 1}\n',
            r'no string field "text" \(found fields \[\'content\', \'id\'\]',
        ),
        ("number.jsonl", b'{"text": 3}\n', r'number\.jsonl, line 1: no string field "text"'),
        ("list.jsonl", b"[1]\n", r"found a list"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(DataError, match=words):
        _documents(file)


def test_a_binary_file_far_into_the_text_is_named_by_line(tmp_path: Path) -> None:
    file = tmp_path / "late.txt"
    file.write_bytes(b"text line\n" * 150_000 + b"\0")
    with pytest.raises(DataError, match="line 150001"):
        _documents(file)


def test_missing_data(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist and matches no file"):
        open_source(tmp_path / "nothing.txt")
    with pytest.raises(DataError, match="holds no file"):
        open_source(tmp_path)
    (tmp_path / "a.txt").touch()
    (tmp_path / "b.txt").touch()
    with pytest.raises(DataError, match="every file of data"):
        open_source(tmp_path)


def test_standard_library_is_ordered_capped_and_free_of_tests() -> None:
    source = standard_library(max_bytes=400_000)
    assert 200_000 < source.num_bytes <= 400_000
    assert source.root == Path(sysconfig.get_paths()["stdlib"]).resolve()
    assert list(source.files) == sorted(source.files)
    assert not [f for f in source.files if {"test", "tests", "site-packages"} & set(f.parts)]
    assert source.stamp() == standard_library(max_bytes=400_000).stamp()
    with pytest.raises(DataError, match="within 10 bytes"):
        standard_library(max_bytes=10)
