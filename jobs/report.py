"""What happened, for programs (report.json) and for people (report.html, `gristmill status`).

Everything about rows is counted from the committed parts, so that a report is right whoever died on the way; only how
fast it went comes from the controller, which hands over its progress reports.
"""

from __future__ import annotations

import json
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import yaml

from jobs.expert_report import describe_experts, expert_report
from jobs.expert_tally import GangWork
from jobs.placements import record_of
from jobs.progress import ROWS_PHASE, Progress
from jobs.report_page import render
from jobs.status import committed_status, latest_commits
from jobs.terminal import human_seconds
from pipeline.durable import replace_file, storage_errors
from pipeline.index.manifest import parts_digest
from pipeline.job_folder import JobFolder, read_job

MAX_EXAMPLES = 3
MAX_MESSAGE_CHARS = 300
MAX_SERIES = 300
NUM_BINS = 30

_COLUMNS = ["row", "sample", "finish_reason", "prompt_tokens", "completion_tokens", "error_code", "error_message"]


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
                    {"row": row, "message": (message or "")[:MAX_MESSAGE_CHARS]}
                    for row, message in zip(
                        of_code.column("row").to_pylist(), of_code.column("error_message").to_pylist(), strict=True
                    )
                )


def summarize(parts: Sequence[Path]) -> PartsSummary:
    summary = PartsSummary()
    for part in parts:
        with pq.ParquetFile(part) as file:
            for batch in file.iter_batches(columns=_COLUMNS):
                summary.add(batch)
    return summary


def run_record(history: Sequence[Progress], started_at: str, facts: Mapping[str, Any]) -> dict[str, Any]:
    """How one run of the controller went. `started_at`: ISO 8601. `facts`: what else the controller knows of it.

    Times are of rows alone: from when the first could start until the index is begun. `series`: [seconds, rows, tokens]
    since then.
    """
    running = [progress for progress in history if progress.phase == ROWS_PHASE] or history[-1:]
    last = running[-1]
    kept = [*running[: -1 : max(1, len(running) // MAX_SERIES)], last]
    return {
        "started_at": started_at,
        "elapsed_s": round(last.elapsed_s, 3),
        "rows": last.rows_done - last.rows_at_start,
        "prompt_tokens": last.prompt_tokens,
        "completion_tokens": last.completion_tokens,
        "tokens_per_s": round(last.tokens_per_s, 1),
        "series": [
            [round(p.elapsed_s, 3), p.rows_done - p.rows_at_start, p.prompt_tokens + p.completion_tokens] for p in kept
        ],
        **facts,
    }


def histogram(lengths: Counter[int]) -> dict[str, list[int]]:
    """Counts in at most NUM_BINS bins of one width: bin i holds edges[i] <= length < edges[i + 1]."""
    if not lengths:
        return {"edges": [0, 1], "counts": [0]}
    values = np.fromiter(lengths.keys(), np.int64)
    weights = np.fromiter(lengths.values(), np.int64)
    low, high = int(values.min()), int(values.max()) + 1
    width = -(-(high - low) // NUM_BINS)
    bins = np.bincount((values - low) // width, weights=weights).astype(np.int64)
    return {"edges": [low + width * number for number in range(len(bins) + 1)], "counts": bins.tolist()}


def make_report(folder: JobFolder, runs: list[dict[str, Any]], experts: dict[str, Any] | None = None) -> dict[str, Any]:
    """The report of what is committed now. `runs`: a `run_record` for each run so far. `experts`: see expert_report."""
    job, status, commits = read_job(folder), committed_status(folder), latest_commits(folder)
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
        "experts": experts,
        "runs": runs,
        "spec": job["spec"],
    }


def write_report(
    out: Path,
    history: Sequence[Progress],
    started_at: str,
    *,
    facts: Mapping[str, Any] | None = None,
    gangs: Sequence[GangWork] = (),
) -> dict[str, Any]:
    """Write report.json and report.html after a run that reported `history`; earlier runs stay in it.

    `facts` is what else the controller knows of the run: seconds by phase, deaths, the engine's own counts. `gangs`:
    what the experts of its shards did.
    """
    folder = JobFolder(out)
    earlier_runs, earlier_experts = _earlier(folder)
    runs = [*earlier_runs, *([run_record(history, started_at, facts or {})] if history else [])]
    experts = expert_report(earlier_experts, gangs, partial(record_of, folder))
    report = make_report(folder, runs, experts)
    with storage_errors("writing the report in", out):
        replace_file(out / "report.json", json.dumps(report, indent=2).encode(), drafts=folder.attempts)
        page = render(report, yaml.safe_dump(report["spec"], sort_keys=False, allow_unicode=True))
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
    lines += [f"  {line}" for line in describe_experts(report.get("experts"))]
    lines.append(f"  results: {out / 'parts'}, {out / 'report.html'}")
    if report["index"] is not None:
        lines.append(f"  search:  {shlex.join(['gristmill', 'query', str(out)])} 'TEXT'")
    return "\n".join(lines)


def _earlier(folder: JobFolder) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
    """`runs` and `experts` of the last report. None of a damaged one: they only say how it went."""
    try:
        report = json.loads((folder.root / "report.json").read_text())
        runs, experts = report["runs"], report.get("experts")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return [], None
    return (runs if isinstance(runs, list) else []), (experts if isinstance(experts, dict) else None)


def _total(lengths: Counter[int]) -> int:
    return sum(length * count for length, count in lengths.items())


def _counts(column: pa.Array[Any]) -> dict[Any, int]:
    """Value -> how often it occurs; nulls are left out."""
    found = pc.value_counts(column.drop_null())
    values: list[Any] = found.field("values").to_pylist()
    counts: list[Any] = found.field("counts").to_pylist()
    return dict(zip(values, counts, strict=True))
