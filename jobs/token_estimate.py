"""About how many tokens a job reads and embeds: a sample of its rows, tokenized as shards would."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import takewhile

from jobs.embedding import embedding_forms
from jobs.resolve import ResolvedJob
from jobs.worker_settings import embed_settings, prompt_settings
from pipeline.embedding import EmbeddedText, TextEncoder, TextForm
from pipeline.errors import RowError
from pipeline.source import Rows, Split
from pipeline.tokenizer import Tokenizer, load_tokenizer
from workers.text_kinds import TextKind, passage_kind, prompt_kind

SAMPLE_PLACES = 8  # all over the input
SAMPLE_ROWS = 16  # at each
SAMPLE_BYTES = 1 << 20

_BLOCK_TOKENS = 16  # a shared prefix is reused in blocks


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenEstimate:
    """Means a row that can be served, from `sampled_rows` rows; `errors` counts those of them that can't be."""

    sampled_rows: int
    errors: Counter[str]
    prompt: float
    shared: int  # of it, the beginning that all prompts have in common and that is computed once
    passage: float  # embedded besides


def estimate_tokens(job: ResolvedJob, max_context: int) -> TokenEstimate:
    tokenizer = load_tokenizer(job.model_path)
    prompts, passages = _kinds(job, tokenizer, max_context)
    embeds = TextEncoder(tokenizer, embedding_forms(job.spec.embed)[1] if job.spec.embed is not None else TextForm())
    columns = list(dict.fromkeys(column for kind in (prompts, passages) if kind for column in kind.builder.columns))
    read, embedded, errors = list[list[int]](), list[list[int]](), Counter[str]()
    sampled = 0
    for rows in _sample(job, columns):
        sampled += rows.batch.num_rows
        for kind, kept in ((prompts, read), (passages, embedded)):
            if kind is None:
                continue
            built = kind.builder.build(rows)
            sound = [one for one in built if not isinstance(one, RowError)]
            encoded = iter(tokenizer.encode_batch(sound) if kind is prompts else embeds.encode(sound))
            for one in built:
                found = one if isinstance(one, RowError) else next(encoded)
                ids = found.ids if isinstance(found, EmbeddedText) else found
                if isinstance(ids, RowError):
                    errors[ids.code] += 1
                elif len(ids) <= kind.max_tokens:
                    kept.append(ids)
                elif kind.shortened_tokens is not None:
                    kept.append(ids[: kind.shortened_tokens])
                else:
                    errors["prompt_too_long"] += 1
    return TokenEstimate(
        sampled_rows=sampled,
        errors=errors,
        prompt=_mean(read),
        shared=common_prefix(read) // _BLOCK_TOKENS * _BLOCK_TOKENS,
        passage=0.0 if embedded == read else _mean(embedded),  # a prompt that is the passage too is read once
    )


def common_prefix(sequences: Sequence[Sequence[int]]) -> int:
    """How many items all sequences begin with; 0 for one sequence, which has nobody to share with.

    >>> common_prefix([[1, 2, 3], [1, 2, 4], [1, 2]])
    2
    """
    if len(sequences) < 2:
        return 0
    return sum(1 for _ in takewhile(lambda items: len(set(items)) == 1, zip(*sequences, strict=False)))


def _kinds(job: ResolvedJob, tokenizer: Tokenizer, max_context: int) -> tuple[TextKind | None, TextKind | None]:
    """Of the prompt, and of the passage."""
    spec = job.spec
    prompt, too_long = prompt_settings(spec.prompt), spec.prompt.on_too_long
    prompts = passages = None
    if spec.generate is not None:
        prompts = prompt_kind(
            prompt,
            job.source,
            tokenizer,
            now=datetime.now().astimezone(),
            max_context=max_context,
            max_new_tokens=spec.generate.max_new_tokens,
            on_too_long=too_long,
        )
    if spec.embed is not None:
        passages = passage_kind(
            embed_settings(spec.embed),
            prompt,
            job.source,
            model_path=job.model_path,
            max_context=max_context,
            on_too_long=too_long,
        )
    return prompts, passages


def _sample(job: ResolvedJob, columns: Sequence[str]) -> Iterator[Rows]:
    """Some rows at places spread over the input."""
    splits = job.splits
    chosen = {splits[number * len(splits) // SAMPLE_PLACES].index for number in range(SAMPLE_PLACES)}
    for index in sorted(chosen):
        split: Split = splits[index]
        rows = next(job.source.read(split, columns, max_bytes=SAMPLE_BYTES))
        count = min(rows.batch.num_rows, SAMPLE_ROWS)
        errors = {offset: error for offset, error in rows.errors.items() if offset < count}
        yield Rows(first_row=rows.first_row, batch=rows.batch.slice(0, count), errors=errors)
    job.source.close()


def _mean(sequences: Sequence[Sequence[int]]) -> float:
    return sum(map(len, sequences)) / len(sequences) if sequences else 0.0
