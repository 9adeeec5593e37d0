"""A gang that has just formed finds out which experts the job's own prompts choose, and places experts by that.

Every rank reads its share of a sample of the job's rows, as the job reads them, and runs them through the engine, in
lock-step: prompts as far as their first token, passages to their end. Prefixes that prompts share are computed once, as
in the job, so what is counted is what the job will compute. The first rank adds up what all heard and plans; then each
rank reads the experts that it is to hold. All of it happens before the gang takes rows, and anything that breaks breaks
the gang, which is then formed again.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from time import perf_counter

from pipeline.embedding import EmbeddedText, VectorForm
from pipeline.errors import JobError, RowError, UserError
from workers.assignment import Assignment
from workers.decoder.checkpoint import Checkpoint
from workers.engine.request import EmbedRequest, GenerateRequest, SamplingParams, VectorRequest
from workers.gang_engine import GangEngine
from workers.parallel.loads import ExpertLoads
from workers.parallel.measured import place_by_loads
from workers.parallel.placement import Placement
from workers.parallel.seat import GangBroken
from workers.preparation import Passage, Preparation, Tokens
from workers.settings import CalibrationSettings, JsonObject, SamplePlace

Text = list[int] | EmbeddedText  # a prompt, or a passage

_FIRST_TOKEN = SamplingParams(max_new_tokens=1, temperature=0.0, ignore_eos=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """What the gang's first rank knows afterwards: what all ranks heard, and what took how long."""

    placement: Placement
    loads: ExpertLoads
    rows: int
    tokens: int  # of the texts; those that were computed are fewer where texts begin alike
    seconds: float
    moving_s: float  # of `seconds`, for reading the experts that moved

    def to_json(self) -> JsonObject:
        return {
            "placement": self.placement.to_json(),
            "loads": self.loads.to_json(),
            "facts": {
                "rows": self.rows,
                "tokens": self.tokens,
                "seconds": round(self.seconds, 3),
                "moving_s": round(self.moving_s, 3),
            },
        }


def calibrate(
    engine: GangEngine, preparation: Preparation, sample: CalibrationSettings, checkpoint: Checkpoint
) -> Calibration | None:
    """Called by all ranks before any has rows. -> what was found, on the first rank; None on the others.

    UserError or JobError if the input or the checkpoint can't be read, GangBroken for anything else.
    """
    try:
        return _calibrate(engine, preparation, sample, checkpoint)
    except (UserError, JobError):
        raise
    except Exception as error:
        raise GangBroken(f"while it calibrated: {type(error).__name__}: {error}") from error


def _calibrate(
    engine: GangEngine, preparation: Preparation, sample: CalibrationSettings, checkpoint: Checkpoint
) -> Calibration | None:
    begin = perf_counter()
    gang, dealt = engine.gang, engine.placement
    requests, rows = list[GenerateRequest | EmbedRequest](), 0
    for place in sample.places[gang.rank :: gang.num_ranks]:
        for texts in _within(_read(preparation, place), sample.tokens_a_place):
            rows += 1
            for text in texts:
                requests.append(_request(len(requests), text))
    loads = ExpertLoads(layers=dealt.layers, num_experts=dealt.num_experts)
    with engine.listening(loads.add):
        for request in requests:
            engine.add(request)
        engine.run_out()
    heard = gang.swap([loads, *[None] * (gang.num_ranks - 1)])
    placement = None
    if gang.rank == 0:
        for other in heard[1:]:
            loads.merge(other)
        slots = max(len(held) for ranks in dealt.slots for held in ranks)
        placement = place_by_loads(loads, engine.topology, slots)
    planned: Placement = gang.swap([placement] * gang.num_ranks)[0]
    measured = perf_counter()
    engine.move_experts(checkpoint, planned)
    counted = gang.tell([rows, sum(len(request.token_ids) for request in requests)])
    end = perf_counter()
    if gang.rank != 0:
        return None
    return Calibration(
        placement=planned,
        loads=loads,
        rows=sum(rows for rows, _ in counted),
        tokens=sum(tokens for _, tokens in counted),
        seconds=end - begin,
        moving_s=end - measured,
    )


def _read(preparation: Preparation, place: SamplePlace) -> Iterator[list[Text]]:
    """What each row at a place has the engine read, as `flights.py` does: once, where the prompt is the passage too.

    Nothing of a row that fails.
    """
    assignment = Assignment(split=place.split, revision=0, start=0, stop=place.rows)
    for chunk in preparation.read(assignment):
        prompts: Sequence[Tokens | None] = chunk.prompts or [None] * len(chunk.rows)
        passages: Sequence[Passage | None] = chunk.passages or [None] * len(chunk.rows)
        for prompt, passage in zip(prompts, passages, strict=True):
            if isinstance(prompt, RowError) or isinstance(passage, RowError):
                yield []
            elif passage is None:
                yield [] if prompt is None else [prompt]
            elif prompt is None or prompt == passage.ids:
                yield [passage]
            else:
                yield [prompt, passage]


def _within(rows: Iterable[list[Text]], most_tokens: int | None) -> Iterator[list[Text]]:
    """Rows until they have so many tokens; the first counts whatever it has."""
    tokens = 0
    for texts in rows:
        tokens += sum(map(_length, texts))
        if most_tokens is not None and tokens > most_tokens and tokens > sum(map(_length, texts)):
            return
        yield texts


def _length(text: Text) -> int:
    return len(text.ids if isinstance(text, EmbeddedText) else text)


def _request(number: int, text: Text) -> GenerateRequest | EmbedRequest:
    if isinstance(text, EmbeddedText):
        vector = VectorRequest(form=VectorForm(), pooled_from=text.pooled_from)
        return EmbedRequest(request_id=number, token_ids=text.ids, vector=vector)
    return GenerateRequest(request_id=number, token_ids=text, params=_FIRST_TOKEN, key=number)
