"""What is asked of an index in this process, up to where the model would be loaded."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from jobs.cli import execute
from jobs.client import JobResult
from jobs.index.index_commands import delete_from_index
from jobs.index.query import allowed_vectors, embedding_spec
from pipeline.errors import JobError, UserError
from pipeline.index.manifest import read_manifest
from pipeline.job_folder import JobFolder

MadeIndex = Callable[..., JobFolder]


def test_no_texts_have_no_answers_and_what_is_asked_is_checked_all_the_same(made_index: MadeIndex) -> None:
    result = JobResult(out=made_index(["a", "b"]).root, report={})
    assert result.search([]) == []
    with pytest.raises(UserError, match="no column 'keys'"):
        result.search([], filter="keys == 'a'")
    for k in (0, -1):
        with pytest.raises(UserError, match=rf"^query: k {k} is not in the range k >= 1$"):
            result.search(["a"], k=k)


@pytest.mark.parametrize("address", [[], ["--address", "192.0.2.1:6379"]])
def test_a_text_that_is_not_valid_utf_8_is_refused_before_a_model_is_loaded_or_ray_is_joined(
    made_index: MadeIndex, address: list[str], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobs.index.query.embed_queries", lambda *_: pytest.fail("the model is loaded"))
    monkeypatch.setattr("jobs.index.served.ray_session", lambda *_, **__: pytest.fail("Ray is joined"))
    out = str(made_index(["a"]).root)
    assert execute(["query", out, "good", "b\udcffd", *address]) == 2
    assert capfd.readouterr().err == "gristmill: query 'b\\udcffd': it is not text: it holds a lone surrogate\n"


def test_what_was_opened_before_a_change_is_asked_by_its_own_files(made_index: MadeIndex) -> None:
    folder = made_index(["a", "b", "c"])
    delete_from_index(folder.root, ids=["a"])
    manifest = read_manifest(folder.index)
    delete_from_index(folder.root, ids=["b"])
    allowed = allowed_vectors(folder.root, manifest, "key != 'c'")
    assert allowed is not None
    assert allowed.tolist() == [True, True, False]
    assert embedding_spec(folder.root, manifest).name == "out"
    delete_from_index(folder.root, ids=["c"])
    for ask in (
        lambda: allowed_vectors(folder.root, manifest, "key != 'c'"),
        lambda: embedding_spec(folder.root, manifest),
    ):
        with pytest.raises(
            JobError, match=r"^version 2 of the index in .* is not there any more; ask again in a moment$"
        ):
            ask()


def test_a_damaged_file_is_called_damaged(made_index: MadeIndex) -> None:
    folder = made_index(["a", "b"])
    delete_from_index(folder.root, ids=["a"])
    (folder.index / "deleted.parquet").write_bytes(b"PAR1")
    with pytest.raises(JobError, match="is damaged"):
        allowed_vectors(folder.root, read_manifest(folder.index), "key != 'c'")
