"""`gristmill query`: a text or a vector -> the nearest rows of a job's index, with what was embedded and carried over.

A text is embedded as index.json says the rows were: by the same model, tokenizer and pooling, through its
`query_template`. Whatever differs is refused.
"""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from jobs.spec import JobSpec
from jobs.status import open_index
from pipeline.errors import RowError, UserError, one_line
from pipeline.found_rows import FoundRow
from pipeline.index.deletions import is_all_deleted, read_deleted
from pipeline.index.expression import Filter
from pipeline.index.manifest import IndexManifest, Provenance
from pipeline.index.matching import matching_vectors
from pipeline.index.row_map import Place
from pipeline.index.search import VectorIndex
from pipeline.index.selection import Mask
from pipeline.index.version_files import read_version
from pipeline.indexed_jobs import IndexedRows, job_folder
from pipeline.job_folder import read_job
from pipeline.model_path import resolve_model
from workers import devices
from workers.settings import DEFAULT_ENGINE, EngineSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class Hit:
    """A row near the query, of one of the index's jobs.

    `field` says what of it was embedded, and `text` is that text: None where it can't be rebuilt from the carried
    columns.
    """

    row: int
    id: str | None
    sample: int
    field: str
    score: float
    text: str | None
    columns: dict[str, Any]
    job: str


@dataclass(frozen=True, slots=True, kw_only=True)
class QueryResult:
    query: str
    hits: tuple[Hit, ...]  # best first

    def to_json(self) -> dict[str, Any]:
        return {"query": self.query, "hits": [dataclasses.asdict(hit) for hit in self.hits]}


def query_texts(out: Path, texts: Sequence[str], k: int, *, filter: str | None = None) -> list[QueryResult]:
    """The k rows nearest to each text, of those that `filter` means (see `pipeline.index.expression`).

    UserError where there is no index, the model is another than the index's, the filter is not understood, or k is
    below 1.
    """
    refuse_other_than_texts(texts)
    refuse_no_hits(k)
    index = VectorIndex.open(open_index(out).index)
    allowed = allowed_vectors(out, index.manifest, filter)
    if not texts:
        return []
    vectors = embed_queries(texts, index.manifest.provenance, embedding_spec(out, index.manifest))
    return _search(out, index, list(texts), vectors, k, allowed)


def embedding_spec(out: Path, manifest: IndexManifest) -> JobSpec:
    """Of the first of the index's jobs that has rows left, since the directory of another may be gone: it says on which
    device and in which number format queries are embedded."""
    deleted = read_version(out / "index", manifest, lambda where: read_deleted(where, manifest))
    standing = (
        job
        for job, first in zip(manifest.jobs, manifest.first_vectors, strict=True)
        if not is_all_deleted(deleted, first, job.num_vectors)
    )
    return JobSpec.model_validate(read_job(job_folder(out, next(standing, manifest.jobs[0])))["spec"])


def allowed_vectors(out: Path, manifest: IndexManifest, filter: str | None) -> Mask | None:
    """Which vectors may be found; None for all. UserError where the filter is not understood."""
    if filter is None:
        return None
    wanted = Filter.parse(filter)
    return read_version(
        out / "index",
        manifest,
        lambda where: matching_vectors(where, manifest, wanted, lambda job: job_folder(out, job)),
    )


def refuse_other_than_texts(texts: Sequence[str]) -> None:
    for text in texts:
        if not text.strip():
            raise UserError("query: the text is empty; say what to look for")
        try:
            text.encode()
        except UnicodeEncodeError:  # as of an argument that is not valid UTF-8
            raise UserError(f"query {_shown(text)}: it is not text: it holds a lone surrogate") from None


def refuse_no_hits(k: int) -> None:
    if k < 1:
        raise UserError(f"query: k {k} is not in the range k >= 1")


def query_vectors(out: Path, file: Path, k: int, *, filter: str | None = None) -> list[QueryResult]:
    """The same for vectors in a .npy file, [d] or [n, d]."""
    refuse_no_hits(k)
    index = VectorIndex.open(open_index(out).index)
    names, vectors = read_vectors(file)
    return _search(out, index, names, vectors, k, allowed_vectors(out, index.manifest, filter))


