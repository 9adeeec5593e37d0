"""A shard's rows, from files to parts, without Ray and with an engine that computes nothing."""

from __future__ import annotations

import time

import numpy as np
import pytest

from pipeline.embedding import TextForm, VectorForm
from pipeline.errors import UserError
from workers.engine.request import EmbedRequest

TEXTS = [f"text number {row}" for row in range(40)]


def rows_of(desk, finished) -> list[dict]:
    return [row for index in sorted(finished) for row in desk.table(finished[index]).to_pylist()]


def test_every_split_becomes_a_part_in_input_order(desk):
    shard = desk(TEXTS, carried=("title",))
    finished = shard.run([shard.assignment(split) for split in range(5)])
    rows = rows_of(shard, finished)
    assert [row["row"] for row in rows] == list(range(40))
    assert [row["title"] for row in rows] == [f"title {row}" for row in range(40)]
    assert [row["text"].split()[1] for row in rows] == [f"{row}.0" for row in range(40)], "the key is the row's number"
    assert {row["finish_reason"] for row in rows} == {"stop"}
    assert all(row["prompt_tokens"] > 0 and row["completion_tokens"] == 3 for row in rows)
    assert {row["error_code"] for row in rows} == {None}
    counts = shard.runner.report(0).counts
    assert counts.prompt_tokens == sum(row["prompt_tokens"] for row in rows)
    assert counts.completion_tokens == 120


def test_sequences_of_several_splits_run_together(desk):
    shard = desk(TEXTS)
    shard.runner.grant([shard.assignment(split) for split in range(4)])
    while shard.runner._ahead.num_unread:  # read before the engine steps, however slowly
        time.sleep(0.001)
    shard.run([shard.assignment(4)])
    assert shard.runner._engine.most_waiting > 8


def test_samples_and_logprobs_reach_the_part(desk):
    shard = desk(TEXTS[:4], generates={"max_new_tokens": 4, "n": 3, "temperature": 1.0, "logprobs": True})
    rows = rows_of(shard, shard.run([shard.assignment(0)]))
    assert [(row["row"], row["sample"]) for row in rows] == [(row, sample) for row in range(4) for sample in range(3)]
    assert rows[0]["logprobs"] == [-0.5] * 3


@pytest.mark.parametrize("of", ["prompt", "generation", "both"])
def test_prompts_and_generations_are_embedded(desk, of):
    from cheap_engine import vector_of

    shard = desk(TEXTS[:8], embed={"of": of})
    rows = rows_of(shard, shard.run([shard.assignment(0)]))
    for row, text in zip(rows, TEXTS, strict=False):
        prompt, generation = vector_of(text), vector_of(row["text"])
        if of == "both":
            assert np.allclose(row["prompt_embedding"], prompt)
            assert np.allclose(row["generation_embedding"], generation)
        else:
            assert np.allclose(row["embedding"], prompt if of == "prompt" else generation)


def test_a_job_may_only_embed(desk):
    shard = desk(TEXTS[:8], generates=None, embed={"of": "prompt"})
    rows = rows_of(shard, shard.run([shard.assignment(0)]))
    assert {row["text"] for row in rows} == {None}
    assert all(row["prompt_tokens"] > 0 and len(row["embedding"]) == 8 for row in rows)


def test_the_embedded_text_may_be_another_than_the_prompt_and_never_passes_through_the_chat(desk):
    from cheap_engine import vector_of

    shard = desk(TEXTS[:3], prompt={"chat": True}, embed={"of": "prompt", "template": "about {{ title }}"})
    rows = rows_of(shard, shard.run([shard.assignment(0)]))
    assert [np.allclose(row["embedding"], vector_of(f"about title {n}")) for n, row in enumerate(rows)] == [True] * 3
    plain = desk(TEXTS[:3], prompt={"chat": True, "system": "be brief"}, embed={"of": "prompt"})
    rows = rows_of(plain, plain.run([plain.assignment(0)]))
    assert [np.allclose(row["embedding"], vector_of(text)) for text, row in zip(TEXTS, rows, strict=False)] == [
        True
    ] * 3
    assert rows[0]["prompt_tokens"] > 20, "the prompt itself did"


BAD = {
    "NAN": "nonfinite",
    "ZERO": "nonfinite",
    "FAIL": "nonfinite",
    "REFUSE": "internal",
    "SILENT": "empty_generation",
    "": "empty_prompt",
    "  \n": "empty_prompt",
    None: "not_text",
    "long " * 600: "prompt_too_long",
}


