"""What happened, for programs (report.json) and for people (report.html).

Everything about rows is counted from the committed parts, so that a report is right whoever died on the way; only how
fast it went, and what experts did, comes from what runs kept meanwhile (runs.json, experts.json).
"""

from __future__ import annotations

import json
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import yaml

from jobs.corpus.corpus_map import CorpusMap, make_map
from jobs.experts.expert_record import read_experts
from jobs.experts.expert_report import describe_experts
from jobs.history import read_runs
from jobs.mourning import describe_deaths
from jobs.page.render import render
from jobs.status import committed_status
from jobs.terminal import human_seconds
from pipeline.commits import Commit
from pipeline.durable import replace_file, storage_errors
from pipeline.index.manifest import parts_digest
from pipeline.indexed_jobs import latest_commits
from pipeline.job_folder import JobFolder, read_job

MAX_EXAMPLES = 3
MAX_ID_CHARS = 100
MAX_MESSAGE_CHARS = 300
NUM_BINS = 30

_COLUMNS = ["row", "id", "sample", "finish_reason", "prompt_tokens", "completion_tokens", "error_code", "error_message"]


@dataclass(slots=True)
class PartsSummary:
    """Counts over parts. Memory does not grow with rows: lengths are kept as length -> how often."""

    rows: int = 0
    records: int = 0
    finish_reasons: Counter[str] = field(default_factory=Counter)
    prompt_lengths: Counter[int] = field(default_factory=Counter)  # once a row, whatever the number of samples
    completion_lengths: Counter[int] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    def add(self, batch: pa.RecordBatch) -> None:
        first = pc.equal(batch.column("sample"), pa.scalar(0))
        self.records += batch.num_rows
        self.rows += first.true_count
        self.finish_reasons.update(_counts(batch.column("finish_reason")))
        self.prompt_lengths.update(_counts(batch.column("prompt_tokens").filter(first)))
        self.completion_lengths.update(_counts(batch.column("completion_tokens")))
        self.errors.update(_counts(batch.column("error_code")))
        failed = batch.filter(batch.column("error_code").is_valid())
        for code in _counts(failed.column("error_code")):
            kept = self.examples.setdefault(code, [])
            if len(kept) < MAX_EXAMPLES:
                of_code = failed.filter(pc.equal(failed.column("error_code"), pa.scalar(code))).slice(
                    0, MAX_EXAMPLES - len(kept)
                )
                kept.extend(
                    {
                        "row": row,
                        "id": None if id is None else id[:MAX_ID_CHARS],
                        "message": (message or "")[:MAX_MESSAGE_CHARS],
                    }
                    for row, id, message in zip(
                        *(of_code.column(name).to_pylist() for name in ("row", "id", "error_message")), strict=True
                    )
                )


def summarize(parts: Sequence[Path]) -> PartsSummary:
    summary = PartsSummary()
    for part in parts:
        with pq.ParquetFile(part) as file:
            for batch in file.iter_batches(columns=_COLUMNS):
                summary.add(batch)
    return summary


