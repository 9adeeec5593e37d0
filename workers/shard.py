"""The Ray actor that holds one decoder shard: a thin shell that loads what its settings say and runs it."""

from __future__ import annotations

import gc
import logging
import threading
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from queue import SimpleQueue

import ray

from pipeline.embedding import TextForm, VectorForm
from pipeline.errors import JobError, UserError
from pipeline.job_folder import JobFolder
from pipeline.prompts import ModelText, PromptBuilder, TextBuilder
from pipeline.records import RecordLayout
from pipeline.row_text import RowText
from pipeline.sentence_transformers import read_embedder
from pipeline.source import Source
from workers.assignment import Assignment, Failure, JsonObject, ShardReport
from workers.engine.request import SamplingParams
from workers.engine_factory import LoadedEngine
from workers.parallel.seat import CalibrationBroken, Seat
from workers.preparation import Preparation, TextKind
from workers.row_runner import RowRunner
from workers.run_log import log_crashes, run_log
from workers.sampling_choice import resolve_sampling
from workers.settings import EngineSettings, JobSettings, ShardSettings, load_callable

DEFAULT_BATCH_ROWS = 256

log = logging.getLogger(__name__)


class ShardActor:
    """Answers reports from the moment that its process is up; the model is loaded and run in a thread of its own.

    One of several ranks begins to load when it is given its seat in the gang, which says what experts it holds. A shard
    whose job came to its end in peace (a last report that says `is_free`) may be given another.
    """

    def __init__(self, settings: ShardSettings, name: str, *, awaits_seat: bool) -> None:
        self._engine = job.engine
        self._node = ray.get_runtime_context().get_node_id()
        self._jobs: SimpleQueue[tuple[JobSettings, str]] = SimpleQueue()
        self._turn = 0  # jobs that were begun before this one
        self._runner: RowRunner | None = None
        self._failure: Failure | None = None
        self._calibrated: JsonObject | None = None
        self._ready = threading.Event()
        self._stopped = False
        self._jobs.put((job.job, name))
        log_crashes(Path(job.job.out))
        if not awaits_seat:
            self._begin()

    def take_seat(self, seat: Seat) -> None:
        self._engine = replace(self._engine, seat=seat)
        self._begin()

    def take_job(self, job: JobSettings, name: str, turn: int) -> None:
        """The next job, when the one before is over."""
        self._runner, self._failure, self._calibrated, self._stopped = None, None, None, False
        self._ready.clear()
        self._turn = turn
        self._jobs.put((job, name))

    def grant(self, assignments: list[Assignment]) -> None:
        self._running().grant(assignments)

    def revoke(self, index: int, revision: int) -> None:
        self._running().revoke(index, revision)

    def stop(self) -> None:
        self._stopped = True
        if self._runner is not None:
            self._runner.stop()

    def report(self, timeout_s: float, turn: int) -> ShardReport:
        """Of the job that is the `turn`th, counted from 0."""
        if self._ready.wait(timeout_s) and self._runner is not None and self._turn == turn:
            calibrated, self._calibrated = self._calibrated, None
            return replace(self._runner.report(timeout_s), node=self._node, calibrated=calibrated)
        ended = self._turn == turn and (self._stopped or self._failure is not None)
        return ShardReport(
            phase="stopped" if ended else "loading",
            received=0,
            wanted=0,
            node=self._node,
            failure=self._failure if ended else None,
        )

    def _note_calibration(self, found: JsonObject) -> None:
        self._calibrated = found

    def _begin(self) -> None:
        threading.Thread(target=self._run, name="shard", daemon=True).start()

    def _running(self) -> RowRunner:
        assert self._runner is not None, "assignments are granted when a loaded shard asks for them"
        return self._runner

    def _run(self) -> None:
        """One thread for all jobs: what torch and the kernels were told of threads, they were told in it."""
        loaded: LoadedEngine | None = None
        while True:
            job, name = self._jobs.get()
            with run_log(Path(job.out), name):
                loaded = self._run_job(loaded, job)
            if loaded is None:
                return

    def _run_job(self, loaded: LoadedEngine | None, job: JobSettings) -> LoadedEngine | None:
        """-> the engine, for the next job; None where it is of no use any more."""
        runner = None
        try:
            is_first = loaded is None
            if loaded is None:
                loaded = load_callable(self._engine.factory)(self._engine)
            else:
                log_crashes(Path(job.out))
                loaded.engine.clear_stats()
            assert loaded is not None
            runner = build_runner(
                loaded, self._engine, job, on_calibrated=self._note_calibration if is_first else None
            )
        except UserError as error:
            self._failure = Failure(kind="user", message=str(error))
        except JobError as error:
            self._failure = Failure(kind="job", message=str(error))
        except CalibrationBroken as error:
            log.exception("the gang broke while it calibrated")
            self._failure = Failure(kind="crash", message=str(error))
        except Exception as error:
            log.exception("the model could not be loaded")
            self._failure = Failure(kind="job", message=f"loading the model failed: {type(error).__name__}: {error}")
        else:
            # Rows make many small objects that never refer in circles; what is loaded stays as long as the process.
            gc.freeze()
            gc.set_threshold(20_000, 50, 50)
            self._runner = runner
            if self._stopped:
                runner.stop()
        self._ready.set()
        if runner is None:
            return None
        runner.run()
        return loaded if runner.is_free else None


def build_runner(
    loaded: LoadedEngine,
    engine: EngineSettings,
    job: JobSettings,
    *,
    on_calibrated: Callable[[JsonObject], None] | None = None,
) -> RowRunner:
    """Lay the way of a row up to the engine and from it. `on_calibrated`: first calibrate, if the seat says so.

    UserError for what the job asked wrongly. CalibrationBroken as its name says.
    """
    model_path, embed = Path(engine.model_path), job.embed
    sampling = resolve_sampling(job.sampling, model_path) if job.sampling is not None else None
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
