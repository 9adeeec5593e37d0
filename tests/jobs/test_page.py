"""The report's page: readable without a network, well formed, and safe to open whatever the rows hold."""

from __future__ import annotations

import base64
import hashlib
import re
import tomllib
import xml.etree.ElementTree as ET
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from jobs.corpus.corpus_map import CorpusMap, MapPoint
from jobs.page.canvas import short_number
from jobs.page.render import render
from jobs.report import histogram

HOSTILE = "</script><script>alert(1)</script> <img src=x onerror=alert(1)> {{ 7 * 7 }} \"'&\x00\x1b\ud800 end"


def run(length_s: int, **facts: Any) -> dict[str, Any]:
    ticks = list(range(length_s + 1))
    series = {
        "seconds": ticks,
        "rows": ticks,
        "prompt_tokens": [8 * tick for tick in ticks],
        "completion_tokens": [2 * tick for tick in ticks],
    }
    return {
        "started_at": "2026-01-01T00:00:00+0000",
        "elapsed_s": length_s,
        "rows": length_s,
        "prompt_tokens": 8 * length_s,
        "completion_tokens": 2 * length_s,
        "tokens_per_s": 10.0,
        "series": series,
        **facts,
    }


def index_facts(kind: str, *, num_queries: int = 0, efforts: tuple[int | None, ...] = (None,)) -> dict[str, Any]:
    return {
        "kind": kind,
        "vectors": 2,
        "dimension": 8,
        "shards": len(efforts),
        "bytes": 4096,
        "recall": {"target": 0.95, "reached": 0.96 if num_queries else 1.0, "num_queries": num_queries, "k": 10},
        "missed": [],
        "efforts": [{"effort": effort, "recall": 0.96, "trials": []} for effort in efforts],
        "pooling": "mean",
        "jobs": 1,
        "deleted": 0,
        "current": True,
    }


def report(**changes: Any) -> dict[str, Any]:
    return {
        "name": "summaries",
        "model": "a/model",
        "fingerprint": "0123abcd",
        "state": "finished",
        "rows": {"total": 3, "done": 3, "ok": 2, "errors": 1},
        "errors": {"template_error": {"count": 1, "examples": [{"row": 2, "id": "doc-2", "message": "no title"}]}},
        "tokens": {"prompt": 30, "completion": 12},
        "finish_reasons": {"stop": 2},
        "lengths": {
            "prompt_tokens": histogram(Counter({10: 3})),
            "completion_tokens": histogram(Counter({5: 1, 70: 1})),
        },
        "index": index_facts("Flat"),
        "runs": [run(4, seconds={"starting": 4.0, "rows": 30.0})],
        "spec": {
            "model": "a/model",
            "input": {"path": "rows.parquet", "job": None},
            "generate": {"max_new_tokens": 8},
            "embed": {"of": "prompt", "pooling": "mean"},
            "output": {"path": "out"},
        },
    } | changes


