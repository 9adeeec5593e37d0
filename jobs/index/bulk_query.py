"""Many queries as a job: a dataset of texts in, a Parquet dataset of their nearest rows out, resumable split by split.

OUTPUT/
  search.json       what was asked of which index, sealed
  queries/          a job directory of its own: the queries, embedded as the index's rows were
  parts/ commits/   the neighbours: a part and a commit for each split of the queries (`pipeline.neighbours`)

First the queries are embedded, by the machinery of any job; then each committed split of theirs is searched for. Killed
at any time and asked again, it goes on from the last commit.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc
import pyarrow.dataset as ds

from jobs.client import run
from jobs.index.query import allowed_vectors, embedding_spec, refuse_no_hits
from jobs.index.query_file import only_text_column
from jobs.progress import Progress
from jobs.ray_session import is_joined, ray_session
from jobs.spec import JobSpec, JsonObject
from jobs.specfile import parse_spec
from jobs.status import open_index
from jobs.tally import OnProgress
from pipeline.commits import Commit, CommitLog
from pipeline.durable import read_sealed, replace_file, seal, storage_errors
from pipeline.embedding import query_forms
from pipeline.errors import JobError, UserError
from pipeline.index.faiss_files import check_file
from pipeline.index.manifest import IndexManifest, Provenance, read_manifest
from pipeline.index.row_map import RowMap
from pipeline.index.search import best, prepare_queries, read_centering
from pipeline.index.selection import Mask
from pipeline.index.version_files import read_version
from pipeline.indexed_jobs import IndexedRows, latest_commits
from pipeline.job_folder import JobFolder, read_plan
from pipeline.locations import is_uri, locate
from pipeline.lock import lock
from pipeline.model_path import resolve_model
from pipeline.neighbours import (
    QUERIES_NAME,
    SEARCH_NAME,
    NeighbourPart,
    QueryBatch,
    digest,
    neighbour_table,
    prepared,
    query_batches,
)
from pipeline.source import Source
from workers import devices
from workers.query_embedder import refuse_changed_model
from workers.settings import DEFAULT_ENGINE

BATCH_BYTES: Final = 8 << 20  # of vectors asked for together, and of their answers
CACHE_BYTES: Final = 256 << 20  # of ids that were read

Found = tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]  # scores and vector numbers [q, k]


def bulk_query(
    out: Path,
    source: str,
    output: Path,
    *,
    k: int = 10,
    column: str | None = None,
    id_column: str | None = None,
    filter: str | None = None,
    address: str | None = None,
    on_progress: OnProgress | None = None,
    engine_factory: str = DEFAULT_ENGINE,
) -> JsonObject:
    """The k rows of the index of `out` nearest to each row of `source`, into the folder `output`; or go on with it.

    With a `filter` only among the rows that it means (see `pipeline.index.expression`).

    Gives {"output", "queries", "errors", "neighbours"}. UserError where there is no index, the model is another by now,
    k is below 1, or `output` holds another search; JobError if the index was built anew since the search began.
    """
    refuse_no_hits(k)
    source = source if is_uri(source) else locate(source).name  # what it is called from elsewhere, too
    folder = open_index(out)
    output = output.expanduser()
    manifest = read_manifest(folder.index)
    spec = embedding_spec(out, manifest)
    refuse_changed_model(manifest.provenance, resolve_model(manifest.provenance.model))
    queries = query_job(source, column, id_column, output, manifest.provenance, spec)
    target = JobFolder(output.absolute())
    settings = queries.to_json()
    asked = {
        "index": str(out.resolve()),
        "index_digest": manifest.digest,
        "k": k,
        "filter": filter,
        **{name: settings[name] for name in ("input", "prompt", "embed")},
    }
    _refuse_other(target)
    with lock(target):
        _begin(target, asked)
        joins = is_joined(address)
        allowed = allowed_vectors(out, manifest, filter)
        log = CommitLog(target, fingerprint=digest(asked))
        log.recover()
        if not _is_done(target, log):
            with ray_session(address, num_cpus=0 if joins else devices.num_cpus()):
                embedded = run(queries, on_progress=on_progress, engine_factory=engine_factory)
                _search_all(embedded.out, target, log, folder, manifest, k, allowed, on_progress)
        commits = log.commits.values()
    return {
        "output": str(output),
        "queries": sum(commit.rows for commit in commits),
        "errors": sum(commit.errors for commit in commits),
        "neighbours": neighbours(output).count_rows(filter=pc.is_valid(pc.field("rank"))),
    }


def neighbours(output: Path) -> ds.Dataset:
    """The committed neighbours, in the order of queries and ranks."""
    return ds.dataset(sorted((output / "parts").glob("*.parquet")), format="parquet")


def query_job(
    source: str, column: str | None, id_column: str | None, output: Path, made: Provenance, spec: JobSpec
) -> JobSpec:
    """The job that embeds queries as `made` says, with the engine of `spec`, whose rows are in the index."""
    try:
        vector, text = query_forms(made.pooling, made.settings)
    except ValueError as error:
        raise UserError(f"query: {error}") from None
    embed: JsonObject = {
        "pooling": vector.pooling,
        "dimensions": vector.dimensions,
        "routing_weight": vector.routing_weight,
        "passage_prompt": text.prompt,
        "query_prompt": "",
        "include_prompt": text.include_prompt,
        "echo": text.echo,
        "center": False,  # the index's own mean is taken out when it is asked
    }
    settings: JsonObject = {
        "name": QUERIES_NAME,
        "model": made.model,
        "input": {"path": source, "id": id_column},
        "embed": embed,
        "index": False,
        "output": {"path": str(output / QUERIES_NAME)},
        "engine": spec.engine.model_dump(),
        "cluster": spec.cluster.model_dump() | {"address": None},
        "limits": {"max_error_rate": 1.0},
    }
    if spec.attention is not None:
        settings["attention"] = list(spec.attention_rules)
    if made.query_template == "{{ text }}":
        settings["prompt"] = {"column": column}
    else:
        name = column or _only_text_column(source)
        embed["template"] = f"{{% set text = row[{json.dumps(name)}] %}}{made.query_template}"
    return parse_spec(settings, where="query")


def _only_text_column(source: str) -> str:
    opened = Source.open(source)
    try:
        return only_text_column(source, opened.columns)
    finally:
        opened.close()


def _refuse_other(target: JobFolder) -> None:
    """UserError where the folder holds a job, or an index without one."""
    holds_other = target.job_file.exists() or target.index.exists() or any(target.commits.glob("*"))
    if holds_other and not (target.root / SEARCH_NAME).exists():
        raise UserError(f"--output {target.root} holds something else; name another folder")


def _begin(target: JobFolder, asked: JsonObject) -> None:
    """Writes down what is asked, or once something was done of it, holds it against that."""
    path = target.root / SEARCH_NAME
    if not (any(target.commits.iterdir()) or JobFolder(target.root / QUERIES_NAME).job_file.exists()):
        with storage_errors("writing", path):
            replace_file(path, seal(asked), drafts=target.attempts)
        return
    before = read_sealed(path)
    changed = sorted(key for key in asked if before.get(key) != asked[key])
    if changed == ["index_digest"]:
        raise JobError(
            f"the index in {asked['index']} was built anew since the search in {target.root} began: name another "
            "--output, or remove this one"
        )
    if changed:
        raise UserError(
            f"--output {target.root} holds another search, with another {', '.join(changed)}; name another folder"
        )


def _is_done(target: JobFolder, log: CommitLog) -> bool:
    """Whether every split of the queries was searched for. JobError if their files are others by now."""
    queries = JobFolder(target.root / QUERIES_NAME)
    if not queries.job_file.exists():
        return False
    plan = read_plan(queries)
    Source.from_json(plan["source"]).check_unchanged()
    return len(plan["splits"]) == len(log.commits)


def _search_all(
    queries_out: Path,
    target: JobFolder,
    log: CommitLog,
    indexed: JobFolder,
    manifest: IndexManifest,
    k: int,
    allowed: Mask | None,
    on_progress: OnProgress | None,
) -> None:

    from workers.index_shard import start_shards
    from workers.serving.actor_calls import STARTING_S, await_ready, end_actors
    from workers.serving.actor_watch import Watch
    from workers.serving.shard_group import ShardGroup

    queries = JobFolder(queries_out)
    wanted = [commit for split, commit in sorted(latest_commits(queries).items()) if split not in log.commits]
    rows, centering = read_version(
        indexed.index,
        manifest,
        lambda where: (RowMap(check_file(where, manifest.rows)), read_centering(where, manifest)),
    )
    records = IndexedRows(indexed.root, manifest, cache_bytes=CACHE_BYTES)
    batch_rows = max(BATCH_BYTES // max(4 * manifest.dimension, 16 * k), 1)
    shards = start_shards(indexed.index, manifest)
    watch = Watch(shards)
    try:
        await_ready({f"shard {number}": shard for number, shard in enumerate(shards)})
        group = ShardGroup(shards, manifest.digest, patience_s=STARTING_S)
        masks = None
        if allowed is not None:
            masks = [allowed[one.first_vector :][: one.num_vectors] for one in manifest.shards]
        counter = _Counter(log, sum(commit.rows for commit in wanted), on_progress)
        with ThreadPoolExecutor(1) as ahead:  # the next queries are searched for while these are written
            for commit in wanted:
                counter.show()
                batches = (
                    prepared(batch, lambda vectors: prepare_queries(vectors, manifest, centering))
                    for batch in query_batches(queries, commit, batch_rows)
                )
                part = NeighbourPart(target, commit)
                for batch, (scores, numbers) in _answered(batches, lambda q: best(group.search(q, k, masks), k), ahead):
                    part.add(neighbour_table(batch, scores, numbers, rows, records))
                log.publish(log.commit(part.close()))
                counter.add(commit)
    finally:
        watch.close()
        end_actors(shards)


def _answered(
    batches: Iterator[QueryBatch], search: Callable[[npt.NDArray[np.float32]], Found], ahead: ThreadPoolExecutor
) -> Iterator[tuple[QueryBatch, Found]]:
    """Each batch with its answer; one is asked for in advance."""
    before = None
    for batch in batches:
        asked = ahead.submit(search, batch.vectors)
        if before is not None:
            yield before[0], before[1].result()
        before = (batch, asked)
    if before is not None:
        yield before[0], before[1].result()


class _Counter:
    """Tells how far the search is."""

    def __init__(self, log: CommitLog, rows_left: int, on_progress: OnProgress | None) -> None:
        self._at_start = self._done = sum(commit.rows for commit in log.commits.values())
        self._total = self._done + rows_left
        self._errors = sum(commit.errors for commit in log.commits.values())
        self._began_at = time.monotonic()
        self._on_progress = on_progress

    def add(self, commit: Commit) -> None:
        self._done += commit.rows
        self._errors += commit.errors
        self.show()

    def show(self) -> None:
        if self._on_progress is not None:
            self._on_progress(
                Progress(
                    phase="searching",
                    rows_done=self._done,
                    rows_total=self._total,
                    rows_at_start=self._at_start,
                    error_rows=self._errors,
                    prompt_tokens=0,
                    completion_tokens=0,
                    elapsed_s=time.monotonic() - self._began_at,
                )
            )
