"""The Ray actor that holds one decoder shard: a thin shell that loads what its settings say and runs it."""

from __future__ import annotations

import gc
import logging
import threading
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from datetime import datetime
from pathlib import Path

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
from workers.settings import ShardSettings, load_callable

DEFAULT_BATCH_ROWS = 256

log = logging.getLogger(__name__)


class ShardActor:
    """Answers reports from the moment that its process is up; the model is loaded and run in a thread of its own.

    One of several ranks begins to load when it is given its seat in the gang, which says what experts it holds.
    """

    def __init__(self, settings: ShardSettings, name: str, *, awaits_seat: bool) -> None:
        self._settings = settings
        self._node = ray.get_runtime_context().get_node_id()
        out = Path(settings.out)
        self._log = ExitStack()
        self._log.enter_context(run_log(out, name))
        log_crashes(out)
        self._runner: RowRunner | None = None
        self._failure: Failure | None = None
        self._calibrated: JsonObject | None = None
        self._loaded = threading.Event()
        self._stopped = False
        if not awaits_seat:
            self._begin()

    def take_seat(self, seat: Seat) -> None:
        engine = replace(self._settings.engine, seat=seat)
        self._settings = replace(self._settings, engine=engine)
        self._begin()

    def grant(self, assignments: list[Assignment]) -> None:
        self._running().grant(assignments)

    def revoke(self, index: int, revision: int) -> None:
        self._running().revoke(index, revision)

    def stop(self) -> None:
        self._stopped = True
        if self._runner is not None:
            self._runner.stop()

    def report(self, timeout_s: float) -> ShardReport:
        if self._loaded.wait(timeout_s) and self._runner is not None:
            calibrated, self._calibrated = self._calibrated, None
            return replace(self._runner.report(timeout_s), node=self._node, calibrated=calibrated)
        ended = self._stopped or self._failure is not None
        return ShardReport(
            phase="stopped" if ended else "loading", received=0, wanted=0, node=self._node, failure=self._failure
        )

    def _note_calibration(self, found: JsonObject) -> None:
        self._calibrated = found

    def _begin(self) -> None:
        threading.Thread(target=self._run, name="shard", daemon=True).start()

    def _running(self) -> RowRunner:
        assert self._runner is not None, "assignments are granted when a loaded shard asks for them"
        return self._runner

    def _run(self) -> None:
        try:
            runner = build_runner(self._settings, on_calibrated=self._note_calibration)
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
        self._loaded.set()
        if self._runner is not None:
            self._runner.run()


def build_runner(settings: ShardSettings, *, on_calibrated: Callable[[JsonObject], None] | None = None) -> RowRunner:
    """Load the engine, and lay the way of a row up to it and from it; in a gang that calibrates, with its peers do so.

    UserError for what the job asked wrongly. CalibrationBroken as its name says.
    """
    loaded: LoadedEngine = load_callable(settings.engine.factory)(settings.engine)
    model_path, embed = Path(settings.engine.model_path), settings.embed
    sampling = resolve_sampling(settings.sampling, model_path) if settings.sampling is not None else None
    source = Source.from_json(settings.source)
    layout = RecordLayout.of(
        samples=sampling.n if sampling else 0,
        embeds=embed.of if embed else None,
        dimension=_dimension(embed.form, loaded) if embed else None,
        carried=source.columns.select(settings.carried),
        id_column=source.schema.field(settings.id_column) if settings.id_column else None,
    )
    preparation = Preparation(
        source,
        loaded.tokenizer,
        layout,
        JobFolder(Path(settings.out)),
        prompts=_prompts(settings, source, loaded, sampling),
        passages=_passages(settings, source, loaded),
        text_form=embed.text if embed else TextForm(),
    )
    if settings.calibration is not None and settings.engine.seat is not None and settings.engine.seat.calibrates:
        from workers.calibrator import calibrate
        from workers.decoder.checkpoint import load_checkpoint

        found = calibrate(loaded.engine, preparation, settings.calibration, load_checkpoint(model_path))
        if found is not None and on_calibrated is not None:
            on_calibrated(found.to_json())
    return RowRunner(
        loaded.engine,
        preparation,
        sampling=sampling,
        form=embed.form if embed else None,
        embeds_generation=embed is not None and embed.of != "prompt",
        batch_rows=settings.engine.max_sequences or DEFAULT_BATCH_ROWS,
        lock_step=loaded.lock_step,
        expert_work=loaded.expert_work,
    )


def _dimension(form: VectorForm, loaded: LoadedEngine) -> int:
    try:
        return form.width(loaded.vector_width, loaded.router_width)
    except ValueError as error:
        raise UserError(f"embed.{error}") from None


def _prompts(
    settings: ShardSettings, source: Source, loaded: LoadedEngine, sampling: SamplingParams | None
) -> TextKind | None:
    """A prompt that fills the context leaves no room for a token; one that is cut leaves room for an answer."""
    if sampling is None:
        return None
    tokenizer, max_context = loaded.tokenizer, loaded.max_context
    builder = PromptBuilder(
        settings.prompt,
        source.columns,
        model=ModelText(
            chat_template=tokenizer.chat_template,
            special_tokens=tokenizer.special_tokens,
            control_strings=tokenizer.control_strings,
        ),
        text_column=source.text_column,
        now=datetime.fromisoformat(settings.date),
    )
    room = min(sampling.max_new_tokens, max_context // 2)
    return TextKind(
        builder=builder,
        max_tokens=max_context - 1,
        shortened_tokens=max_context - room if settings.on_too_long == "truncate" else None,
    )


def _passages(settings: ShardSettings, source: Source, loaded: LoadedEngine) -> TextKind | None:
    embed, prompt = settings.embed, settings.prompt
    if embed is None or embed.of == "generation":
        return None
    if embed.template is not None:
        row_text = RowText(source.columns, template=embed.template, section="embed")
    else:
        row_text = RowText(
            source.columns, column=prompt.column, template=prompt.template, text_column=source.text_column
        )
    own_limit = read_embedder(Path(settings.engine.model_path), pooling_is_given=True).max_tokens
    most = min(loaded.max_context, own_limit or loaded.max_context)
    return TextKind(
        builder=TextBuilder(row_text),
        max_tokens=most,
        counted=" (embed.echo says the text twice)" if embed.text.echo else "",
        shortened_tokens=most if settings.on_too_long == "truncate" else None,
    )