class Page(HTMLParser):
    """What a browser would find: tags with their attributes, and the text of each kind of element."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: dict[str, list[str]] = {}
        self._open: list[str] = []
        self.feed(page)
        self.close()
        assert not self._open, f"never closed: {self._open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "br"):
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text.setdefault(self._open[-1] if self._open else "", []).append(data)


def figures(page: str) -> list[ET.Element]:
    return [ET.fromstring(found) for found in re.findall(r"<svg.*?</svg>", page, re.DOTALL)]


def test_the_page_fetches_nothing_and_runs_no_script_but_its_own() -> None:
    text = render(report(), "model: a/model\n")
    page = Page(text)
    assert not {"link", "img", "iframe", "object", "base"} & {tag for tag, _ in page.tags}
    assert not {"src", "href", "action"} & {name for _, attributes in page.tags for name in attributes}
    assert not re.search(r"url\(|@import", text)
    (script,) = page.text["script"]
    (policy,) = [found["content"] for tag, found in page.tags if "http-equiv" in found]
    assert policy is not None
    assert f"script-src 'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'" in policy
    assert policy.startswith("default-src 'none';")


def test_texts_of_rows_stay_texts() -> None:
    hostile = report(
        name=HOSTILE,
        errors={HOSTILE: {"count": 1, "examples": [{"row": 2, "id": HOSTILE, "message": HOSTILE}]}},
        finish_reasons={HOSTILE: 2},
        runs=[run(4, deaths=[{"replica": 0, "at_s": 1.0, "reason": HOSTILE}], seconds={HOSTILE: 3.0})],
    )
    text = render(hostile, HOSTILE)
    text.encode("utf-8")
    page, calm = Page(text), Page(render(report(), ""))
    assert [tag for tag, _ in page.tags].count("script") == [tag for tag, _ in calm.tags].count("script") == 1
    assert "img" not in {tag for tag, _ in page.tags}
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert "{{ 7 * 7 }}" in "".join(page.text["pre"]), "what rows hold is no template"
    assert "\x00" not in text
    assert "\x1b" not in text
    for figure in figures(text):
        assert figure.get("viewBox")


def test_every_figure_is_well_formed_has_a_name_and_keeps_its_text_inside() -> None:
    tried = [trial(4, 0.81, 0.1), trial(16, 0.97, 0.4)]
    runs = [run(20_000, seconds={"starting": 4.0, "rows": 30.0}, index_trials=tried), run(50)]
    index = index_facts("IVF64,Flat", num_queries=100, efforts=(16,))
    page = render(report(experts=experts(61, 256, num_ranks=8), index=index, runs=runs), "")
    drawn = [figure for figure in figures(page) if "figure" in figure.get("class", "")]
    assert len(drawn) == 8
    for figure in drawn:
        assert figure.get("aria-label")
        _, _, width, height = map(float, figure.get("viewBox", "").split())
        for text in figure.iter("text"):
            x, y, room = float(text.get("x", "")), float(text.get("y", "")), 6.2 * len(text.text or "")
            begin = x - {"start": 0.0, "middle": 0.5, "end": 1.0}[text.get("text-anchor", "start")] * room
            assert begin >= -1, text.text
            assert begin + room <= width + 1, text.text
            assert 0 < y <= height, text.text


def test_a_wide_figure_scrolls_in_a_narrow_window_instead_of_shrinking() -> None:
    corpus = CorpusMap(
        rows=1,
        method="PCA",
        centred=False,
        grouped_by="",
        groups=(("all", 1),),
        points=(MapPoint(x=0.0, y=0.0, row=0, id="0", group=0, text="text", generation=None),),
        failed=(),
    )
    page = render(report(experts=experts(2, 64)), "", corpus)
    sizes = re.findall(r'(<div class="scroll">)?<svg class="figure( broad)?" viewBox="0 0 (\d+)', page)
    assert sorted(int(width) for *_, width in sizes) == [460, 460, 460, 460, 940, 940, 940]
    assert all(bool(scrolls) == bool(broad) == (width == "940") for scrolls, broad, width in sizes)
    assert "svg.broad { width:" in page


def test_bars_are_as_high_as_their_counts() -> None:
    lengths = {"prompt_tokens": histogram(Counter({1: 10, 2: 5, 4: 20})), "completion_tokens": histogram(Counter())}
    (drawn,) = [f for f in figures(render(report(lengths=lengths), "")) if "Prompts" in f.get("aria-label", "")]
    heights = [float(bar.get("height", "")) for bar in drawn.iter("rect") if bar.get("class") == "bar"]
    assert heights == pytest.approx([heights[3] / 2, heights[3] / 4, 0, heights[3]], abs=0.2)
    said = [title.text for title in drawn.iter("title")]
    assert said == ["1 tokens: 10", "2 tokens: 5", "3 tokens: 0", "4 tokens: 20"]


def test_throughput_is_drawn_over_all_runs_with_a_seam_where_one_was_resumed() -> None:
    text = render(report(runs=[run(40), run(20)]), "")
    (drawn,) = [figure for figure in figures(text) if "Tokens a second" in figure.get("aria-label", "")]
    assert [found.text for found in drawn.iter("text") if found.text == "resumed"] == ["resumed"]
    said = [title.text or "" for title in drawn.iter("title")]
    assert all("8 tokens/s read, 2 generated, 1 rows/s" in line for line in said)
    assert said[0].startswith("0:00 to 0:01")
    assert said[-1].startswith("0:59 to 1:00")
    assert "resumed 1 time" in text


def test_rows_of_many_thousands_a_second_are_written_without_exponents() -> None:
    fast = run(40)
    fast["series"]["rows"] = [1850 * tick for tick in fast["series"]["seconds"]]
    text = render(report(runs=[fast | {"rows": 1850.3 * 40}]), "")
    assert "<dt>rows a second</dt><dd>1,850</dd>" in text
    assert "2 generated, 1,850 rows/s" in text


@pytest.mark.parametrize(
    ("value", "said"),
    [(0, "0"), (0.25, "0.25"), (2.084, "2.08"), (999.7, "1,000"), (51_234.0, "51.2k"), (999_700, "1M"), (2e9, "2G")],
)
def test_a_short_number_has_no_exponent(value: float, said: str) -> None:
    assert short_number(value) == said


def test_a_rest_too_short_to_have_a_speed_belongs_to_the_stretch_before_it() -> None:
    burst, last = run(600), {"seconds": 600.5, "rows": 700, "prompt_tokens": 5600, "completion_tokens": 1400}
    burst["series"] = {name: [*values, last[name]] for name, values in burst["series"].items()}
    (drawn,) = [f for f in figures(render(report(runs=[burst]), "")) if "Tokens a second" in f.get("aria-label", "")]
    said = [title.text or "" for title in drawn.iter("title")]
    assert said[0].startswith("0:00 to 0:11: 8 tokens/s read")
    assert len(said) <= 60
    assert "tokens/s read" in said[-1]
    assert float(said[-1].split(": ")[1].split()[0].replace(",", "")) < 200, "and not 1,600"


def test_a_run_that_had_no_rows_to_do_has_no_throughput() -> None:
    idle = run(0) | {"series": {key: [0, 0] for key in ("seconds", "rows", "prompt_tokens", "completion_tokens")}}
    text = render(report(runs=[idle, run(40), idle]), "")
    (drawn,) = [figure for figure in figures(text) if "Tokens a second" in figure.get("aria-label", "")]
    assert not [found for found in drawn.iter("text") if found.text == "resumed"]
    assert "Tokens a second over" not in render(report(runs=[idle]), "")


def test_a_run_that_was_looked_at_once_has_no_speed_beside_others() -> None:
    long, once = run(60), run(60)
    once["series"] = {name: counts[-1:] for name, counts in once["series"].items()}
    assert "Tokens a second over" not in render(report(runs=[once]), "")
    assert "Tokens a second over" in render(report(runs=[long, once]), "")


def test_a_job_without_rows_runs_index_or_errors_has_a_page_too() -> None:
    empty = histogram(Counter())
    page = render(
        report(
            state="stopped",
            rows={"total": 10, "done": 0, "ok": 0, "errors": 0},
            errors={},
            tokens={"prompt": 0, "completion": 0},
            finish_reasons={},
            lengths={"prompt_tokens": empty, "completion_tokens": empty},
            index=None,
            runs=[],
        ),
        "",
    )
    assert "stopped at 0 of 10 rows" in page
    assert [tag for tag, _ in Page(page).tags].count("svg") == 0


def test_deaths_say_how_long_the_rows_stood_still() -> None:
    deaths = [
        {
            "replica": 1,
            "at_s": 75.0,
            "reason": "rank 2 was killed",
            "unheard_s": 0.75,
            "splits_again": 4,
            "recovered_after_s": 3.25,
            "ranks": 3,
        },
        {"replica": 0, "at_s": 80.0, "reason": "rank 0 was killed", "recovered_after_s": None},
    ]
    page = render(report(runs=[run(4), run(100, deaths=deaths)]), "")
    assert '<td class="number">1:15</td>' in page
    cells = re.findall(r'<td class="number">(.*?)</td>', page)
    assert cells[-14:-7] == ["2", "1:15", "1", "0.8 s", "4", "3.2 s", "3"]
    assert cells[-7:] == ["2", "1:20", "0", "–", "–", "–", "as before"]
    assert "rank 0 was killed" in page


def experts(num_layers: int, num_experts: int, num_ranks: int = 0) -> dict[str, Any]:
    gang = {
        "gang": "worker-0.1",
        "nodes": list(range(num_ranks)),
        "rows": [[10 * rank for rank in range(num_ranks)]] * num_layers,
        "balance": {"predicted": None, "achieved": 1.25, "round_robin": 2.5},
    }
    return {
        "layers": [3 + layer for layer in range(num_layers)],
        "rows": [list(range(num_experts))] * num_layers,
        "gangs": [gang] if num_ranks else [],
    }


def test_a_cell_is_as_dark_as_its_expert_is_busy() -> None:
    text = render(report(experts=experts(2, 4, num_ranks=2)), "")
    by_expert, by_rank = (f for f in figures(text) if (f.get("aria-label") or "").startswith("Load of each"))
    cells = [cell for cell in by_expert.iter("rect") if cell.find("title") is not None]
    assert [cell.findtext("title") for cell in cells[:4]] == [
        "layer 3, expert 0: 0 tokens, 0.00 × the mean",
        "layer 3, expert 1: 1 tokens, 0.67 × the mean",
        "layer 3, expert 2: 2 tokens, 1.33 × the mean",
        "layer 3, expert 3: 3 tokens, 2.00 × the mean",
    ]
    dark = [float(cell.get("fill-opacity", "")) for cell in cells[:4]]
    assert dark == sorted(dark)
    assert (dark[0], dark[3]) == (0.05, 1.0)
    assert len([cell for cell in by_rank.iter("rect") if cell.find("title") is not None]) == 4
    assert "The busiest rank computed 1.25 times the mean; experts dealt out in turn: 2.50." in text
    assert "2 experts of single layers were never chosen" in text


def test_a_heat_map_of_many_experts_is_bounded_and_shows_the_busiest() -> None:
    text = render(report(experts=experts(130, 1000)), "")
    assert len(text) < 800_000
    (drawn,) = (f for f in figures(text) if (f.get("aria-label") or "").startswith("Load of each"))
    cells = [cell.findtext("title") or "" for cell in drawn.iter("rect") if cell.find("title") is not None]
    assert len(cells) <= 64 * 64
    assert any("expert 999: 999 tokens, 2.00 × the mean" in cell for cell in cells)


def trial(effort: int, recall: float, seconds: float, *, shard: int = 0, kind: str = "IVF64,Flat") -> dict[str, Any]:
    name = f"shard-{shard:03d}.faiss"
    return {"kind": kind, "shard": name, "effort": effort, "recall": recall, "seconds": seconds}


def test_recall_is_drawn_against_speed_with_the_effort_that_was_chosen() -> None:
    tried = [trial(16, 0.97, 0.4), trial(4, 0.8, 0.1), trial(1, 0.99, 1.0, kind="HNSW32")]
    facts = index_facts("IVF64,Flat", num_queries=100, efforts=(16,))
    text = render(report(index=facts, runs=[run(4, index_trials=tried), run(4, index_trials=[])]), "")
    (drawn,) = (figure for figure in figures(text) if (figure.get("aria-label") or "").startswith("Recall"))
    dots = list(drawn.iter("circle"))
    assert [dot.findtext("title") for dot in dots] == [
        "effort 4: recall 0.800, 1,000 queries/s",
        "effort 16: recall 0.970, 250 queries/s, chosen",
    ]
    assert [dot.get("class") for dot in dots] == ["tried", "chosen"]
    assert float(dots[0].get("cx", "")) < float(dots[1].get("cx", ""))
    assert float(dots[0].get("cy", "")) < float(dots[1].get("cy", "")), "faster is higher"
    assert "0.960 of the 10 nearest are found (0.95 were asked for; measured with 100 vectors of the corpus)" in text


def test_each_shard_has_a_line_of_its_own() -> None:
    tried = [trial(effort, 0.9 + 0.01 * effort, 0.1 * effort, shard=shard) for shard in (0, 1) for effort in (2, 4)]
    facts = index_facts("IVF64,Flat", num_queries=10, efforts=(2, 4))
    text = render(report(index=facts, runs=[run(4, index_trials=tried)]), "")
    (drawn,) = (figure for figure in figures(text) if (figure.get("aria-label") or "").startswith("Recall"))
    assert len(list(drawn.iter("polyline"))) == 2
    assert [dot.get("class") for dot in drawn.iter("circle")] == ["chosen", "tried", "tried", "chosen"]


def test_an_exact_index_has_no_figure_of_recall() -> None:
    text = render(report(), "")
    assert "Recall against speed" not in text
    assert "<dd>exact</dd>" in text


def test_an_index_that_was_changed_says_what_it_holds_beside_the_job_s_rows() -> None:
    assert "<dd>2 of 8 dimensions</dd>" in render(report(), "")
    text = render(report(index=index_facts("Flat") | {"vectors": 1500, "jobs": 2, "deleted": 30}), "")
    assert "<dd>1,500 of 8 dimensions, of 2 jobs, 30 of them deleted</dd>" in text


def test_only_of_experts_it_says_why_so_many_ranks_hold_them() -> None:
    laid_out = [run(4, layout={"replicas": 2, "ranks": 1, "why": "there is one machine for its experts"})]
    assert "<dd>2 replicas</dd>" in render(report(runs=laid_out, experts=None), "")
    assert "<dd>2 replicas: there is one machine" in render(report(runs=laid_out, experts=experts(2, 4)), "")


def test_an_input_of_several_files_is_named_file_by_file() -> None:
    spec = report()["spec"] | {"input": {"path": ["a.parquet", "b's.parquet"], "job": None}}
    assert "<dd>a.parquet, b&#39;s.parquet</dd>" in render(report(spec=spec), "")


def test_a_dense_model_has_no_heat_map() -> None:
    assert "Expert load" not in render(report(experts=None), "")


def test_the_page_s_files_are_in_the_distribution() -> None:
    """As setuptools finds them: the installed command has no source tree to read them from."""
    root = Path(__file__).parents[2]
    patterns = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["jobs.page"]
    packaged = {path.name for pattern in patterns for path in (root / "jobs" / "page").glob(pattern)}
    assert {path.name for path in (root / "jobs" / "page").iterdir() if path.suffix not in (".py", "")} == packaged
