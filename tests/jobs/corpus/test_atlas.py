"""What `gristmill export --atlas` writes is what embedding-atlas reads: texts, places, and neighbours by position."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from jobs.cli import execute
from jobs.corpus import atlas
from jobs.corpus.atlas import export_atlas
from pipeline.commits import Commit
from pipeline.index.build import build_index
from pipeline.index.growth import Addition, add_job
from pipeline.index.manifest import Provenance, read_manifest
from pipeline.index.versions import change_index
from pipeline.job_folder import JobFolder

Committed = Callable[..., tuple[JobFolder, dict[int, Commit]]]


@pytest.fixture
def indexed(committed: Committed) -> Callable[..., tuple[JobFolder, dict[int, Commit]]]:
    def make(count: int, *, center: bool = False, others: tuple[str, ...] = ()) -> tuple[JobFolder, dict[int, Commit]]:
        folder, commits = committed(count, others=others)
        provenance = Provenance(model="tiny", model_files={"model.safetensors": "aa"}, tokenizer="bb", pooling="mean")
        build_index(folder, commits, job="mapped", provenance=provenance, kind="Flat", threads=1, center=center)
        return folder, commits

    return make


def test_each_vector_has_its_text_its_columns_and_a_place(indexed: Committed, text_of: Callable[[int], str]) -> None:
    folder, _ = indexed(60)
    done = export_atlas(folder.root)
    table = pq.read_table(done.file)
    rows = [row for row in range(60) if row % 10 != 5]
    assert done.records == table.num_rows == len(rows)
    assert table["row"].to_pylist() == rows
    assert table["id"].to_pylist() == [str(row) for row in rows]
    assert table["text"].to_pylist() == table["body"].to_pylist() == [text_of(row) for row in rows]
    assert table["kind"].to_pylist() == [f"kind {row}" for row in rows]
    assert set(table["field"].to_pylist()) == {"prompt"}
    places = np.stack([table["projection_x"].to_numpy(), table["projection_y"].to_numpy()], axis=1)
    assert np.isfinite(places).all()
    assert len(np.unique(places, axis=0)) > len(rows) / 2


def test_carried_columns_that_are_called_like_others_of_the_file_get_names_of_their_own(indexed: Committed) -> None:
    folder, _ = indexed(10, others=("neighbors", "input_neighbors", "field"))
    table = pq.read_table(export_atlas(folder.root).file)
    assert table.schema.names[-5:] == ["body", "kind", "input_input_neighbors", "input_neighbors", "input_field"]
    assert set(table["input_input_neighbors"].to_pylist()) == {"neighbors"}
    assert set(table["input_neighbors"].to_pylist()) == {"input_neighbors"}


@pytest.mark.parametrize("center", [False, True])
def test_neighbours_are_positions_in_the_file_nearest_first(indexed: Committed, center: bool) -> None:
    folder, _ = indexed(60, center=center)
    table = pq.read_table(export_atlas(folder.root).file)
    for position, (row, found) in enumerate(zip(table["row"].to_pylist(), table["neighbors"].to_pylist(), strict=True)):
        assert len(found["ids"]) == len(found["distances"]) == atlas.NUM_NEIGHBOURS
        assert position not in found["ids"]
        assert found["distances"] == sorted(found["distances"])
        assert all(distance >= 0 for distance in found["distances"])
        assert all(table["row"][neighbour].as_py() % 3 == row % 3 for neighbour in found["ids"])


def test_the_mean_of_a_centred_index_has_no_neighbours(indexed: Committed) -> None:
    folder, _ = indexed(1, center=True)
    (found,) = pq.read_table(export_atlas(folder.root).file)["neighbors"].to_pylist()
    assert found == {"ids": [], "distances": []}


def test_rows_of_other_jobs_in_the_index_are_no_neighbours(indexed: Committed) -> None:
    folder, commits = indexed(60)
    before = pq.read_table(export_atlas(folder.root).file)
    others = {split: dataclasses.replace(commit, fingerprint="another") for split, commit in commits.items()}
    provenance = read_manifest(folder.index).provenance
    addition = Addition(folder=folder, path="../another", job="another", commits=others, provenance=provenance)
    change_index(folder, lambda draft, manifest: add_job(draft, manifest, addition))
    assert pq.read_table(export_atlas(folder.root).file).equals(before)


def test_more_vectors_than_landmarks_are_placed_by_their_subject(
    indexed: Committed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(atlas, "MAX_LANDMARKS", 60)
    folder, _ = indexed(200)
    done = export_atlas(folder.root)
    assert (done.records, done.landmarks, done.method) == (180, 60, "t-SNE")
    table = pq.read_table(done.file)
    places = np.stack([table["projection_x"].to_numpy(), table["projection_y"].to_numpy()], axis=1)
    distances = np.square(places[:, None] - places).sum(axis=2)
    np.fill_diagonal(distances, np.inf)
    subject = table["row"].to_numpy() % 3
    assert (subject[distances.argmin(axis=1)] == subject).mean() > 0.95


def test_the_command_says_how_to_open_the_file(
    indexed: Committed, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder, _ = indexed(20)
    file = tmp_path / "with space.parquet"
    assert execute(["export", str(folder.root), "--atlas", "--output", str(file), "--json"]) == 0
    said = json.loads(capfd.readouterr().out)
    assert said["command"] == (
        f"embedding-atlas '{file}' --text text --x projection_x --y projection_y --neighbors neighbors"
    )
    assert {"text", "projection_x", "projection_y", "neighbors"} <= set(pq.read_schema(file).names)
    assert not list(tmp_path.glob("*.unfinished"))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["OUT"], "--atlas"),
        (["OUT", "--atlas", "--output", "nowhere/x.parquet"], "nowhere"),
        (["none", "--atlas"], "none"),
    ],
)
def test_what_can_t_be_exported_is_refused_in_one_line(
    indexed: Committed, arguments: list[str], said: str, capfd: pytest.CaptureFixture[str]
) -> None:
    folder, _ = indexed(20)
    assert execute(["export", *(str(folder.root) if word == "OUT" else word for word in arguments)]) == 2
    assert said in capfd.readouterr().err


def test_without_an_index_there_are_no_neighbours_to_export(
    committed: Committed, capfd: pytest.CaptureFixture[str]
) -> None:
    folder, _ = committed(20)
    assert execute(["export", str(folder.root), "--atlas"]) == 2
    assert "no index" in capfd.readouterr().err


def test_an_index_of_other_parts_is_refused(indexed: Committed, capfd: pytest.CaptureFixture[str]) -> None:
    folder, _ = indexed(20)
    next(folder.commits.glob("000001*.json")).unlink()
    assert execute(["export", str(folder.root), "--atlas"]) == 2
    assert "gristmill run" in capfd.readouterr().err
