"""New files: the hash is that of the bytes, whenever it is taken, and takes no more memory than it may."""

from __future__ import annotations

import hashlib
import tempfile
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neuron_lightning.checkpoint import output
from neuron_lightning.checkpoint.output import HashedFile, Hasher, LocalSink

WAIT_S = 30.0


@settings(deadline=None, max_examples=100)
@given(st.lists(st.tuples(st.binary(max_size=40), st.booleans())), st.sets(st.integers(0, 8)))
def test_size_and_hash_are_those_of_the_file(pieces: list[tuple[bytes, bool]], flushes: set[int]) -> None:
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(output, "_SMALL", 8)
        patch.setattr(output, "CHUNK", 16)
        patch.setattr(output, "_FAR_BEHIND", 64)
        path = Path(folder) / "f"
        counted: list[int] = []
        with HashedFile(LocalSink(path), counted.append) as file:
            for index, (piece, stays) in enumerate(pieces):
                file.write(piece, stays=stays)
                if index in flushes:
                    file.flush()
            size, digest = file.finish()
        data = b"".join(piece for piece, _ in pieces)
        assert path.read_bytes() == data
        assert (size, sum(counted), digest) == (len(data), len(data), hashlib.sha256(data).hexdigest())


def test_memory_that_stays_is_hashed_when_the_caller_waits_for_the_disk(tmp_path: Path) -> None:
    seen: list[int] = []
    hasher = Hasher()
    data = memoryview(bytes(2 << 20))
    for _ in range(3):
        hasher.update(data, lambda: seen.append(1), stays=True)
    assert not seen
    assert hasher._thread is None
    hasher.start()
    assert hasher.close() == hashlib.sha256(bytes(6 << 20)).hexdigest()
    assert len(seen) == 3


def test_the_hash_begins_when_it_is_far_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output, "_FAR_BEHIND", 3 << 20)
    hasher, begun = Hasher(), threading.Event()
    for _ in range(2):
        hasher.update(memoryview(bytes(2 << 20)), begun.set, stays=True)
    assert begun.wait(WAIT_S)
    hasher.close()


def test_few_pieces_of_other_memory_wait() -> None:
    hasher, go, most, waiting = Hasher(), threading.Event(), [0], [0]

    def feed() -> None:
        for _ in range(3 * output._LAG):
            waiting[0] += 1
            most[0] = max(most[0], waiting[0])
            hasher.update(memoryview(bytes(2 << 20)), done)

    def done() -> None:
        go.wait(WAIT_S)
        waiting[0] -= 1

    feeder = threading.Thread(target=feed)
    feeder.start()
    feeder.join(0.5)
    assert feeder.is_alive()
    go.set()
    feeder.join(WAIT_S)
    hasher.close()
    assert waiting == [0]
    assert most[0] <= output._LAG + 2  # one that is being hashed, one that is being added


def test_a_file_that_is_given_up_is_not_hashed(tmp_path: Path) -> None:
    with HashedFile(LocalSink(tmp_path / "f")) as file:
        file.write(memoryview(bytes(4 << 20)), stays=True)
    assert file._hash._digest.hexdigest() == hashlib.sha256().hexdigest()
