"""The corpus as points in the plane: rows spread evenly over a job, near each other where their vectors are.

Of a large job rows of MAX_PARTS parts are taken, so that a report reads little of it. n: points; d: width of a vector.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import faiss
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.dataset as ds

from pipeline.commits import Commit
from pipeline.errors import JobError, one_line
from pipeline.found_rows import FoundRow, FoundRows
from pipeline.index.faiss_files import faiss_threads
from pipeline.index.manifest import MANIFEST_NAME, read_manifest
from pipeline.index.search import read_centering
from pipeline.index.vectors import part_vectors
from pipeline.job_folder import JobFolder, read_plan
from pipeline.projection import Projection, spread

MAX_POINTS: Final = 2000
MAX_PARTS: Final = 100
MAX_GROUPS: Final = 10
MAX_FAILED: Final = 60
NUM_CLUSTERS: Final = 8
CLUSTER_POINTS: Final = 25  # on average, at least
NUM_WORDS: Final = 3  # that name a cluster
NAMING_CHARS: Final = 2000  # of a text, that are read for them

Matrix = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class MapPoint:
    x: float
    y: float
    row: int
    id: str
    group: int  # its place in CorpusMap.groups
    text: str  # that was embedded, as far as it can be built again
    generation: str | None  # where that was not embedded


@dataclass(frozen=True, slots=True, kw_only=True)
class FailedRow:
    row: int
    id: str
    code: str
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CorpusMap:
    rows: int  # that are committed, of which the points are some
    method: str  # t-SNE or PCA
    centred: bool  # on the mean that the index is centred on
    grouped_by: str  # the name of a column, or "" where groups are clusters of vectors
    groups: tuple[tuple[str, int], ...]  # (name, points), the largest first
    points: tuple[MapPoint, ...]
    failed: tuple[FailedRow, ...]  # rows that were looked at and have no vector; MAX_FAILED at most

    def summary(self) -> dict[str, Any]:
        """For report.json: all but the points and their texts."""
        return {
            "rows": self.rows,
            "points": len(self.points),
            "method": self.method,
            "centred": self.centred,
            "grouped_by": self.grouped_by or "clusters",
            "groups": [{"name": name, "points": points} for name, points in self.groups],
        }


def make_map(folder: JobFolder, commits: Mapping[int, Commit]) -> CorpusMap | None:
    """None where no row has a vector. JobError if a part can't be read."""
    first_rows = [split["first_row"] for split in read_plan(folder)["splits"]]
    wanted = _looked_at(commits, first_rows)
    rows, vectors = _vectors(folder, commits, wanted)
    if not len(rows):
        return None
    centring = None
    if (folder.index / MANIFEST_NAME).is_file():
        centring = read_centering(folder.index, read_manifest(folder.index))
    if centring is not None:
        vectors = centring.apply(vectors)
    failed = _failed(folder, commits, wanted, set(rows))
    found = FoundRows(folder.root).read([(row, 0) for row in rows])
    records = [found[row, 0] for row in rows]
    texts = [record.generation if record.passage is None else record.passage for record in records]
    grouped_by, names, group_of = group(records, texts, vectors)
    projection = Projection(vectors)
    return CorpusMap(
        rows=sum(commit.rows for commit in commits.values()),
        method=projection.method,
        centred=centring is not None,
        grouped_by=grouped_by,
        groups=tuple((name, group_of.count(number)) for number, name in enumerate(names)),
        points=tuple(
            MapPoint(
                x=x,
                y=y,
                row=record.row,
                id=_id(record.row, record.id),
                group=group_number,
                text=text or "",
                generation=record.generation if record.passage is not None else None,
            )
            for (x, y), record, group_number, text in zip(
                projection.places.tolist(), records, group_of, texts, strict=True
            )
        ),
        failed=failed,
    )


def _looked_at(commits: Mapping[int, Commit], first_rows: Sequence[int]) -> dict[int, list[int]]:
    """Split -> the rows of it to look at: MAX_POINTS in all, evenly spread over MAX_PARTS parts that are so too."""
    splits = sorted(split for split, commit in commits.items() if commit.rows)
    chosen = [splits[place] for place in _evenly(len(splits), MAX_PARTS)]
    rows = np.concatenate(
        [first_rows[split] + np.arange(commits[split].rows) for split in chosen] or [np.empty(0, int)]
    )
    kept = rows[spread(len(rows), MAX_POINTS)]
    return {
        split: [int(row) for row in kept if first_rows[split] <= row < first_rows[split] + commits[split].rows]
        for split in chosen
    }