def test_a_bad_row_becomes_an_error_row_and_leaves_its_neighbours_alone(desk):
    texts = [text for bad in BAD for text in (bad, f"good beside {str(bad)[:4].lower()}")]
    shard = desk(texts, embed={"of": "both"}, rows_per_split=len(texts))
    rows = rows_of(shard, shard.run([shard.assignment(0)]))
    assert [row["row"] for row in rows] == list(range(len(texts)))
    assert [row["error_code"] for row in rows[::2]] == list(BAD.values())
    assert {row["error_code"] for row in rows[1::2]} == {None}
    assert all(row["error_message"] for row in rows[::2])


def test_a_prompt_that_is_too_long_is_cut_where_that_is_asked_for(desk):
    shard = desk(
        ["long " * 600, "short"],
        on_too_long="truncate",
        max_context=64,
        prompt={"column": None, "template": "A {{ body }} Z"},
    )
    rows = rows_of(shard, shard.run([shard.assignment(0)]))
    assert [row["error_code"] for row in rows] == [None, None]
    assert 40 < rows[0]["prompt_tokens"] <= 60, "room is left for the 4 tokens to be generated"


def test_the_rest_of_a_split_is_added_to_what_is_there(desk):
    shard = desk(TEXTS, rows_per_split=20)
    first = shard.run([shard.assignment(1, stop=7)])[1]
    early = shard.table(first).to_pylist()
    assert [row["row"] for row in early] == list(range(20, 27))
    base = publish(shard, first)
    second = shard.run([shard.assignment(1, start=7, revision=1, base=base)])[1]
    rows = shard.table(second).to_pylist()
    assert [row["row"] for row in rows] == list(range(20, 40))
    assert rows[:7] == early
    assert second.attempt["rows"] == 20


def test_failed_rows_run_again_and_the_others_do_not(desk, monkeypatch):
    texts = [*TEXTS[:5], "FAIL one", *TEXTS[5:8], "FAIL two", *TEXTS[8:10]]
    shard = desk(texts, rows_per_split=12)
    first = shard.run([shard.assignment(0)])[0]
    assert first.attempt["errors"] == 2
    asked: list[int] = []
    engine = shard.runner._engine
    monkeypatch.setattr(engine, "_text", lambda request: "mended")
    add = engine.add
    monkeypatch.setattr(engine, "add", lambda request: (asked.append(request.key), add(request)))
    again = shard.assignment(0, stop=8, revision=1, base=publish(shard, first), retry_errors=True)
    second = shard.run([again])[0]
    assert asked == [5], "row 9 fails too, but only rows below 8 were asked for"
    rows = shard.table(second).to_pylist()
    assert [row["row"] for row in rows] == list(range(12))
    assert [row["row"] for row in rows if row["error_code"]] == [9]


def test_a_condemned_row_is_not_run(desk):
    shard = desk(["DIE", *TEXTS[:3]])
    (finished,) = shard.run([shard.assignment(0, stop=1, condemned=True)]).values()
    (row,) = shard.table(finished).to_pylist()
    assert row["error_code"] == "worker_killed"


def test_a_revoked_assignment_is_forgotten(desk):
    shard = desk(TEXTS)
    shard.runner.grant([shard.assignment(0), shard.assignment(1), shard.assignment(2)])
    shard.runner.revoke(1, 0)
    shard.start()
    seen: set[int] = set()
    deadline = time.monotonic() + 60
    while len(seen) < 2 and time.monotonic() < deadline:
        seen |= {finished.index for finished in shard.runner.report(0.1).finished}
    assert seen == {0, 2}
    assert not shard.runner._flights


def test_no_report_counts_a_row_twice_or_takes_one_back(desk, monkeypatch):
    """Parts are written and handed over while a step goes on."""
    shard = desk(TEXTS)
    engine = shard.runner._engine
    engine.rows_a_step, step = 4, engine.step

    def slow_step():
        time.sleep(0.03)
        return step()

    monkeypatch.setattr(engine, "step", slow_step)
    shard.start()
    shard.runner.grant([shard.assignment(split) for split in range(5)])
    handed_over, seen = 0, [0]
    deadline = time.monotonic() + 60
    while handed_over < len(TEXTS) and time.monotonic() < deadline:
        report = shard.runner.report(0.01)
        handed_over += sum(finished.attempt["rows"] for finished in report.finished)
        seen.append(handed_over + report.counts.unreported_rows)
    assert seen == sorted(seen)
    assert seen[-1] == handed_over == len(TEXTS)


