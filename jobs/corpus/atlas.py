"""`gristmill export OUT --atlas`: a job's texts, places in the plane and neighbours as Parquet, for embedding-atlas.

A record a vector, in the order in which the index numbers vectors, so that a record's place in the file is what
embedding-atlas knows it by: `neighbors` names records so. Parts stream through once to choose the vectors that are laid
out together, and once to be written.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from jobs.status import index_summary, open_job
from pipeline.commits import Commit
from pipeline.durable import storage_errors
from pipeline.errors import JobError, UserError, one_line
from pipeline.found_rows import FoundRows
from pipeline.index.search import VectorIndex, have_direction
from pipeline.index.vectors import FIELDS, VectorBatch, committed_vectors, part_vectors
from pipeline.indexed_jobs import latest_commits
from pipeline.job_folder import JobFolder
from pipeline.projection import Projection, spread
from pipeline.records import carried_names

ATLAS_NAME: Final = "atlas.parquet"
MAX_LANDMARKS: Final = 5000
NUM_NEIGHBOURS: Final = 15
_BATCH_BYTES: Final = 4 << 20  # of vectors, which are searched for together

Matrix = npt.NDArray[np.float32]

_OWN_FIELDS: Final[list[pa.Field[Any]]] = [
    pa.field("id", pa.string()),
    pa.field("row", pa.int64()),
    pa.field("sample", pa.int32()),
    pa.field("field", pa.string()),
    pa.field("text", pa.string()),
    pa.field("generation", pa.string()),
    pa.field("projection_x", pa.float32()),
    pa.field("projection_y", pa.float32()),
    pa.field("neighbors", pa.struct([("ids", pa.list_(pa.int64())), ("distances", pa.list_(pa.float32()))])),
]


@dataclass(frozen=True, slots=True, kw_only=True)
class AtlasExport:
    file: Path
    records: int
    method: str  # of the layout: t-SNE or PCA
    landmarks: int  # records that were laid out together; the others were placed among them

    @property
    def command(self) -> str:
        """Opens the file."""
        named = "--text text --x projection_x --y projection_y --neighbors neighbors"
        return f"embedding-atlas {shlex.quote(str(self.file))} {named}"

    def to_json(self) -> dict[str, Any]:
        return {
            "file": str(self.file),
            "records": self.records,
            "method": self.method,
            "landmarks": self.landmarks,
            "command": self.command,
        }

    def describe(self) -> str:
        among = "" if self.landmarks == self.records else f" of {self.landmarks:,}, the others placed among them"
        return (
            f"wrote {self.file}: {self.records:,} vectors, laid out by {self.method}{among}\nopen it:  {self.command}"
        )


def export_atlas(out: Path, file: Path | None = None) -> AtlasExport:
    """Writes `file`, or atlas.parquet in the job directory, whole or not at all.

    UserError where there is no index, or one that is older than the parts; JobError if something is damaged.
    """
    folder = open_job(out)
    commits = latest_commits(folder)
    index = VectorIndex.open(folder.index)
    summary = index_summary(folder, commits)
    if summary is None or not summary["current"]:
        raise UserError(f"{out}: its index is not of all that is committed; gristmill run brings it up to date")
    file = folder.root / ATLAS_NAME if file is None else file
    if not file.parent.is_dir():
        raise UserError(f"--output {file}: there is no folder {file.parent}")
    projection, keys = _laid_out(folder, commits, index)
    schema = _schema(folder, commits)
    unfinished = file.with_name(f"{file.name}.unfinished")
    with storage_errors("writing", file):
        try:
            with pq.ParquetWriter(unfinished, schema, compression="zstd") as writer:
                for table in _tables(folder, commits, index, projection, keys, schema):
                    writer.write_table(table)
            os.replace(unfinished, file)
        finally:
            unfinished.unlink(missing_ok=True)
    return AtlasExport(file=file, records=len(keys), method=projection.method, landmarks=len(projection.places))


def _laid_out(
    folder: JobFolder, commits: Mapping[int, Commit], index: VectorIndex
) -> tuple[Projection, npt.NDArray[np.int64]]:
    """Places of vectors spread evenly over all, and the key of every vector [n], which grow from each to the next."""
    total = sum(sum(commit.vectors.values()) for commit in commits.values())
    if not total:
        raise UserError(f"{folder.root}: no row has a vector yet")
    wanted = spread(total, MAX_LANDMARKS)
    keys, landmarks, first = np.empty(total, np.int64), [], 0
    for batch in committed_vectors(folder, commits):
        low, high = np.searchsorted(wanted, (first, first + len(batch.rows)))
        landmarks.append(batch.matrix[wanted[low:high] - first])
        keys[first : first + len(batch.rows)] = _keys(batch.rows, batch.samples, batch.fields)
        first += len(batch.rows)
    vectors = np.concatenate(landmarks)
    return Projection(vectors if index.centering is None else index.centering.apply(vectors)), keys


def _keys(rows: npt.ArrayLike, samples: npt.ArrayLike, fields: npt.ArrayLike) -> npt.NDArray[np.int64]:
    """One number for each vector that says row, sample and field, in the order of the index."""
    return (np.asarray(rows, np.int64) << 20) + (np.asarray(samples, np.int64) << 1) + np.asarray(fields, np.int64)


def _schema(folder: JobFolder, commits: Mapping[int, Commit]) -> pa.Schema:
    """Ours, then the carried columns as parts have them; what is called like one of ours is called `input_NAME`."""
    part = pq.read_schema(folder.part(min(commits)))
    carried = list(FoundRows(folder.root).carried.values())
    names = carried_names(carried, own={field.name for field in _OWN_FIELDS})
    return pa.schema([*_OWN_FIELDS, *(part.field(name).with_name(names[name]) for name in carried)])


def _tables(
    folder: JobFolder,
    commits: Mapping[int, Commit],
    index: VectorIndex,
    projection: Projection,
    keys: npt.NDArray[np.int64],
    schema: pa.Schema,
) -> Iterator[pa.Table]:
    found_rows = FoundRows(folder.root)
    for split in sorted(commits):
        records = _records(folder, split, found_rows)
        numbers = _keys(records["row"].to_numpy(), records["sample"].to_numpy(), np.zeros(len(records)))
        passages = pa.array(found_rows.passages(records), pa.string())
        for batch in part_vectors(folder, commits[split], batch_bytes=_BATCH_BYTES):
            if not len(batch.rows):
                continue
            places = np.searchsorted(numbers, _keys(batch.rows, batch.samples, np.zeros(len(batch.rows))))
            vectors = batch.matrix if index.centering is None else index.centering.apply(batch.matrix)
            where = projection.place(vectors)
            carried = [records[name].take(places) for name in found_rows.carried.values()]
            yield pa.table(
                [
                    *_texts(records, passages, batch, places),
                    pa.array(where[:, 0]),
                    pa.array(where[:, 1]),
                    _neighbours(index, batch, keys),
                    *carried,
                ],
                schema=schema,
            )


def _records(folder: JobFolder, split: int, found_rows: FoundRows) -> pa.Table:
    path = folder.part(split)
    columns = ["row", "id", "sample", "text", *found_rows.carried.values()]
    try:
        return ds.dataset(path, format="parquet").to_table(columns=columns)
    except (OSError, pa.ArrowException) as error:
        raise JobError(f"{path}: can't be read ({one_line(error)}); run verify") from error


def _texts(
    records: pa.Table, passages: pa.Array[Any], batch: VectorBatch, places: npt.NDArray[np.int64]
) -> list[pa.Array[Any] | pa.ChunkedArray[Any]]:
    """id, row, sample, field, text, generation. `text` is what was embedded; the generation stands beside a prompt."""
    generations = records["text"].take(places)
    is_generation = pa.array(batch.fields == FIELDS.index("generation"))
    return [
        records["id"].take(places),
        pa.array(batch.rows),
        pa.array(batch.samples),
        pa.array(FIELDS).take(batch.fields),
        pc.if_else(is_generation, generations, passages.take(places)),
        pc.if_else(is_generation, pa.scalar(None, pa.string()), generations),
    ]


def _neighbours(index: VectorIndex, batch: VectorBatch, keys: npt.NDArray[np.int64]) -> pa.Array[Any]:
    """The nearest vectors of each, as places in the file, and 1 - cosine; without the vector itself.

    Of an index that holds other jobs too, only this one's, which are the file's. The mean of a centred index has none.
    """
    mine = None
    if len(index.manifest.jobs) > 1:
        mine = np.arange(index.manifest.num_vectors) < index.manifest.jobs[0].num_vectors
    own = np.searchsorted(keys, _keys(batch.rows, batch.samples, batch.fields))
    asks = have_direction(batch.matrix, index.manifest, index.centering)
    answers = iter(index.search(batch.matrix[asks], NUM_NEIGHBOURS + 1, allowed=mine))
    found: list[dict[str, list[Any]]] = []
    for number, has_asked in zip(own.tolist(), asks.tolist(), strict=True):
        hits = next(answers) if has_asked else []
        near = np.searchsorted(
            keys,
            _keys(
                [hit.place.row for hit in hits],
                [hit.place.sample for hit in hits],
                [FIELDS.index(hit.place.field) for hit in hits],
            ),
        ).tolist()
        others = [(place, max(1.0 - hit.score, 0.0)) for place, hit in zip(near, hits, strict=True) if place != number]
        found.append(
            {
                "ids": [place for place, _ in others[:NUM_NEIGHBOURS]],
                "distances": [distance for _, distance in others[:NUM_NEIGHBOURS]],
            }
        )
    neighbours: pa.Array[Any] = pa.array(found, _OWN_FIELDS[-1].type)
    return neighbours
