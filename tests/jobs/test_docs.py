"""What is documented is what there is."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
from pydantic.fields import FieldInfo

from jobs.cli import app
from jobs.spec import JobSpec, Section
from pipeline.errors import ROW_ERROR_CODES
from pipeline.records import part_schema

ROOT = Path(__file__).parents[2]


def section_of(field: FieldInfo) -> type[Section] | None:
    """The settings below a key, where it holds some."""
    candidates = [field.annotation, *getattr(field.annotation, "__args__", ())]
    candidates += [inner for kind in candidates for inner in getattr(kind, "__args__", ())]
    return next((kind for kind in candidates if isinstance(kind, type) and issubclass(kind, Section)), None)


def settings() -> list[tuple[str, str]]:
    """(heading in docs/job-files.md, key) of every setting."""
    found = [("Top level", key) for key in JobSpec.model_fields]
    for key, field in JobSpec.model_fields.items():
        section = section_of(field)
        if section is not None:
            found += [(key, inner) for inner in section.model_fields]
    return found


def documented(page: str, heading: str) -> set[str]:
    """The names in the first column of the table under a heading."""
    text = (ROOT / page).read_text()
    below = re.split(r"^## ", text, flags=re.MULTILINE)
    (body,) = [part for part in below if part.startswith(f"{heading}\n")]
    rows = [line.split("|")[1] for line in body.splitlines() if line.startswith("|")]
    return {name for cell in rows for name in re.findall(r"`([^`]+)`", cell)}


@pytest.mark.parametrize("heading", sorted({heading for heading, _ in settings()}))
def test_every_setting_of_a_job_is_documented_and_no_other(heading: str) -> None:
    assert documented("docs/job-files.md", heading) == {key for place, key in settings() if place == heading}


def test_every_row_error_is_documented_and_no_other() -> None:
    assert documented("docs/errors.md", "Of a row: an error row") == ROW_ERROR_CODES


def test_every_column_of_a_part_is_documented_and_no_other() -> None:
    import pyarrow as pa

    schema = part_schema(embeds=None, dimension=None, carried=pa.schema([]))
    assert documented("docs/job-directory.md", "A part's columns") == set(schema.names)


def commands(group: typer.Typer, name: str) -> Iterator[str]:
    """Every command of a group and of those below it, as it is typed."""
    for command in group.registered_commands:
        assert command.callback is not None
        yield f"{name} {command.name or command.callback.__name__}"
    for below in group.registered_groups:
        assert below.typer_instance is not None
        yield from commands(below.typer_instance, f"{name} {below.name or below.typer_instance.info.name}")


@pytest.mark.parametrize("command", list(commands(app, "gristmill")))
def test_every_command_is_in_the_readme(command: str) -> None:
    assert command in (ROOT / "README.md").read_text()


@pytest.mark.parametrize(
    "page", ["README.md", "CONTRIBUTING.md", *(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))]
)
def test_links_between_pages_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", (ROOT / page).read_text()):
        assert ((ROOT / page).parent / target).exists(), target


@pytest.mark.parametrize("package", ["pipeline", "workers", "jobs"])
def test_a_package_is_imported_from_this_tree(package: str) -> None:
    assert importlib.import_module(package).__path__[0] == str(ROOT / package)


@pytest.mark.parametrize("package", ["pipeline", "workers", "jobs"])
def test_the_tree_in_the_readme_names_every_module_and_folder_of_a_package(package: str) -> None:
    tree = (ROOT / "README.md").read_text().split("## Where things are")[1].split("## ")[0]
    there = {
        path.name for path in (ROOT / package).iterdir() if path.suffix == ".py" and not path.name.startswith("__")
    }
    there |= {f"{path.name}/" for path in (ROOT / package).iterdir() if (path / "__init__.py").exists()}
    assert there - set(tree.split()) == set()
