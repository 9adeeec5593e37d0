"""The `gristmill` command. Whatever is slow to import is imported inside a command, so that --help answers at once.

Exit status: 0 done, 1 the job failed or is not whole, 2 the request was wrong, 130 interrupted. With --json the answer
is one document on standard output, also where something went wrong: {"error": ..., "exit_status": ...}.
"""

from __future__ import annotations

import shlex
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import typer

from jobs.answers import INTERRUPTED, Answers
from jobs.index.index_cli import index_app
from jobs.stop_signals import expect_end, interrupt_on_signals
from jobs.submitting.cluster_commands import (
    Address,
    AsJson,
    Target,
    cancel,
    is_submission_id,
    logs,
    submit,
    submitted_status,
)
from jobs.terminal import reserved_stdout, say
from pipeline.errors import JobError, UserError

app = typer.Typer(
    help="Batch generation, embedding and similarity search with decoder language models, on a Ray cluster.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
tokenizer_app = typer.Typer(help="Vocabularies.", rich_markup_mode=None)
app.add_typer(tokenizer_app, name="tokenizer")
app.add_typer(index_app, name="index")

JobFile = Annotated[Path, typer.Argument(metavar="JOB.yaml", help="The job file.", show_default=False)]
JobDirectory = Annotated[Path, typer.Argument(metavar="OUT", help="A job directory.", show_default=False)]


@app.command()
def plan(job: JobFile) -> None:
    """What would run, its memory and its estimated time. Changes nothing."""
    from jobs.plan import make_plan
    from jobs.specfile import load_spec

    print(make_plan(load_spec(job)).describe())


@app.command()
def run(
    context: typer.Context,
    job: JobFile,
    output: Annotated[Path | None, typer.Option(metavar="DIR", help="Instead of the job's output.path.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a setting.")
    ] = None,
    limit: Annotated[int | None, typer.Option(metavar="N", min=1, help="Only the first N rows, for now.")] = None,
    retry_errors: Annotated[bool, typer.Option("--retry-errors", help="Run the failed rows again.")] = False,
    as_json: AsJson = False,
) -> int:
    """Run a job, or resume it where it stopped. Asked again when done, it does nothing."""
    from jobs.specfile import load_spec

    spec = load_spec(job, settings or (), output=str(output) if output else None)
    return _run(spec, context.obj, limit=limit, retry_errors=retry_errors)


@app.command()
def status(context: typer.Context, out: Target, address: Address = None, as_json: AsJson = False) -> None:
    """A job's progress: from its directory, or of a submitted job from the cluster."""
    from jobs.status import describe_status, job_status

    if address is None and not is_submission_id(out):
        if "/" not in out and not Path(out).exists():
            raise UserError(f"{out}: no such job directory; for a submitted job, name its cluster with --address URL")
        found = job_status(Path(out))
        context.obj.answer(found, describe_status(found))
    else:
        context.obj.answer(*submitted_status(out, address))


for submitting in (submit, logs, cancel):
    app.command()(submitting)


@app.command()
def verify(context: typer.Context, out: JobDirectory, as_json: AsJson = False) -> int:
    """Check that nothing is missing, changed or there twice. Exit status 0 only if so."""
    from jobs.status import describe_audit
    from pipeline.audit import audit

    found = audit(out)
    context.obj.answer(found.to_json(), describe_audit(out, found))
    return 0 if found.ok else 1


@app.command()
def query(
    context: typer.Context,
    out: Annotated[
        Path,
        typer.Argument(
            metavar="OUT", help="A job directory; with --address also the name it is served as.", show_default=False
        ),
    ],
    text: Annotated[
        list[str] | None, typer.Argument(metavar="TEXT", help="What to look for.", show_default=False)
    ] = None,
    k: Annotated[int, typer.Option("-k", min=1, help="How many hits a query.")] = 10,
    vector: Annotated[
        Path | None, typer.Option(metavar="FILE.npy", help="Vectors to look for instead: [d] or [n, d].")
    ] = None,
    file: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Texts to look for instead: a row each, of any format."),
    ] = None,
    column: Annotated[str | None, typer.Option(metavar="C", help="The column of --file that holds them.")] = None,
    where: Annotated[
        str | None,
        typer.Option("--filter", metavar="EXPR", help="Only rows like this, by carried columns: \"lang == 'en'\"."),
    ] = None,
    id: Annotated[str | None, typer.Option("--id", metavar="C", help="With --output: the column with ids.")] = None,
    output: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="With --file, for many: a job that writes neighbours there, or resumes."),
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(metavar="ADDRESS", help="Ask the index served on this Ray; with --output: the Ray to use."),
    ] = None,
    as_json: AsJson = False,
) -> int | None:
    """The nearest rows by cosine similarity, best first."""
    from jobs.index.query import (
        describe_results,
        query_texts,
        query_vectors,
        read_vectors,
        refuse_other_than_texts,
    )
    from jobs.index.query_file import read_queries

    if bool(text) + (vector is not None) + (file is not None) != 1:
        raise UserError("query: give either a TEXT, --file FILE or --vector FILE.npy")
    if column is not None and file is None:
        raise UserError(f"query: --column {column} names a column of --file FILE, which is not given")
    if output is not None:
        if file is None:
            raise UserError(f"query: --output {output} is for the queries of --file FILE, which is not given")
        return _query_many(
            context.obj, out, file, output, k=k, column=column, id_column=id, filter=where, address=address
        )
    if id is not None:
        raise UserError(f"query: --id {id} is for neighbours that are written with --output DIR, which is not given")
    texts = read_queries(file, column) if file is not None else text or []
    refuse_other_than_texts(texts)  # before Ray is joined, which takes no argument that is not valid UTF-8
    if address is not None:
        from jobs.index.served import connect

        with connect(out, address) as served:
            if vector is None:
                results = served.search(texts, k, filter=where)
            else:
                names, vectors = read_vectors(vector)
                results = served.search_vectors(vectors, k, names=names, filter=where)
    else:
        results = (
            query_texts(out, texts, k, filter=where) if vector is None else query_vectors(out, vector, k, filter=where)
        )
    context.obj.answer({"results": [result.to_json() for result in results]}, describe_results(results))
    return None


