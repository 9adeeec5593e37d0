"""A small job of three splits, one of its rows failed, that is planned, done in part, or whole."""

from __future__ import annotations

from typing import Any

import numpy as np

from pipeline.commits import CommitLog
from pipeline.errors import RowError
from pipeline.index.build import build_index
from pipeline.index.manifest import Provenance
from pipeline.job_folder import JobFolder, write_job, write_plan
from pipeline.parts import PartBuilder
from pipeline.records import RecordLayout

ROWS = [4, 4, 3]  # of each split
FAILED_ROW = 5
SAMPLES = 2
LAYOUT = RecordLayout.of(samples=SAMPLES, embeds="both", dimension=4)
PROVENANCE = Provenance(model="tiny", model_files={}, tokenizer="t", pooling="mean")


def planned(folder: JobFolder) -> CommitLog:
    folder.create()
    write_job(folder, fingerprint="this job", document={"spec": {"name": "mine", "index": {"kind": "auto"}}})
    splits = [{"index": i, "first_row": sum(ROWS[:i]), "num_rows": rows} for i, rows in enumerate(ROWS)]
    write_plan(folder, fingerprint="this job", splits=splits, document={})
    log = CommitLog(folder, fingerprint="this job")
    log.recover()
    return log


def part_of(folder: JobFolder, split: int, *, rows: int | None = None, revision: int = 0, kept: Any = None) -> Any:
    first_row = sum(ROWS[:split])
    num_rows = ROWS[split] if rows is None else rows
    builder = PartBuilder(LAYOUT, split=split, first_row=first_row, num_rows=num_rows, revision=revision, kept=kept)
    for row in range(first_row, first_row + num_rows):
        if row == FAILED_ROW:
            builder.fail(row, RowError("prompt_too_long", "far"))
        elif builder.needs(row):
            builder.add_vector(row, "prompt", np.random.default_rng(row).normal(size=4).astype(np.float32))
            for sample in range(SAMPLES):
                builder.add(row, sample=sample, text="t", finish_reason="stop", prompt_tokens=1, completion_tokens=1)
                vector = np.random.default_rng([row, sample]).normal(size=4).astype(np.float32)
                builder.add_vector(row, "generation", vector, sample=sample)
    return builder.write(folder)


def finish(folder: JobFolder, log: CommitLog, *, shards: int = 2, kind: str = "Flat") -> None:
    for split in range(len(ROWS)):
        if split not in log.commits:
            log.publish(log.commit(part_of(folder, split)))
    build_index(folder, log.commits, job="mine", provenance=PROVENANCE, shards=shards, kind=kind)
