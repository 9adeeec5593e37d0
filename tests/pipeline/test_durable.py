"""Sealed documents notice any change; files and folders are replaced whole or not at all."""

from __future__ import annotations

import errno
import itertools
import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import durable
from pipeline.durable import HashedFile, file_sha256, replace_file, replace_folder, seal, storage_errors, unseal
from pipeline.errors import JobError

scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
values = st.recursive(scalars, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=10)
documents = st.dictionaries(st.text().filter(lambda key: key != "checksum"), values, max_size=5)


@settings(max_examples=50, deadline=None)
@given(documents)
def test_a_sealed_document_is_json_and_comes_back_as_it_was(document: dict[str, Any]) -> None:
    sealed = seal(document)
    assert unseal(sealed, Path("x.json")) == document
    assert {**document, "checksum": json.loads(sealed)["checksum"]} == json.loads(sealed)


@settings(max_examples=50, deadline=None)
@given(documents, st.data())
def test_any_change_to_a_sealed_document_is_noticed(document: dict[str, Any], data: st.DataObject) -> None:
    sealed = seal(document)
    place = data.draw(st.integers(0, len(sealed)))
    removed = data.draw(st.integers(0, 3))
    added = data.draw(st.binary(max_size=3))
    changed = sealed[:place] + added + sealed[place + removed :]
    if changed != sealed:
        with pytest.raises(JobError, match=r"x\.json is damaged"):
            unseal(changed, Path("x.json"))


@pytest.mark.parametrize(
    "content",
    [b"", b"null", b"[1]", b"{}", b"\xff", b'{"checksum": 1}\n', b"[" * 100_000, b'{"x": 1e999, "checksum": ""}'],
)
def test_what_was_never_sealed_is_refused(content: bytes) -> None:
    with pytest.raises(JobError, match="damaged"):
        unseal(content, Path("x.json"))


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (errno.ENOSPC, "no space left"),
        (errno.EDQUOT, "quota"),
        (errno.EROFS, "read-only"),
        (errno.EACCES, "permission denied"),
        (errno.EIO, "Input/output error"),
    ],
)
def test_storage_that_fails_says_what_where_and_how_to_mend(number: int, expected: str) -> None:
    line = rf"^writing /out/x failed: .*{expected}"
    with pytest.raises(JobError, match=line) as caught, storage_errors("writing", Path("/out/x")):
        raise OSError(number, os.strerror(number))
    assert "\n" not in str(caught.value)


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path, filesystem: Any) -> None:
    (tmp_path / "drafts").mkdir()
    for step in itertools.count():
        path = tmp_path / str(step)
        path.write_bytes(b"old")
        with filesystem.dies_at(step):
            replace_file(path, b"new and longer", drafts=tmp_path / "drafts")
        assert path.read_bytes() in (b"old", b"new and longer")
        if not filesystem.died:
            break
    assert path.read_bytes() == b"new and longer"
    assert step > 4


def test_a_hashed_file_that_fails_is_removed(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), HashedFile(tmp_path / "x") as file:
        file.write(bytes(1 // 0))
    assert list(tmp_path.iterdir()) == []


def test_the_disk_begins_with_a_hashed_file_while_more_of_it_comes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = list[tuple[int, int]]()
    real = durable._begin_writing
    monkeypatch.setattr(durable, "_FLUSHED_BYTES", 4)
    monkeypatch.setattr(durable, "_begin_writing", lambda handle, *span: (begun.append(span), real(handle, *span)))
    with HashedFile(tmp_path / "file") as file:
        for piece in (b"abc", b"def", b"g", b"hijklmnop", b"q"):
            file.write(piece)
    assert begun == [(0, 6), (6, 10)]
    assert (tmp_path / "file").read_bytes() == b"abcdefghijklmnopq"
    assert file.sha256 == file_sha256(tmp_path / "file")


def test_writes_that_the_system_cuts_short_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda handle, content: write(handle, content[:3]))
    with HashedFile(tmp_path / "x") as file:
        file.write(b"abcdefgh")
    assert (tmp_path / "x").read_bytes() == b"abcdefgh"
    assert file.sha256 == file_sha256(tmp_path / "x")
    assert file.size_bytes == 8


@pytest.mark.parametrize("exchange", [True, False])
@pytest.mark.parametrize("there", [True, False])
def test_a_folder_takes_the_place_of_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool, there: bool
) -> None:
    if not exchange:
        monkeypatch.setattr(durable, "_exchange", lambda one, other: False)
    new, target, aside = tmp_path / "new", tmp_path / "target", tmp_path / "aside"
    new.mkdir()
    (new / "new").write_text("")
    if there:
        target.mkdir()
        (target / "old").write_text("")
    replace_folder(new, target, aside=aside)
    assert os.listdir(tmp_path) == ["target"]
    assert os.listdir(target) == ["new"]


def test_two_folders_are_exchanged_in_one_step_where_the_system_can(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "1").write_text("")
    (tmp_path / "other").mkdir()
    assert not durable._exchange(tmp_path / "one", tmp_path / "missing")
    if durable._exchange(tmp_path / "one", tmp_path / "other"):
        assert os.listdir(tmp_path / "other") == ["1"]
    assert sorted(os.listdir(tmp_path)) == ["one", "other"]