@app.command("serve-index")
def serve_index(
    context: typer.Context,
    out: JobDirectory,
    address: Annotated[
        str | None,
        typer.Option(metavar="ADDRESS", help="The Ray to serve it on; else RAY_ADDRESS, else its own."),
    ] = None,
    name: Annotated[
        str | None, typer.Option(metavar="NAME", help="What clients may call it; else its directory.")
    ] = None,
    device: Annotated[
        Literal["auto", "cpu", "cuda"] | None, typer.Option(help="Where queries are embedded; else as the job says.")
    ] = None,
    as_json: AsJson = False,
) -> int:
    """Keep an index and its model loaded, for `query --address` and the Python client, until Ctrl-C."""
    from jobs.index.served import serving

    try:
        with serving(out, address=address, name=name, device=device, on_change=say) as about:
            words = (
                f"serving {about['output']}: {about['vectors']:,} vectors, {about['kind']}, shards: {about['shards']}, "
                f"model {about['model']}\nask with: gristmill query {shlex.quote(name or str(out))} TEXT "
                f"--address {about['address']}"
            )
            context.obj.answer(about, words)
            sys.stdout.flush()
            if about["shards_asked_by"] == "ray":
                say("some shards' own ports can't be reached: they are asked through Ray, which takes longer")
            while True:
                time.sleep(3600)
    except (KeyboardInterrupt, SystemExit) as stop:
        if isinstance(stop, SystemExit) and stop.code != signal.SIGTERM:  # as Ray answers SIGTERM while it starts
            raise
        say(f"stopped serving {out}")
    return 0


@app.command()
def export(
    context: typer.Context,
    out: JobDirectory,
    atlas: Annotated[bool, typer.Option("--atlas", help="As embedding-atlas reads it.")] = False,
    output: Annotated[
        Path | None, typer.Option(metavar="FILE.parquet", help="Instead of OUT/atlas.parquet.", show_default=False)
    ] = None,
    as_json: AsJson = False,
) -> None:
    """A job's texts and vectors for other programs: with --atlas, Parquet to look at with embedding-atlas."""
    from jobs.corpus.atlas import export_atlas

    if not atlas:
        raise UserError("export: say as what: --atlas")
    done = export_atlas(out, output)
    context.obj.answer(done.to_json(), done.describe())


@app.command()
def embed(
    context: typer.Context,
    source: Annotated[
        str, typer.Argument(metavar="INPUT", help="A file, a folder, a glob or a URI.", show_default=False)
    ],
    model: Annotated[str, typer.Option(metavar="M", help="The model.", show_default=False)],
    output: Annotated[Path, typer.Option(metavar="OUT", help="The job directory.", show_default=False)],
    column: Annotated[str | None, typer.Option(metavar="C", help="The column that holds the text.")] = None,
) -> int:
    """Embed a corpus and index it: shorthand for such a job."""
    from jobs.specfile import parse_spec

    settings: dict[str, Any] = {
        "name": output.name or "embed",
        "model": model,
        "input": {"path": source},
        "embed": {},
        "output": {"path": str(output)},
    }
    if column is not None:
        settings["prompt"] = {"column": column}
    return _run(parse_spec(settings, where="embed"), context.obj)


@app.command()
def generate(
    model: Annotated[str, typer.Option(metavar="M", help="The model.", show_default=False)],
    prompt: Annotated[str, typer.Option(metavar="TEXT", help="What to ask it.", show_default=False)],
    max_new_tokens: Annotated[int, typer.Option(metavar="N", min=1, help="Tokens of the answer, at most.")] = 64,
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "int8"], typer.Option(help="Of the weights, as cluster.dtype.")
    ] = "auto",
) -> None:
    """Answer one prompt, to try a model. Runs here, without Ray."""
    from jobs.trial import answer_prompt

    print(answer_prompt(model, prompt, max_new_tokens=max_new_tokens, dtype=dtype))


