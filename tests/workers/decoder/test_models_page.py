"""docs/models.md says what is there: each registered architecture, its parts and how near the reference it comes.

`make models` writes the page: it runs the one test here that is marked so. The registry and the parity cases
(parity/MODEL_TYPE.yaml, see test_parity.py) say which rows there are, configurations their words (describe.py), and
numbers come from comparing each case's logits with transformers'.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from workers.decoder.checkpoint import load_checkpoint
from workers.decoder.config import DecoderConfig, ExpertsConfig
from workers.decoder.describe import describe
from workers.decoder.families.registry import FAMILIES, GGUF_FAMILIES

PARITY = Path(__file__).parent / "parity"
PAGE = Path(__file__).parents[3] / "docs" / "models.md"
LENGTHS = (17, 97)
DIFFERENCE = "largest difference"
HEAD = """# Models

Every architecture that loads from a Hugging Face directory, by the `model_type` of its config.json, and what it is made
of, as far as the parity tests exercise it. `make models` writes this page: rows come from the decoder's registry, words
from what configurations become, numbers from measurement. *largest difference* is that of any logit from transformers',
relative to the largest logit, in float32, over seeded random checkpoints that take windows and scaled positions beyond
their limits. *GGUF* is what llama.cpp calls it in a file that loads as well.

*tokenizer* is the kind that transformers names for the architecture, where it names one; what counts is a checkpoint's
own `tokenizer.json`, `tokenizer.model` or GGUF vocabulary. Forms of one part are separated by semicolons; *and* joins
those of different layers of one model.

"""


@functools.cache
def cases() -> dict[str, dict[str, dict[str, Any]]]:
    """By model type and case: what the case sets."""
    return {
        file.stem: yaml.safe_load(file.read_text(encoding="utf-8"))["cases"] for file in sorted(PARITY.glob("*.yaml"))
    }


@functools.cache
def gguf_names() -> dict[str, str]:
    """Model type -> llama.cpp's names for it."""
    names: dict[str, list[str]] = {}
    for name, module in GGUF_FAMILIES.items():
        for model_type in getattr(module, "GGUF_MODEL_TYPES", getattr(module, "MODEL_TYPES", ())):
            names.setdefault(model_type, []).append(f"`{name}`")
    return {model_type: ", ".join(found) for model_type, found in names.items()}


@functools.cache
def tokenizer_kind(model_type: str) -> str:
    """What the tokenizer that transformers names for the architecture does, "" where it names none of its own."""
    import transformers
    from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

    named = getattr(transformers, TOKENIZER_MAPPING_NAMES.get(model_type) or "", None)
    if named is None or named is transformers.TokenizersBackend:
        return ""
    made = json.loads(named()._tokenizer.to_str())
    kind = made["model"]["type"]
    if "ByteLevel" in json.dumps(made["pre_tokenizer"]):
        return f"byte-level {kind}"
    name = {"BPE": "SentencePiece BPE", "Unigram": "SentencePiece unigram"}[kind]
    return f"{name} with byte fallback" if made["model"].get("byte_fallback") else name


def also_called(model_type: str) -> list[str]:
    """The model types that the same module reads and that have no cases of their own."""
    module, known = FAMILIES[model_type], cases()
    tested = [name for name in module.MODEL_TYPES if name in known]
    return [name for name in module.MODEL_TYPES if name not in known] if tested[:1] == [model_type] else []


def row(model_type: str, configs: list[DecoderConfig], difference: float) -> dict[str, str]:
    parts: dict[str, list[str]] = {}
    for config in configs:
        for part, words in describe(config).items():
            own = parts.setdefault(part, [])
            if words and words not in own:
                own.append(words)
    return {
        "model type": ", ".join(f"`{name}`" for name in (model_type, *also_called(model_type))),
        **{part: "; ".join(words) or "–" for part, words in parts.items()},
        "tokenizer": tokenizer_kind(model_type) or "–",
        "GGUF": gguf_names().get(model_type, "–"),
        DIFFERENCE: f"{difference:.0e}",
    }


def page(rows: list[dict[str, str]]) -> str:
    columns = list(rows[0])
    cells = [columns, ["---"] * len(columns), *([found[column] for column in columns] for found in rows)]
    return HEAD + "".join(f"| {' | '.join(line)} |\n" for line in cells)


def rows_of(text: str) -> dict[str, dict[str, str]]:
    """The model types of a row, as they stand there -> the row."""
    lines = [line[2:-2].split(" | ") for line in text.splitlines() if line.startswith("| ")]
    rows = [dict(zip(lines[0], cells, strict=True)) for cells in lines[2:]]
    return {found["model type"]: found for found in rows}


@pytest.fixture(scope="module")
def folders(tiny_model: Callable[..., Path]) -> Callable[[str], list[Path]]:
    """A model type -> the checkpoint of each of its cases."""

    def make(model_type: str) -> list[Path]:
        return [
            tiny_model(model_type, tokenizer=False, **{k: v for k, v in case.items() if k != "prompt_lengths"})
            for case in cases()[model_type].values()
        ]

    return make


def test_each_registered_architecture_is_on_the_page_and_no_other() -> None:
    listed = [name.strip("`") for names in rows_of(PAGE.read_text(encoding="utf-8")) for name in names.split(", ")]
    assert sorted(listed) == sorted(FAMILIES), "docs/models.md: write it anew with `make models`"


@pytest.mark.parametrize("model_type", cases())
def test_the_page_names_the_parts_that_configurations_have_now(
    model_type: str, folders: Callable[[str], list[Path]]
) -> None:
    now = row(model_type, [load_checkpoint(folder).config for folder in folders(model_type)], 0.0)
    written = dict(rows_of(PAGE.read_text(encoding="utf-8"))[now["model type"]])
    assert float(written.pop(DIFFERENCE)) < 1e-4
    del now[DIFFERENCE]
    assert written == now, "docs/models.md: write it anew with `make models`"


@pytest.mark.models
def test_write_the_page(folders: Callable[[str], list[Path]], paged: Any, reference: Any) -> None:
    rows = []
    for model_type in sorted(cases(), key=lambda name: (any(map(has_experts, folders(name))), name)):
        worst = 0.0
        for case, folder in zip(cases()[model_type].values(), folders(model_type), strict=True):
            sequences = paged(folder)
            for length in case.get("prompt_lengths", LENGTHS):
                ids = torch.randint(3, 603, (1, length), generator=torch.Generator().manual_seed(length))
                with torch.inference_mode():
                    wanted = reference(folder)(ids).logits[0]
                away = (sequences.logits(ids[0].tolist()) - wanted).abs().max() / wanted.abs().max()
                worst = max(worst, float(away))
        rows.append(row(model_type, [load_checkpoint(folder).config for folder in folders(model_type)], worst))
    PAGE.write_text(page(rows), encoding="utf-8")


def has_experts(folder: Path) -> bool:
    return any(isinstance(layer.feed_forward, ExpertsConfig) for layer in load_checkpoint(folder).config.layers)