def test_a_shard_asks_for_more_before_it_runs_dry(desk):
    shard = desk(TEXTS)
    report = shard.runner.report(0)
    assert (report.phase, report.received, report.wanted) == ("running", 0, 2)
    began = time.monotonic()
    assert shard.runner.report(0.2).wanted == 2
    assert time.monotonic() - began >= 0.2, "told once, it does not tell again at once"
    shard.run([shard.assignment(0), shard.assignment(1)])
    report = shard.runner.report(0)
    assert (report.received, report.wanted) == (2, 2)


def test_a_step_that_breaks_ends_the_shard_as_if_it_had_crashed(desk):
    shard = desk(["fine", "BREAK"])
    shard.start()
    shard.runner.grant([shard.assignment(0)])
    report = shard.runner.report(5)
    while report.phase != "stopped":
        report = shard.runner.report(5)
    assert report.failure is not None
    assert (report.failure.kind, report.failure.message) == ("crash", "RuntimeError: this step breaks")


def test_a_full_disk_ends_the_job_in_one_line(desk, monkeypatch):
    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    shard = desk(TEXTS[:4])
    shard.start()
    monkeypatch.setattr("os.fsync", refuse)
    shard.runner.grant([shard.assignment(0)])
    report = shard.runner.report(5)
    while report.failure is None:
        report = shard.runner.report(5)
    assert report.failure.kind == "job"
    assert "no space left" in report.failure.message
    assert "\n" not in report.failure.message


def test_an_input_that_has_gone_ends_the_job_in_one_line(desk):
    shard = desk(TEXTS[:4])
    shard.start()
    (shard.folder.root.parent / "rows.parquet").unlink()
    shard.runner.grant([shard.assignment(0)])
    report = shard.runner.report(5)
    while report.failure is None:
        report = shard.runner.report(5)
    assert (report.failure.kind, "is gone since the job was planned" in report.failure.message) == ("job", True)


def publish(shard, finished):
    """What the controller does with an attempt, so that it can be a base."""
    from pipeline.attempt import Attempt
    from pipeline.commits import CommitLog
    from workers.assignment import Base

    log = CommitLog(shard.folder, fingerprint="f")
    commit = log.commit(Attempt.from_json(finished.attempt))
    log.publish(commit)
    return Base(part=commit.part, sha256=commit.sha256, rows=commit.rows)


def test_a_prompt_that_is_the_passage_too_is_read_once(desk):
    from cheap_engine import vector_of

    for chat, requests in ((False, 8), (True, 16)):
        shard = desk(TEXTS[:8], prompt={"chat": chat}, embed={"of": "prompt"})
        added, engine = [], shard.runner._engine
        engine.add = lambda request, add=engine.add, added=added: (added.append(request), add(request))
        rows = rows_of(shard, shard.run([shard.assignment(0)]))
        assert len(added) == requests
        for row, text in zip(rows, TEXTS, strict=False):
            assert row["text"]
            assert np.allclose(row["embedding"], vector_of(text))


def test_passages_and_generations_follow_the_passage_prompt(desk):
    from cheap_engine import vector_of

    text_form = TextForm(prompt="passage: ", include_prompt=False)
    shard = desk(TEXTS[:4], embed={"of": "both", "text": text_form})
    added, engine = [], shard.runner._engine
    engine.add = lambda request, add=engine.add: (added.append(request), add(request))
    for row, text in zip(rows_of(shard, shard.run([shard.assignment(0)])), TEXTS, strict=False):
        assert np.allclose(row["prompt_embedding"], vector_of(f"passage: {text}"))
        assert np.allclose(row["generation_embedding"], vector_of(f"passage: {row['text']}"))
    embeds = [request for request in added if isinstance(request, EmbedRequest)]
    skipped = len(shard.runner._preparation._tokenizer.encode("passage: "))
    assert {request.vector.pooled_from for request in embeds} == {skipped}


def test_vectors_of_a_width_that_the_model_has_not_are_refused(desk):
    with pytest.raises(UserError, match=r"embed\.dimensions: 9, and the model's hidden states have 8"):
        desk(TEXTS[:1], embed={"of": "prompt", "form": VectorForm(dimensions=9)})
    with pytest.raises(UserError, match=r"embed\.routing_weight: 1\.0, and the model has no experts"):
        desk(TEXTS[:1], embed={"of": "prompt", "form": VectorForm(routing_weight=1.0)})
