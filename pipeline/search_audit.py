"""`gristmill verify` of what `query --output` has made: every query answered once, every byte as it was committed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.audit import Audit, Auditor, audit
from pipeline.commits import Commit
from pipeline.durable import read_sealed
from pipeline.errors import JobError, one_line
from pipeline.job_folder import JobFolder, PlannedSplit, parse_splits, read_plan
from pipeline.neighbours import QUERIES_NAME, SCHEMA, SEARCH_NAME, digest


class SearchAuditor(Auditor):
    """What was asked, the job of the queries, and the neighbours, of which each split of the queries has a part."""

    def run(self) -> Audit:
        self._note_holder()
        asked = self._asked()
        splits = self._splits()
        latest, older = self._commits(None if asked is None else {"fingerprint": digest(asked)}, splits)
        self._k = asked.get("k") if asked is not None else None
        self._neighbours = 0
        self._parts(latest, older)
        return self._found(splits, latest, neighbours=self._neighbours)

    def _asked(self) -> dict[str, Any] | None:
        try:
            return read_sealed(self._folder.root / SEARCH_NAME)
        except JobError as error:
            self._problems.append(str(error))
            return None

    def _splits(self) -> list[PlannedSplit] | None:
        queries = JobFolder(self._folder.root / QUERIES_NAME)
        if not queries.job_file.exists() and not any(self._folder.commits.glob("*")):
            self._pending.append("the queries are not embedded yet")
            return None
        found = audit(queries.root)
        self._problems.extend(found.problems)
        self._pending.extend(found.pending)
        try:
            return parse_splits(read_plan(queries)["splits"])
        except (JobError, KeyError, TypeError, ValueError):
            return None  # of which the audit of the queries has said something

    def _part_problems(self, path: Path, commit: Commit) -> Iterator[str]:
        try:
            with pq.ParquetFile(path) as file:
                if not file.schema_arrow.equals(SCHEMA):
                    yield f"its columns are {', '.join(file.schema_arrow.names)}, not those of neighbours"
                    return
                table = file.read(columns=["query_row", "rank", "score", "row", "error_code"])
        except (pa.ArrowException, OSError) as error:
            yield f"can't be read: {one_line(error)}"
            return
        self._neighbours += len(table) - table["rank"].null_count
        yield from _record_problems(table, commit, self._k)


def _record_problems(table: pa.Table, commit: Commit, k: int | None) -> Iterator[str]:
    if len(table) != commit.records:
        yield f"it holds {len(table)} records, and its commit says {commit.records}"
    rows = table["query_row"].to_numpy()
    expected = np.arange(commit.first_row, commit.first_row + commit.rows)
    found, firsts, counts = np.unique(rows, return_index=True, return_counts=True)
    if (np.diff(rows) < 0).any() or not np.array_equal(found, expected):
        yield f"it does not answer queries {expected[0]} to {expected[-1]}, each once and in order"
        return
    ranks: npt.NDArray[np.float64] = table["rank"].to_numpy()  # NaN where null
    is_hit = table["rank"].is_valid().to_numpy()
    places = np.arange(len(rows)) - np.repeat(firsts, counts) + 1  # of each record among its query's, from 1
    wrong = is_hit & (ranks != places)
    wrong |= ~is_hit & (np.repeat(counts, counts) > 1)  # a query without an answer has one record
    wrong |= is_hit & ~(table["row"].is_valid().to_numpy() & table["score"].is_valid().to_numpy())
    wrong |= is_hit & table["error_code"].is_valid().to_numpy()
    scores = np.nan_to_num(table["score"].to_numpy().astype(np.float64), nan=-np.inf)
    wrong[1:] |= (places[1:] > 1) & (scores[1:] > scores[:-1])
    if k is not None:
        wrong |= places > k
    if wrong.any():
        yield f"the neighbours of query {rows[np.argmax(wrong)]} are not {'the best' if k is None else k}, best first"
    codes = Counter(table["error_code"].drop_null().to_pylist())
    if dict(codes) != dict(commit.error_codes) or codes.total() != commit.errors:
        yield f"it holds the errors {dict(codes)}, and its commit says {dict(commit.error_codes)}"
