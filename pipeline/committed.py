"""The committed parts of another job, as the input of this one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from pipeline.errors import UserError


def committed_parts(job_dir: str) -> Mapping[str, str]:
    """Path of each committed part, in the order of its splits -> the SHA-256 that its commit states.

    A split's commit of the highest revision counts: `000003.r1.json` supersedes `000003.json`. UserError where there is
    no job, no commit yet, or a part that its commit names is not in its place.
    """
    folder = Path(job_dir)
    if not (folder / "commits").is_dir():
        raise UserError(f"input.job {job_dir}: not a job directory (it has no commits folder)")
    latest: dict[int, tuple[int, Mapping[str, object]]] = {}
    for path in (folder / "commits").glob("*.json"):
        split, _, revision = path.stem.partition(".r")
        if not split.isdigit():
            continue
        try:
            commit = json.loads(path.read_text())
            entry = (int(revision or 0), commit)
            part, digest = commit["part"], commit["sha256"]
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise UserError(f"input.job {job_dir}: {path.name} is no commit ({error}); see gristmill verify") from error
        del part, digest
        if int(split) not in latest or latest[int(split)][0] < entry[0]:
            latest[int(split)] = entry
    if not latest:
        raise UserError(f"input.job {job_dir}: has no committed rows yet")
    parts: dict[str, str] = {}
    for _, (_, commit) in sorted(latest.items()):
        path = folder / "parts" / Path(str(commit["part"])).name
        if not path.is_file():
            raise UserError(f"input.job {job_dir}: {path.name} is committed but not in parts; run that job again")
        parts[str(path)] = str(commit["sha256"])
    return parts
