"""How far a job directory is, read from its files alone, also while a controller works in it; what an audit says."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from jobs.submitting.submission import read_submission
from pipeline.audit import Audit
from pipeline.commits import Commit
from pipeline.errors import UserError
from pipeline.index.manifest import MANIFEST_NAME, parts_digest, read_manifest
from pipeline.index.versions import put_back
from pipeline.indexed_jobs import latest_commits
from pipeline.job_folder import JobFolder, read_job, read_plan
from pipeline.lock import lock_holder


def open_job(out: Path) -> JobFolder:
    """The job directory at `out`. UserError where there is none."""
    folder = JobFolder(out)
    if not out.is_dir():
        raise UserError(f"{out}: no such job directory")
    put_back(folder)
    if not folder.job_file.is_file():
        merged = (folder.index / MANIFEST_NAME).is_file()
        hint = f"; it holds a merged index, whose jobs `gristmill index show {out}` names" if merged else ""
        raise UserError(f"{out}: not a job directory: it has no job.json{hint}")
    return folder


def open_index(out: Path) -> JobFolder:
    """The directory `out`, which has an index: a job's, or one that indexes were merged into. UserError otherwise."""
    folder = JobFolder(out)
    put_back(folder)
    return folder if (folder.index / MANIFEST_NAME).is_file() else open_job(out)


def job_status(out: Path) -> dict[str, Any]:
    """{"state", "rows", "splits", "errors", "tokens", "index", "submission", ...}. UserError where there is no job.

    `state` is running, finished, or stopped (rows or the index are left to do). `rows["done"]` counts committed rows,
    `rows["ok"]` and `rows["errors"]` among them.
    """
    folder = open_job(out)
    holder = lock_holder(folder)
    submission = read_submission(out)
    status = committed_status(folder) | {"submission": None if submission is None else asdict(submission)}
    if holder is not None:
        return status | {"state": "running", "holder": str(holder)}
    return status | {"holder": None}


def committed_status(folder: JobFolder) -> dict[str, Any]:
    """The same by what is committed, whoever is at work: `state` is finished or stopped."""
    job = read_job(folder)
    splits = read_plan(folder)["splits"] if folder.plan_file.is_file() else []
    commits = latest_commits(folder)
    total = sum(split["num_rows"] for split in splits)
    done, failed = sum(commit.rows for commit in commits.values()), sum(commit.errors for commit in commits.values())
    index = index_summary(folder, commits)
    indexed = job["spec"]["index"] in (None, False) or (index is not None and index["current"])
    codes: Counter[str] = Counter()
    for commit in commits.values():
        codes.update(commit.error_codes)
    return {
        "name": job["spec"]["name"],
        "output": str(folder.root),
        "fingerprint": job["fingerprint"],
        "state": "finished" if splits and done == total and indexed else "stopped",
        "rows": {"total": total, "done": done, "ok": done - failed, "errors": failed},
        "errors": dict(codes.most_common()),
        "splits": {"total": len(splits), "done": len(commits)},
        "tokens": {
            "prompt": sum(commit.prompt_tokens for commit in commits.values()),
            "completion": sum(commit.completion_tokens for commit in commits.values()),
        },
        "index": index,
    }


def index_summary(folder: JobFolder, commits: Mapping[int, Commit]) -> dict[str, Any] | None:
    """What index.json says, and whether it is of the parts as they are now. None where there is no index."""
    if not (folder.index / MANIFEST_NAME).is_file():
        return None
    manifest = read_manifest(folder.index)
    return {
        "kind": manifest.kind,
        "vectors": manifest.num_vectors,
        "dimension": manifest.dimension,
        "shards": len(manifest.shards),
        "bytes": sum(contents.size_bytes for contents in manifest.files),
        "recall": dataclasses.asdict(manifest.recall),
        "missed": [dataclasses.asdict(missed) for missed in manifest.missed],
        "efforts": [
            {
                "effort": shard.effort,
                "recall": shard.recall,
                "trials": [dataclasses.asdict(one) for one in shard.trials],
            }
            for shard in manifest.shards
        ],
        "pooling": manifest.provenance.pooling,
        "version": manifest.version,
        "jobs": len(manifest.jobs),
        "deleted": manifest.num_deleted,
        "current": manifest.jobs[0].parts_digest == parts_digest(commits),
    }


def _recall(recall: Mapping[str, Any]) -> str:
    return f", recall@{recall['k']} {recall['reached']:.3f}" if recall["num_queries"] else ""


def describe_status(status: dict[str, Any]) -> str:
    rows, splits, tokens, index = status["rows"], status["splits"], status["tokens"], status["index"]
    lines = [
        f"{status['name']} in {status['output']}: {status['state']}"
        + (f" ({status['holder']})" if status["holder"] else ""),
        f"rows    {rows['done']:,} of {rows['total']:,}, in {splits['done']:,} of {splits['total']:,} splits",
        f"errors  {rows['errors']:,}" + "".join(f", {code} {count:,}" for code, count in status["errors"].items()),
        f"tokens  {tokens['prompt']:,} read, {tokens['completion']:,} generated",
    ]
    if (submission := status.get("submission")) is not None:
        lines.insert(1, f"sent    as {submission['id']} to {submission['address'] or 'a cluster'}")
    if index is not None:
        lines.append(
            f"index   {index['vectors']:,} vectors of {index['dimension']}, {index['kind']}"
            + _recall(index["recall"])
            + (f", of {index['jobs']} jobs" if index["jobs"] > 1 else "")
            + (f", {index['deleted']:,} of them deleted" if index["deleted"] else "")
            + ("" if index["current"] else ", older than the parts")
        )
    return "\n".join(lines)


def describe_audit(out: Path, found: Audit) -> str:
    counts = f"{found.rows:,} of {found.rows_planned:,} rows in {found.splits:,} splits, {found.errors:,} errors"
    if found.neighbours is not None:
        counts = f"{found.rows:,} of {found.rows_planned:,} queries in {found.splits:,} splits, {found.errors:,} errors"
        counts += f", {found.neighbours:,} neighbours"
    if found.indexed_vectors is not None:
        counts += f", {found.indexed_vectors:,} vectors indexed"
        counts += f" and {found.deleted_vectors:,} of them deleted" if found.deleted_vectors else ""
    if found.ok:
        return f"{out} is whole: {counts}"
    lines = [f"{out} is not whole: {counts}"]
    lines += [f"  damaged: {problem}" for problem in found.problems]
    lines += [f"  to do:   {left}" for left in found.pending]
    return "\n".join(lines)
