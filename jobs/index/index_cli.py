"""`gristmill index ...`. As in `cli`, whatever is slow to import is imported inside a command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from jobs.answers import Answers
from pipeline.errors import UserError

index_app = typer.Typer(help="An index after its job: rows added or deleted, indexes merged.", rich_markup_mode=None)

AsJson = Annotated[bool, typer.Option("--json", help="One JSON document on standard output.")]
IndexDirectory = Annotated[Path, typer.Argument(metavar="OUT", help="A directory with an index.", show_default=False)]
Memory = Annotated[
    str | None,
    typer.Option("--memory", metavar="SIZE", help="For building, such as 2GiB; else as the job's index.memory_bytes."),
]
Threads = Annotated[int | None, typer.Option("--threads", metavar="N", min=1, help="Of FAISS; else all processors.")]


@index_app.command()
def show(context: typer.Context, out: IndexDirectory, as_json: AsJson = False) -> None:
    """What an index holds: its version and size, its jobs, what was deleted."""
    from jobs.index.index_commands import describe_contents, index_contents

    found = index_contents(out)
    context.obj.answer(found, describe_contents(found))


@index_app.command()
def versions(context: typer.Context, out: IndexDirectory, as_json: AsJson = False) -> None:
    """The versions of an index: when each came, what changed, its vectors, size and recall."""
    from jobs.index.index_commands import describe_history, index_history

    history = index_history(out)
    context.obj.answer({"versions": history}, describe_history(history))


@index_app.command()
def add(
    context: typer.Context,
    out: IndexDirectory,
    other: Annotated[Path, typer.Argument(metavar="OTHER", help="A finished job's directory.", show_default=False)],
    memory: Memory = None,
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Add another job's rows, without building again what is there."""
    from jobs.index.index_commands import BuildOptions, add_to_index, describe_contents, index_contents

    add_to_index(out, other, BuildOptions.parse(memory, threads))
    found = index_contents(out)
    context.obj.answer(found, describe_contents(found))


@index_app.command()
def extend(
    context: typer.Context,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A finished job's directory.", show_default=False)],
    output: Annotated[
        Path | None, typer.Option(metavar="DIR", help="For the new rows, instead of OUT/extensions/.")
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override cluster, engine or limits.")
    ] = None,
    memory: Memory = None,
    threads: Threads = None,
    as_json: AsJson = False,
) -> int:
    """Run the files that came into the job's input since, and add their rows. Killed and asked again, it goes on."""
    from jobs.index.extension import describe_extended, extend_index
    from jobs.index.index_commands import BuildOptions, describe_contents, index_contents
    from jobs.terminal import ProgressDisplay

    answers: Answers = context.obj
    options = BuildOptions.parse(memory, threads)
    try:
        with ProgressDisplay() as display:
            extended = extend_index(out, output=output, settings=settings or (), options=options, on_progress=display)
    except (KeyboardInterrupt, SystemExit) as stop:
        return answers.stopped(stop)
    found = index_contents(out)
    words = f"{describe_extended(extended)}\n{describe_contents(found)}"
    answers.answer({"extended": [one.to_json() for one in extended], **found}, words)
    return 0


@index_app.command()
def delete(
    context: typer.Context,
    out: IndexDirectory,
    where: Annotated[
        str | None,
        typer.Option("--filter", metavar="EXPR", help="The rows like this, by carried columns: \"lang == 'en'\"."),
    ] = None,
    ids: Annotated[
        list[str] | None, typer.Option("--id", metavar="ID", help="The row with this id; may be given again.")
    ] = None,
    ids_file: Annotated[
        Path | None, typer.Option("--ids", metavar="FILE", help="The rows with the ids in FILE, one a line.")
    ] = None,
    job: Annotated[
        str | None, typer.Option("--job", metavar="NAME", help="Only rows of this one of the index's jobs.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Have the index never find these rows again. Parts keep them."""
    from jobs.index.index_commands import delete_from_index, describe_contents, index_contents, read_ids

    if (where is not None) + bool(ids) + (ids_file is not None) != 1:
        raise UserError("index delete: give one of --filter, --id and --ids")
    named = read_ids(ids_file) if ids_file is not None else ids or []
    _, num_deleted = delete_from_index(out, filter=where, ids=named, job=job)
    found = index_contents(out)
    words = f"{num_deleted:,} vectors deleted\n{describe_contents(found)}"
    context.obj.answer({"num_deleted": num_deleted, **found}, words)


@index_app.command()
def compact(
    context: typer.Context, out: IndexDirectory, memory: Memory = None, threads: Threads = None, as_json: AsJson = False
) -> None:
    """Give back the space of deleted vectors, and join small shards. Numbers and rows stay as they are."""
    from jobs.index.index_commands import BuildOptions, compact_index, describe_contents, index_contents

    before, after = compact_index(out, BuildOptions.parse(memory, threads))
    found = index_contents(out)
    words = found["change"] if after != before else "nothing to compact"
    compacted = {
        "vectors": after.num_absent - before.num_absent,
        "shards_before": len(before.shards),
        "bytes_freed": sum(one.size_bytes for one in before.files) - sum(one.size_bytes for one in after.files),
    }
    context.obj.answer({"compacted": compacted, **found}, f"{words}\n{describe_contents(found)}")


@index_app.command()
def merge(
    context: typer.Context,
    out: Annotated[Path, typer.Argument(metavar="NEW_OUT", help="The directory to make.", show_default=False)],
    sources: Annotated[list[Path], typer.Argument(metavar="OUT...", help="With indexes.", show_default=False)],
    as_json: AsJson = False,
) -> None:
    """Join indexes whose vectors can be compared in a new directory. Rows stay where they are."""
    from jobs.index.index_commands import describe_contents, index_contents, merge_into

    merge_into(out, sources)
    found = index_contents(out)
    context.obj.answer(found, describe_contents(found))
