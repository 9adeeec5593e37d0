"""The report as one page: report.html. It asks no network for anything, and runs no script but its own."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.metadata import version
from typing import Any

import jinja2
from markupsafe import Markup

from jobs.corpus.corpus_map import CorpusMap
from jobs.page.canvas import printable, short_number
from jobs.page.charts import histogram, shares, throughput
from jobs.page.heat_map import expert_maps
from jobs.page.point_map import point_map
from jobs.page.recall import recall_chart, recall_trials
from jobs.terminal import human_bytes, human_seconds

Fact = tuple[str, str]


def render(report: Mapping[str, Any], spec_yaml: str, corpus_map: CorpusMap | None = None) -> str:
    """The page for a report as `jobs.report` makes it, the job it is about, and the map of its corpus if it has one.

    All text in it is escaped, since it may come from rows. The page's policy lets no other script run than the one
    whose hash it names, should a text get past that.
    """
    rows, runs, index = report["rows"], report["runs"], report["index"]
    trials = recall_trials(index, runs)
    finished = report["state"] == "finished"
    script = _asset("tips.js")
    return _template().render(
        report=report,
        state="finished" if finished else f"{report['state']} at {rows['done']:,} of {rows['total']:,} rows",
        tiles=_tiles(report),
        what_ran=_what_ran(report),
        errors=report["errors"],
        throughput=throughput(runs),
        generates=bool(report["tokens"]["completion"]),
        phases=[
            (f"Run {number}" if len(runs) > 1 else "Where it went", shares("Seconds", seconds, say="seconds"))
            for number, seconds in enumerate((run.get("seconds") for run in runs), start=1)
            if seconds
        ],
        deaths=_deaths(runs),
        lengths=_lengths(report["lengths"]),
        endings=shares("How generations ended", report["finish_reasons"]) if report["finish_reasons"] else None,
        experts=expert_maps(report.get("experts")),
        index=_index(index),
        recall=recall_chart(trials, index["recall"]["target"], index["recall"]["k"]) if trials else None,
        trials=trials,
        map=point_map(corpus_map) if corpus_map is not None else None,
        corpus=corpus_map,
        spec_yaml=spec_yaml,
        version=version("gristmill"),
        style=Markup(_asset("page.css")),
        script=Markup(script),
        script_hash=f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}",
    )


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("jobs.page", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=lambda value: value if isinstance(value, Markup) else printable(value),
        keep_trailing_newline=True,
    )
    environment.filters["thousands"] = lambda number: f"{number:,}"
    return environment.get_template("page.html.jinja")


@cache
def _asset(name: str) -> str:
    loader = jinja2.PackageLoader("jobs.page", ".")
    return loader.get_source(jinja2.Environment(), name)[0]


def _tiles(report: Mapping[str, Any]) -> list[Fact]:
    rows, tokens, runs = report["rows"], report["tokens"], report["runs"]
    tiles = [("rows done", f"{rows['done']:,}"), ("of them failed", f"{rows['errors']:,}")]
    tiles.append(("prompt tokens", f"{tokens['prompt']:,}"))
    if tokens["completion"]:
        tiles.append(("generated tokens", f"{tokens['completion']:,}"))
    at_work = sum(run["elapsed_s"] for run in runs)
    if at_work:
        done = sum(run["prompt_tokens"] + run["completion_tokens"] for run in runs)
        tiles += [
            ("tokens a second", f"{done / at_work:,.0f}"),
            ("rows a second", short_number(sum(run["rows"] for run in runs) / at_work)),
        ]
    return [*tiles, ("time at work", human_seconds(at_work))]


def _what_ran(report: Mapping[str, Any]) -> list[Fact]:
    spec, runs = report["spec"], report["runs"]
    facts = [("model", spec["model"]), ("input", _input(spec["input"]))]
    if spec["generate"] is not None:
        facts.append(("generates", f"up to {spec['generate']['max_new_tokens']:,} tokens a row"))
    if spec["embed"] is not None:
        facts.append(("embeds", f"the {spec['embed']['of']}, pooling {spec['embed']['pooling']}"))
    facts.append(("output", spec["output"]["path"]))
    if runs:
        facts.append(("first started", runs[0]["started_at"]))
        facts.append(
            (
                "runs",
                "1" if len(runs) == 1 else f"{len(runs)}: resumed {len(runs) - 1} time{'s' if len(runs) > 2 else ''}",
            )
        )
        layout = runs[-1].get("layout") or {}
        if layout:
            shards = f"{layout['replicas']} replica{'s' if layout['replicas'] != 1 else ''}"
            shards += f" of {layout['ranks']} ranks" if layout["ranks"] > 1 else ""
            why = layout["why"] if report.get("experts") else ""  # it says why so many ranks share the experts
            facts.append(("laid out as", f"{shards}: {why}" if why else shards))
    facts.append(("fingerprint", report["fingerprint"]))
    return facts


def _input(source: Mapping[str, Any]) -> str:
    path = source["path"]
    return f"the rows of {source['job']}" if not path else path if isinstance(path, str) else ", ".join(path)


def _deaths(runs: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return [
        {
            "run": number,
            "at": human_seconds(death["at_s"]),
            "replica": death["replica"],
            "reason": death["reason"],
            "noticed": _seconds(death.get("unheard_s")),
            "again": f"{death['splits_again']:,}" if "splits_again" in death else "–",
            "recovered": _seconds(death.get("recovered_after_s")),
            "ranks": f"{death['ranks']}" if "ranks" in death else "as before",
        }
        for number, run in enumerate(runs, start=1)
        for death in run.get("deaths", ())
    ]


def _seconds(value: float | None) -> str:
    return "–" if value is None else f"{value:,.1f} s"


def _lengths(lengths: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, Markup, str]]:
    titles = {"prompt_tokens": "Prompts", "completion_tokens": "Generations"}
    return [
        (title, histogram(title, found["counts"], found["edges"], unit="tokens"), _spread(found))
        for name, title in titles.items()
        if sum((found := lengths[name])["counts"])
    ]


def _spread(found: Mapping[str, Any]) -> str:
    return f"{found['mean']:,.1f} on average, half up to {found['median']:,}, 95% up to {found['p95']:,}"


def _recall(recall: Mapping[str, Any]) -> str:
    if not recall["num_queries"]:
        return "exact" if recall["reached"] == 1 else "not measured"
    asked = f"{recall['target']:g} were asked for; measured with {recall['num_queries']:,} vectors of the corpus"
    return f"{recall['reached']:.3f} of the {recall['k']} nearest are found ({asked})"


def _not_its_own(index: Mapping[str, Any]) -> str:
    of_others = f", of {index['jobs']:,} jobs" if index["jobs"] > 1 else ""
    return of_others + (f", {index['deleted']:,} of them deleted" if index["deleted"] else "")


def _index(index: Mapping[str, Any] | None) -> list[Fact]:
    if index is None:
        return []
    facts = [
        ("kind", index["kind"]),
        ("vectors", f"{index['vectors']:,} of {index['dimension']:,} dimensions{_not_its_own(index)}"),
        ("shards", f"{index['shards']:,}"),
        ("size", human_bytes(index["bytes"])),
        ("pooling", index["pooling"]),
        ("recall", _recall(index["recall"])),
    ]
    efforts = sorted({shard["effort"] for shard in index["efforts"] if shard["effort"] is not None})
    if efforts:
        facts.append(("effort", " to ".join(f"{effort:,}" for effort in dict.fromkeys((efforts[0], efforts[-1])))))
    facts += [("given up", f"{missed['kind']}: found {missed['reached']:.3f}") for missed in index["missed"]]
    return facts if index["current"] else [*facts, ("state", "older than the parts")]
