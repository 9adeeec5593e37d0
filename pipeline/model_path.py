"""Where a model is: what a job's `model:` says, turned into a path on this machine, and the digest of its files."""

from __future__ import annotations

import difflib
import hashlib
import importlib.util
import pkgutil
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pipeline.errors import UserError, one_line
from pipeline.gguf_metadata import gguf_files

# The files of a Hugging Face directory that determine results. Pickles are left out: they are never loaded.
RESULT_FILES = (
    "*.safetensors",
    "*.safetensors.index.json",
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "modules.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
    "*_Pooling/config.json",
)

_READ_BYTES = 1 << 20
_FORMS = "a directory in Hugging Face layout, a .gguf file, package://PACKAGE/FILE or hf://ORG/NAME[@REVISION]"


def resolve_model(reference: str) -> Path:
    """Return the directory or the .gguf file that `reference` names, fetching `hf://` ones. UserError otherwise.

    `reference` is a directory in Hugging Face layout, a `.gguf` file, `package://PACKAGE/FILE` for weights that an
    installed Python package ships (the package is found, not imported), or `hf://ORG/NAME[@REVISION]`.
    """
    if not reference.strip():
        raise UserError(f"model: is empty; name {_FORMS}")
    if reference.startswith("package://"):
        path = _in_package(reference)
    elif reference.startswith("hf://"):
        path = _from_hub(reference)
    elif "://" in reference:
        raise UserError(f"model: {reference}: unknown scheme; name {_FORMS}")
    else:
        path = Path(reference).expanduser()
    return _checked(path, reference)


def model_digest(path: Path) -> dict[str, str]:
    """Return file name -> hex SHA-256 of every file of the model at `path` that determines results, in name order.

    Files are read in pieces of a megabyte, several at once (hashing releases the GIL).
    """
    files = model_files(path)
    with ThreadPoolExecutor(max_workers=4) as pool:
        return dict(zip(files, pool.map(_sha256, files.values()), strict=True))


def model_files(path: Path) -> dict[str, Path]:
    """File name -> path of every file of the model at `path` that determines results, in name order."""
    if path.is_dir():
        files = {str(file.relative_to(path)): file for pattern in RESULT_FILES for file in path.glob(pattern)}
    else:
        files = {file.name: file for file in gguf_files(path)}
    return {name: files[name] for name in sorted(files) if files[name].is_file()}


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    buffer = bytearray(_READ_BYTES)
    view = memoryview(buffer)
    try:
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                digest.update(view[:count])
    except OSError as error:
        raise UserError(f"{path}: can't be read: {error.strerror}") from None
    return digest.hexdigest()


def _checked(path: Path, reference: str) -> Path:
    """Return `path` when it looks like a model; the decoder finds out about the weights themselves."""
    if path.is_dir():
        if (path / "config.json").is_file():
            return path
        inside = sorted(file.name for file in path.glob("*.gguf"))
        if inside:
            raise UserError(f"model: {reference}: is a folder; name the file in it, for instance {path / inside[0]}")
        raise UserError(f"model: {reference}: not a model in Hugging Face layout: it has no config.json")
    if path.is_file():
        if path.suffix == ".gguf":
            gguf_files(path)
            return path
        if (path.parent / "config.json").is_file():
            raise UserError(f"model: {reference}: is one file of a model; name its folder, {path.parent}")
        raise UserError(f"model: {reference}: not a model; name {_FORMS}")
    raise UserError(f"model: {reference}: no such file or folder{_hint(path, reference)}")


def _hint(path: Path, reference: str) -> str:
    """Return what the person may have meant, as the end of a sentence, or nothing."""
    parent = path.parent
    if parent.is_dir():
        names = [entry.name for entry in parent.iterdir()]
        near = difflib.get_close_matches(path.name, names, n=1) or [
            name for name in names if name.lower() == path.name.lower()
        ]
        if near:
            return f"; did you mean {parent / near[0]}?"
    if re.fullmatch(r"[\w.-]+/[\w.-]+", reference) and not parent.exists():
        return f"; did you mean hf://{reference}?"
    return ""


def _in_package(reference: str) -> Path:
    package, _, file = reference.removeprefix("package://").partition("/")
    if not file or not package:
        raise UserError(f"model: {reference}: write package://PACKAGE/FILE")
    top, *inner = package.split(".")
    try:  # a dotted name would make find_spec import the parent, and some such packages can't be imported
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        spec = None
    if spec is None:
        near = difflib.get_close_matches(top, [module.name for module in pkgutil.iter_modules()], n=1)
        hint = f"; did you mean {near[0]}?" if near else "; install it first"
        raise UserError(f"model: {reference}: no Python package {top!r} is installed here{hint}")
    folders = [Path(folder).joinpath(*inner) for folder in spec.submodule_search_locations or ()]
    for folder in folders:
        path = folder / file
        if path.exists():
            if not path.resolve().is_relative_to(folder.resolve()):
                raise UserError(f"model: {reference}: leads out of the package {package!r}")
            return path
    shipped = sorted({str(path.relative_to(folder)) for folder in folders for path in folder.rglob("*.gguf")})
    near = difflib.get_close_matches(file, shipped, n=1, cutoff=0.4)
    hint = f"; did you mean package://{package}/{near[0]}?" if near else ""
    raise UserError(f"model: {reference}: the package {package!r} has no file {file}{hint}")


def _from_hub(reference: str) -> Path:
    match = re.fullmatch(r"hf://(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>\S+))?", reference)
    if match is None:
        raise UserError(f"model: {reference}: write hf://ORG/NAME or hf://ORG/NAME@REVISION")
    from huggingface_hub import errors as hub
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils.tqdm import disable_progress_bars

    disable_progress_bars()
    repo, revision = match["repo"], match["revision"]
    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=list(RESULT_FILES)))
    except hub.GatedRepoError:
        why = "it is gated: accept its terms on the hub and set HF_TOKEN"
    except hub.RevisionNotFoundError:
        why = f"it has no revision {revision!r}"
    except hub.RepositoryNotFoundError:
        why = "the hub has no such model, or it is private and HF_TOKEN is not set"
    except (hub.OfflineModeIsEnabled, hub.LocalEntryNotFoundError):
        why = "it is not in the local cache and the hub can't be reached; fetch it where there is a network, or copy it"
    except hub.HFValidationError as error:
        why = one_line(error)
    except (hub.HfHubHTTPError, OSError) as error:
        why = f"the hub can't be reached or refused ({type(error).__name__}); check the network and HF_TOKEN"
    raise UserError(f"model: {reference}: {why}")