def histogram(lengths: Counter[int]) -> dict[str, Any]:
    """Counts in at most NUM_BINS bins of one width: bin i holds edges[i] <= length < edges[i + 1].

    With `mean`, and the lengths that half and 95% of all do not exceed; those are null where there is nothing.
    """
    if not lengths:
        return {"edges": [0, 1], "counts": [0], "mean": None, "median": None, "p95": None}
    values, weights = np.array(sorted(lengths.items()), np.int64).T
    low, high = int(values[0]), int(values[-1]) + 1
    width = -(-(high - low) // NUM_BINS)
    bins = np.bincount((values - low) // width, weights=weights).astype(np.int64)
    up_to = np.cumsum(weights)
    median, p95 = (int(values[np.searchsorted(up_to, share * up_to[-1])]) for share in (0.5, 0.95))
    return {
        "edges": [low + width * number for number in range(len(bins) + 1)],
        "counts": bins.tolist(),
        "mean": round(float(values @ weights) / int(up_to[-1]), 3),
        "median": median,
        "p95": p95,
    }


def make_report(folder: JobFolder, commits: Mapping[int, Commit], corpus_map: CorpusMap | None) -> dict[str, Any]:
    """The report of what is committed now, and of the runs that runs.json and experts.json tell of."""
    job, status = read_job(folder), committed_status(folder)
    summary = summarize([folder.part(split) for split in sorted(commits)])
    return {
        "name": job["spec"]["name"],
        "model": job["spec"]["model"],
        "fingerprint": job["fingerprint"],
        "parts_digest": parts_digest(commits),
        "state": status["state"],
        "rows": status["rows"],
        "errors": {
            code: {"count": count, "examples": summary.examples[code]} for code, count in summary.errors.most_common()
        },
        "tokens": {"prompt": _total(summary.prompt_lengths), "completion": _total(summary.completion_lengths)},
        "finish_reasons": dict(summary.finish_reasons.most_common()),
        "lengths": {
            "prompt_tokens": histogram(summary.prompt_lengths),
            "completion_tokens": histogram(summary.completion_lengths),
        },
        "index": status["index"],
        "map": None if corpus_map is None else corpus_map.summary(),
        "experts": read_experts(folder),
        "runs": read_runs(folder),
        "spec": job["spec"],
    }


def write_report(out: Path) -> dict[str, Any]:
    """Write report.json and report.html from what lies in the job directory."""
    folder = JobFolder(out)
    commits = latest_commits(folder)
    corpus_map = make_map(folder, commits)
    report = make_report(folder, commits, corpus_map)
    with storage_errors("writing the report in", out):
        replace_file(out / "report.json", json.dumps(report, indent=2).encode(), drafts=folder.attempts)
        page = render(report, yaml.safe_dump(report["spec"], sort_keys=False, allow_unicode=True), corpus_map)
        replace_file(out / "report.html", page.encode(), drafts=folder.attempts)
    return report


def describe_report(report: dict[str, Any], out: Path) -> str:
    """What a person is told at the end of a run."""
    rows, tokens, runs = report["rows"], report["tokens"], report["runs"]
    lines = [f"{report['name']}: {rows['done']:,} of {rows['total']:,} rows done"]
    if rows["done"] < rows["total"]:
        lines[0] += "; without --limit the next run goes on"
    lines += [
        f"  {found['count']:,} rows failed with {code}, the first of them row {found['examples'][0]['row']:,}: "
        + " ".join(found["examples"][0]["message"].split())
        for code, found in report["errors"].items()
    ]
    lines.append(f"  {tokens['prompt']:,} tokens read, {tokens['completion']:,} generated")
    if runs and runs[-1]["rows"]:
        lines[-1] += f"; this run: {runs[-1]['tokens_per_s']:,.0f} tokens/s, {human_seconds(runs[-1]['elapsed_s'])}"
    if runs and runs[-1].get("deaths"):
        lines.append(f"  {describe_deaths(runs[-1]['deaths'])}")
    lines += [f"  {line}" for line in describe_experts(report.get("experts"))]
    lines.append(f"  results: {out / 'parts'}, {out / 'report.html'}")
    if report["index"] is not None:
        lines.append(f"  search:  {shlex.join(['gristmill', 'query', str(out)])} 'TEXT'")
    return "\n".join(lines)


def _total(lengths: Counter[int]) -> int:
    return sum(length * count for length, count in lengths.items())


def _counts(column: pa.Array[Any]) -> dict[Any, int]:
    """Value -> how often it occurs; nulls are left out."""
    found = pc.value_counts(column.drop_null())
    values: list[Any] = found.field("values").to_pylist()
    counts: list[Any] = found.field("counts").to_pylist()
    return dict(zip(values, counts, strict=True))
