"""`gristmill index extend OUT`: files that came into a job's input since it was planned become rows of its index.

    list the input again -> files that no job of the index has (`new_files`) -> a job of the same settings over them
                         -> `index add`

The job runs in a directory of its own, OUT/extensions/000001 by default, and is written down in OUT/extensions.json
before it begins. So whatever is cut off, asking again goes on there: the job with its next row, a job that is done with
adding it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jobs.client import run
from jobs.index.index_commands import BuildOptions, add_to_index
from jobs.index.new_files import new_files
from jobs.output_path import refuse_output_in_input
from jobs.spec import JobSpec
from jobs.specfile import parse_spec
from jobs.status import open_job
from jobs.tally import OnProgress
from pipeline.errors import UserError
from pipeline.extensions import Extension, free_path, read_extensions, write_extensions
from pipeline.index.growth import free_name
from pipeline.index.manifest import read_manifest
from pipeline.indexed_jobs import latest_commits
from pipeline.job_folder import JobFolder, read_job, read_plan
from pipeline.lock import lock
from pipeline.model_path import resolve_model
from workers.query_embedder import refuse_changed_model
from workers.settings import DEFAULT_ENGINE

_SETTABLE = ("cluster", "engine", "limits")


@dataclass(frozen=True, slots=True, kw_only=True)
class Extended:
    """What one extension brought."""

    job: str
    path: str  # of its directory, seen from OUT
    files: tuple[str, ...]
    rows: int
    errors: int
    vectors: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"files": list(self.files)}


def extend_index(
    out: Path,
    *,
    output: Path | None = None,
    settings: Sequence[str] = (),
    options: BuildOptions | None = None,
    on_progress: OnProgress | None = None,
    engine_factory: str = DEFAULT_ENGINE,
) -> list[Extended]:
    """Goes on with what was begun, then takes in all files that are new; nothing of either: gives [].

    `output`: the directory of the new job. `settings`: KEY=VALUE of `cluster`, `engine` and `limits` that replace the
    job's own. UserError where the job can't be extended; JobError where a known file is gone or changed, another
    process is at it, or a job fails. All keep what is committed.
    """
    folder = open_job(out)
    refuse_other_settings(settings)
    extended = list[Extended]()
    while (extension := _next(folder, None if extended else output)) is not None:
        spec = parse_spec(_settings(folder, extension), settings, where="index extend")
        result = run(spec, on_progress=on_progress, engine_factory=engine_factory)
        commits = latest_commits(JobFolder(result.out)).values()
        done = Extended(
            job=extension.job,
            path=extension.path,
            files=extension.files,
            rows=sum(commit.rows for commit in commits),
            errors=sum(commit.errors for commit in commits),
            vectors=sum(sum(commit.vectors.values()) for commit in commits),
        )
        if done.vectors:
            add_to_index(out, extension.folder(folder).root, options)
        extended.append(done)
    return extended


def refuse_other_settings(settings: Sequence[str]) -> None:
    for setting in settings:
        section, _, key = setting.partition("=")[0].strip().partition(".")
        if section not in _SETTABLE or (section, key) == ("cluster", "dtype"):
            raise UserError(
                f"--set {setting}: new rows are made as those in the index were; only cluster (but for dtype), engine "
                "and limits may be other"
            )


def describe_extended(extended: Sequence[Extended]) -> str:
    lines = []
    for one in extended:
        failed = f", {one.errors:,} failed" if one.errors else ""
        files = "1 new file" if len(one.files) == 1 else f"{len(one.files):,} new files"
        lines.append(f"{files}: {one.rows:,} rows{failed}, {one.vectors:,} vectors added as {one.job!r}, in {one.path}")
    return "\n".join(lines) if lines else "nothing new: every file of the input is in the index"


def _next(folder: JobFolder, output: Path | None) -> Extension | None:
    """The extension to go on with, else one that is begun here, over all new files; None where there are none."""
    with lock(folder):
        manifest = read_manifest(folder.index)
        spec = JobSpec.model_validate(read_job(folder)["spec"])
        _refuse_kind_of_job(folder, spec)
        refuse_changed_model(manifest.provenance, resolve_model(spec.model))
        indexed = {job.directory(folder.root) for job in manifest.jobs}
        extensions = [one for one in read_extensions(folder) if one.began(folder) or one.directory(folder) in indexed]
        waiting = [one for one in extensions if one.directory(folder) not in indexed and _is_waiting(folder, one)]
        new = new_files(folder, manifest, extensions, waiting=[one.directory(folder) for one in waiting])
        if waiting:
            if output is not None and waiting[0].directory(folder) != output.resolve():
                raise UserError(
                    f"--output {output}: an extension was begun in {waiting[0].folder(folder).root}; go on with it "
                    f"first: gristmill index extend {folder.root}"
                )
            return waiting[0]
        if not new:
            return None
        begun = Extension(
            path=_path(folder, output) if output is not None else free_path(folder, extensions),
            job=free_name(spec.name, [*(job.job for job in manifest.jobs), *(one.job for one in extensions)]),
            files=tuple(new),
        )
        refuse_output_in_input(
            spec.model_copy(update={"output": spec.output.model_copy(update={"path": str(folder.root / begun.path)})})
        )
        write_extensions(folder, [*extensions, begun])
        return begun


def _refuse_kind_of_job(folder: JobFolder, spec: JobSpec) -> None:
    if spec.embed is None or spec.index is None:
        raise UserError(f"{folder.root}: its job makes no index, so that there is none to extend")
    if spec.input.job is not None:
        raise UserError(
            f"{folder.root}: its input is the job {spec.input.job}, not files; run another job over the new rows and "
            "add it: gristmill index add"
        )


def _is_waiting(folder: JobFolder, extension: Extension) -> bool:
    """Whether there are rows to run, or to be added, of one that is not in the index."""
    its = extension.folder(folder)
    commits = latest_commits(its).values()
    planned = sum(split["num_rows"] for split in read_plan(its)["splits"])
    done = sum(commit.rows for commit in commits) >= planned
    return not done or any(sum(commit.vectors.values()) for commit in commits)


def _settings(folder: JobFolder, extension: Extension) -> dict[str, Any]:
    """Of the job over new files: those of the job in `folder`, as they were settled."""
    settings: dict[str, Any] = JobSpec.model_validate(read_job(folder)["spec"]).to_json()
    return settings | {
        "name": extension.job,
        "input": settings["input"] | {"path": list(extension.files), "format": read_plan(folder)["source"]["format"]},
        "index": False,
        "output": settings["output"] | {"path": str(extension.folder(folder).root), "rows_per_split": "auto"},
    }


def _path(folder: JobFolder, output: Path) -> str:
    return os.path.relpath(output.resolve(), folder.root.resolve())