def read_vectors(file: Path) -> tuple[list[str], npt.NDArray[Any]]:
    """Vectors of a .npy file, and what each is called. UserError where it is none."""
    try:
        vectors = np.load(file, allow_pickle=False)
    except FileNotFoundError:
        raise UserError(f"--vector {file}: no such file") from None
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"--vector {file}: not a .npy file of numbers ({one_line(error)})") from None
    if not isinstance(vectors, np.ndarray):
        raise UserError(f"--vector {file}: an archive of arrays; save one array with numpy.save")
    return [str(file)] if vectors.ndim < 2 else [f"{file}[{number}]" for number in range(len(vectors))], vectors


def embed_queries(texts: Sequence[str], made: Provenance, spec: JobSpec) -> npt.NDArray[np.float32]:
    """Texts -> vectors [n, d], as `made` says. Loads the model, in this process; device and dtype are the job's."""
    from workers.query_embedder import QueryEmbedder

    engine = query_engine(made, spec, threads=devices.num_cpus(), max_sequences=min(64, len(texts)))
    return all_vectors(texts, QueryEmbedder(made, engine).embed(texts))


def query_engine(
    made: Provenance, spec: JobSpec, *, threads: int, max_sequences: int, factory: str | None = None
) -> EngineSettings:
    """The engine that embeds queries as the job embedded its rows. UserError where there is no such model."""
    return EngineSettings(
        model_path=str(resolve_model(made.model).absolute()),
        factory=factory or DEFAULT_ENGINE,
        device=spec.cluster.device,
        dtype=spec.cluster.dtype,
        threads=threads,
        max_context=None if spec.engine.max_context == "auto" else spec.engine.max_context,  # LongRoPE's factors
        max_sequences=max_sequences,
        attention=spec.attention_rules,
    )


def all_vectors(texts: Sequence[str], found: Sequence[npt.NDArray[np.float32] | RowError]) -> npt.NDArray[np.float32]:
    """[n, d]. UserError for the first text that has no vector."""
    vectors = []
    for text, one in zip(texts, found, strict=True):
        if isinstance(one, RowError):
            raise UserError(f"query {_shown(text)}: {one.message}")
        vectors.append(one)
    return np.stack(vectors)


def describe_results(results: Sequence[QueryResult]) -> str:
    """For people: a line of numbers and two lines of text a hit, which names its job where hits are of several."""
    has_several_jobs = len({hit.job for result in results for hit in result.hits}) > 1
    lines = []
    for result in results:
        lines.append(result.query)
        for hit in result.hits:
            name = f"row {hit.row}" + (f" of {hit.job}" if has_several_jobs else "")
            name += f", {hit.id}" if hit.id not in (None, str(hit.row)) else ""
            lines.append(f"  {hit.score:.4f}  {name}" + (f", sample {hit.sample}" if hit.sample else ""))
            text = hit.text if hit.text is not None else str(hit.columns or "")
            lines += textwrap.wrap(
                text, 100, initial_indent="    ", subsequent_indent="    ", max_lines=2, placeholder=" …"
            )
        if not result.hits:
            lines.append("  nothing found")
    return "\n".join(lines)


def _search(
    out: Path, index: VectorIndex, names: Sequence[str], vectors: npt.NDArray[Any], k: int, allowed: Mask | None
) -> list[QueryResult]:
    found = index.search(vectors, k, allowed=allowed)
    records = IndexedRows(out, index.manifest).read({hit.place for hits in found for hit in hits})
    return [
        QueryResult(
            query=name,
            hits=tuple(hit_of(records[hit.place.record], hit.place, hit.score) for hit in hits),
        )
        for name, hits in zip(names, found, strict=True)
    ]


def hit_of(row: FoundRow, place: Place, score: float) -> Hit:
    return Hit(
        row=row.row,
        id=row.id,
        sample=row.sample,
        field=place.field,
        score=score,
        text=row.generation if place.field == "generation" else row.passage,
        columns=row.columns,
        job=place.job,
    )


def _shown(text: str) -> str:
    return repr(textwrap.shorten(text, 40, placeholder=" …"))