@app.command()
def upcycle(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A dense checkpoint.", show_default=False)],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The directory to write.", show_default=False)],
    experts: Annotated[int, typer.Option(min=1, help="Experts a layer.")] = 8,
    top_k: Annotated[
        int | None, typer.Option("--top-k", min=1, help="Experts a token: 2, or with --split all.", show_default=False)
    ] = None,
    split: Annotated[
        bool,
        typer.Option(
            "--split",
            help="Cut each feed-forward layer's neurons into the experts, which together are that layer, instead of "
            "copying it. With a smaller --top-k the answers are other ones: a model to test with.",
        ),
    ] = False,
) -> None:
    """Turn a dense checkpoint into a Mixtral-format Mixture-of-Experts that computes the same."""
    from pipeline.model_path import resolve_model
    from workers.decoder.upcycle import upcycle as write_upcycled

    if top_k is not None and top_k > experts:
        raise UserError(f"--top-k {top_k}: there are only {experts} experts")
    write_upcycled(resolve_model(model), out, experts=experts, top_k=top_k, split=split)
    say(f"wrote {out}")


@tokenizer_app.command()
def train(
    corpus: Annotated[
        str, typer.Argument(metavar="CORPUS", help="A file, a folder, a glob or a URI.", show_default=False)
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The directory to write.", show_default=False)],
    kind: Annotated[Literal["bpe", "unigram"], typer.Option(help="How words are cut.", show_default=False)],
    vocab_size: Annotated[int, typer.Option(metavar="N", min=1, help="Tokens in all.", show_default=False)],
) -> None:
    """Train a SentencePiece vocabulary."""
    from pipeline.tokenizers.corpus import corpus_texts
    from pipeline.tokenizers.training import train_tokenizer

    done = train_tokenizer(corpus_texts(corpus), out, kind, vocab_size)
    skipped = f"; {done.num_skipped:,} rows were no text" if done.num_skipped else ""
    say(f"wrote {out}: {done.vocab_size:,} tokens, learnt from {done.num_texts:,} texts{skipped}")


def _run(spec: Any, answers: Answers, *, limit: int | None = None, retry_errors: bool = False) -> int:
    from jobs.client import run as run_job
    from jobs.report import describe_report
    from jobs.submitting.submission import current_submission, own_version
    from jobs.terminal import ProgressDisplay

    submission = current_submission()
    if submission is not None and submission.version not in (None, own_version()):
        say(f"gristmill: submitted by version {submission.version}, and the cluster has {own_version()}")
    try:
        with ProgressDisplay() as display:
            result = run_job(spec, limit=limit, retry_errors=retry_errors, on_progress=display)
    except (KeyboardInterrupt, SystemExit) as stop:
        again = None if submission is None else submission.command or "submit the job again"
        return answers.stopped(stop, again)
    answers.answer(result.report, describe_report(result.report, Path(spec.output.path)))
    return 0


def _query_many(answers: Answers, out: Path, file: str, output: Path, **options: Any) -> int:
    from jobs.index.bulk_query import bulk_query
    from jobs.terminal import ProgressDisplay

    try:
        with ProgressDisplay() as display:
            result = bulk_query(out, file, output, on_progress=display, **options)
    except (KeyboardInterrupt, SystemExit) as stop:
        return answers.stopped(stop)
    failed = f", {result['errors']:,} of them failed" if result["errors"] else ""
    parts = Path(result["output"], "parts")
    answers.answer(result, f"{result['queries']:,} queries{failed}: {result['neighbours']:,} neighbours in {parts}")
    return 0


def execute(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit status."""
    if "--json" not in arguments:
        return _execute(arguments, Answers(arguments, None))
    with reserved_stdout() as stream:
        return _execute(arguments, Answers(arguments, stream))


def _execute(arguments: Sequence[str], answers: Answers) -> int:
    try:
        exit_status = app(args=list(arguments), prog_name="gristmill", standalone_mode=False, obj=answers)
    except typer.TyperException as error:
        return answers.refuse(f"{error.format_message()} (see gristmill --help)", error.exit_code)
    except UserError as error:
        return answers.refuse(str(error), 2)
    except JobError as error:
        return answers.refuse(str(error), 1)
    if exit_status == INTERRUPTED and not answers.has_refused:  # before anything was begun
        return answers.refuse(f"stopped; to go on: {answers.command_line}", INTERRUPTED)
    return int(exit_status or 0)


def main() -> NoReturn:
    interrupt_on_signals()
    exit_status = execute(sys.argv[1:])
    expect_end(exit_status)
    sys.exit(exit_status)
