"""A job whose index can be asked, made without running anything."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from jobs.specfile import parse_spec
from pipeline.commits import CommitLog
from pipeline.index.build import build_index
from pipeline.index.manifest import Provenance
from pipeline.job_folder import JobFolder, write_job, write_plan
from pipeline.model_path import model_digest
from pipeline.parts import PartBuilder
from pipeline.records import RecordLayout
from pipeline.tokenizer import load_tokenizer


@pytest.fixture
def made_index(tmp_path: Path, tiny_tokenizer_dir: Path) -> Callable[..., JobFolder]:
    """`made_index(ids, **embed)`: a row an id, of which row i has the vector of length 1 in the direction (i, 1)."""

    def make(ids: list[str], *, name: str = "out", **embed: Any) -> JobFolder:
        model = tmp_path / "model"
        if not model.exists():
            shutil.copytree(tiny_tokenizer_dir, model)
            (model / "config.json").write_text('{"model_type": "llama"}')
            (model / "model.safetensors").write_bytes(b"weights")
        folder = JobFolder(tmp_path / name)
        settings = {
            "name": name,
            "model": str(model),
            "input": {"path": str(tmp_path / "rows.parquet"), "id": "key"},
            "prompt": {"column": "key"},
            "embed": {"pooling": "mean"} | embed,
            "output": {"path": str(folder.root), "columns": ["key"]},
        }
        spec = parse_spec(settings)
        log = CommitLog(folder, fingerprint=f"of {name}")
        log.recover()
        carried = pa.record_batch({"key": ids})
        key = carried.schema.field("key")
        layout = RecordLayout.of(samples=0, embeds="prompt", dimension=2, carried=carried.schema, id_column=key)
        builder = PartBuilder(layout, split=0, first_row=0, num_rows=len(ids))
        builder.carry(0, carried)
        for row in range(len(ids)):
            vector = np.array([row, 1], np.float32)
            builder.add_vector(row, "prompt", vector / np.linalg.norm(vector), prompt_tokens=1)
        log.publish(log.commit(builder.write(folder)))
        splits = [{"index": 0, "first_row": 0, "num_rows": len(ids)}]
        write_plan(folder, fingerprint=f"of {name}", splits=splits, document={})
        write_job(folder, fingerprint=f"of {name}", document={"spec": spec.to_json()})
        assert spec.embed is not None
        provenance = Provenance(
            model=str(model),
            model_files=model_digest(model),
            tokenizer=load_tokenizer(model).digest,
            pooling="mean",
            query_template=spec.embed.query_template,
        )
        build_index(folder, log.commits, job=name, provenance=provenance, threads=1)
        return folder

    return make
