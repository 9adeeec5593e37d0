"""A job and an engine -> what runs the job's rows through it: read, framed, pooled and written as the job says."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from pathlib import Path

from pipeline.embedding import TextForm, VectorForm
from pipeline.errors import UserError
from pipeline.job_folder import JobFolder
from pipeline.prompts import ModelText, PromptBuilder, TextBuilder
from pipeline.records import RecordLayout
from pipeline.row_text import RowText
from pipeline.sentence_transformers import read_embedder
from pipeline.source import Source
from workers.assignment import JsonObject
from workers.engine.request import SamplingParams
from workers.engine_factory import LoadedEngine
from workers.preparation import Preparation, TextKind
from workers.row_runner import RowRunner
from workers.sampling_choice import resolve_sampling
from workers.settings import EngineSettings, JobSettings

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
    preparation = Preparation(
        source,
        loaded.tokenizer,
        layout,
        JobFolder(Path(job.out)),
        prompts=_prompts(job, source, loaded, sampling),
        passages=_passages(job, model_path, source, loaded),
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


def _prompts(
    job: JobSettings, source: Source, loaded: LoadedEngine, sampling: SamplingParams | None
) -> TextKind | None:
    """A prompt that fills the context leaves no room for a token; one that is cut leaves room for an answer."""
    if sampling is None:
        return None
    tokenizer, max_context = loaded.tokenizer, loaded.max_context
    builder = PromptBuilder(
        job.prompt,
        source.columns,
        model=ModelText(
            chat_template=tokenizer.chat_template,
            special_tokens=tokenizer.special_tokens,
            control_strings=tokenizer.control_strings,
        ),
        text_column=source.text_column,
        now=datetime.fromisoformat(job.date),
    )
    room = min(sampling.max_new_tokens, max_context // 2)
    return TextKind(
        builder=builder,
        max_tokens=max_context - 1,
        shortened_tokens=max_context - room if job.on_too_long == "truncate" else None,
    )


def _passages(job: JobSettings, model_path: Path, source: Source, loaded: LoadedEngine) -> TextKind | None:
    embed, prompt = job.embed, job.prompt
    if embed is None or embed.of == "generation":
        return None
    if embed.template is not None:
        row_text = RowText(source.columns, template=embed.template, section="embed")
    else:
        row_text = RowText(
            source.columns, column=prompt.column, template=prompt.template, text_column=source.text_column
        )
    own_limit = read_embedder(model_path, pooling_is_given=True).max_tokens
    most = min(loaded.max_context, own_limit or loaded.max_context)
    return TextKind(
        builder=TextBuilder(row_text),
        max_tokens=most,
        counted=" (embed.echo says the text twice)" if embed.text.echo else "",
        shortened_tokens=most if job.on_too_long == "truncate" else None,
    )
