"""A job and an engine -> what runs the job's rows through it: read, framed, pooled and written as the job says."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from pathlib import Path

from pipeline.embedding import TextForm, VectorForm
from pipeline.errors import UserError
from pipeline.job_folder import JobFolder
from pipeline.records import RecordLayout
from pipeline.source import Source
from workers.engine_factory import LoadedEngine
from workers.preparation import Preparation
from workers.row_runner import RowRunner
from workers.sampling_choice import resolve_sampling
from workers.settings import EngineSettings, JobSettings, JsonObject
from workers.text_kinds import passage_kind, prompt_kind

DEFAULT_BATCH_ROWS = 256


def build_runner(
    loaded: LoadedEngine,
    engine: EngineSettings,
    job: JobSettings,
    *,
    on_calibrated: Callable[[JsonObject], None] | None = None,
) -> RowRunner:
    """Lay the way of a row up to the engine and from it. `on_calibrated`: first calibrate, if the seat says so.

    UserError for what the job asked wrongly. GangBroken as its name says.
    """
    model_path, embed = Path(engine.model_path), job.embed
    sampling = resolve_sampling(job.sampling, model_path) if job.sampling is not None else None
    if sampling is not None:
        loaded.refuse_generation(engine.model_path)
    source = Source.from_json(job.source)
    layout = RecordLayout.of(
        samples=sampling.n if sampling else 0,
        embeds=embed.of if embed else None,
        dimension=_dimension(embed.form, loaded) if embed else None,
        carried=source.columns.select(job.carried),
        id_column=source.schema.field(job.id_column) if job.id_column else None,
    )
    prompts = passages = None
    if sampling is not None:
        prompts = prompt_kind(
            job.prompt,
            source,
            loaded.tokenizer,
            now=datetime.fromisoformat(job.date),
            max_context=loaded.max_context,
            max_new_tokens=sampling.max_new_tokens,
            on_too_long=job.on_too_long,
        )
    if embed is not None:
        passages = passage_kind(
            embed,
            job.prompt,
            source,
            model_path=model_path,
            max_context=loaded.max_context,
            on_too_long=job.on_too_long,
        )
    preparation = Preparation(
        source,
        loaded.tokenizer,
        layout,
        JobFolder(Path(job.out)),
        prompts=prompts,
        passages=passages,
        text_form=embed.text if embed else TextForm(),
    )
    if on_calibrated is not None and job.calibration is not None and engine.seat is not None and engine.seat.calibrates:
        from workers.calibrator import calibrate
        from workers.decoder.checkpoint import load_checkpoint

        found = calibrate(loaded.engine, preparation, job.calibration, load_checkpoint(model_path))
        if found is not None:
            on_calibrated(found.to_json())
    return RowRunner(
        loaded.engine,
        preparation,
        sampling=sampling,
        form=embed.form if embed else None,
        embeds_generation=embed is not None and embed.of != "prompt",
        batch_rows=engine.max_sequences or DEFAULT_BATCH_ROWS,
        lock_step=loaded.lock_step,
        expert_work=loaded.expert_work,
    )


def _dimension(form: VectorForm, loaded: LoadedEngine) -> int:
    try:
        return form.width(loaded.vector_width, loaded.router_width)
    except ValueError as error:
        raise UserError(f"embed.{error}") from None