def _evenly(length: int, count: int) -> list[int]:
    """At most `count` of the places 0 to length - 1.

    >>> _evenly(10, 3)
    [1, 5, 8]
    """
    count = min(length, count)
    return [int((2 * number + 1) * length // (2 * count)) for number in range(count)]


def _vectors(
    folder: JobFolder, commits: Mapping[int, Commit], wanted: Mapping[int, list[int]]
) -> tuple[list[int], Matrix]:
    """Those of `wanted` that have a vector, and the first that each has: [n, d]."""
    rows: list[int] = []
    matrices: list[Matrix] = []
    for split, of_split in wanted.items():
        for batch in part_vectors(folder, commits[split]):
            _, first = np.unique(batch.rows, return_index=True)
            places = first[np.isin(batch.rows[first], of_split) & (batch.samples[first] == 0)]
            rows += batch.rows[places].tolist()
            matrices.append(batch.matrix[places])
    return rows, np.concatenate(matrices) if rows else np.empty((0, 0), np.float32)


def _failed(
    folder: JobFolder, commits: Mapping[int, Commit], wanted: Mapping[int, list[int]], served: set[int]
) -> tuple[FailedRow, ...]:
    found: list[FailedRow] = []
    for split, of_split in wanted.items():
        missing = [row for row in of_split if row not in served]
        if not missing or len(found) >= MAX_FAILED or not commits[split].errors:
            continue
        path = folder.part(split)
        is_failed = ds.field("row").isin(missing) & ds.field("error_code").is_valid()
        try:
            table = ds.dataset(path, format="parquet").to_table(
                columns=["row", "id", "error_code", "error_message"], filter=is_failed
            )
        except (OSError, pa.ArrowException) as error:
            raise JobError(f"{path}: can't be read ({one_line(error)}); run verify") from error
        found += [
            FailedRow(
                row=record["row"],
                id=_id(record["row"], record["id"]),
                code=record["error_code"],
                message=record["error_message"] or "",
            )
            for record in table.to_pylist()
        ]
    return tuple(found[:MAX_FAILED])


def group(
    records: Sequence[FoundRow], texts: Sequence[str | None], vectors: Matrix
) -> tuple[str, list[str], list[int]]:
    """(column or "", the groups' names, the largest first, and the group of each point).

    By the first carried column with few values, where there is one, else by clusters of vectors, which are named after
    the words that tell them apart.
    """
    for column in records[0].columns:
        values = [record.columns[column] for record in records]
        if all(isinstance(value, str | int | None) for value in values):
            counts = Counter("none" if value is None else str(value) for value in values)
            if 2 <= len(counts) <= min(MAX_GROUPS, len(values) // 5):
                names = [name for name, _ in counts.most_common()]
                return column, names, [names.index("none" if value is None else str(value)) for value in values]
    members = _clusters(vectors)
    sizes = Counter(members)
    order = [cluster for cluster, _ in sizes.most_common()]
    words = [set(re.findall(r"[^\W\d_]{3,}", (text or "")[:NAMING_CHARS].lower())) for text in texts]
    names = _names([[words[place] for place, at in enumerate(members) if at == cluster] for cluster in order])
    return "", names, [order.index(cluster) for cluster in members]


def _clusters(vectors: Matrix) -> list[int]:
    count = min(NUM_CLUSTERS, len(vectors) // CLUSTER_POINTS)
    if count < 2:
        return [0] * len(vectors)
    kmeans = faiss.Kmeans(vectors.shape[1], count, niter=20, seed=1, spherical=True, min_points_per_centroid=1)
    with faiss_threads(1):
        kmeans.train(vectors)
        return [int(found) for found in kmeans.index.search(vectors, 1)[1][:, 0]]


def _names(clusters: Sequence[Sequence[set[str]]]) -> list[str]:
    """Each cluster's words that are commoner in it than in all. `clusters`: of each text its words."""
    if len(clusters) == 1:
        return ["all"]
    everywhere = Counter(word for texts in clusters for words in texts for word in words)
    num_texts = sum(map(len, clusters))
    names = []
    for texts in clusters:
        here = Counter(word for words in texts for word in words)
        score = {
            word: count / len(texts) * math.log(count / len(texts) / (everywhere[word] / num_texts))
            for word, count in here.items()
            if count > 1
        }
        kept: list[str] = []
        for word in sorted(score, key=lambda word: (-score[word], word)):
            if score[word] > 0 and not any(word[:5] == other[:5] for other in kept):  # method and methods say the same
                kept.append(word)
            if len(kept) == NUM_WORDS:
                break
        names.append(", ".join(kept) or "no common words")
    return names


def _id(row: int, id: str | None) -> str:
    return str(row) if id is None else id
