"""A GGUF file's tokenizer written as files of its own gives the same ids, here and in transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics

import pytest

from pipeline.tokenizer import load_tokenizer
from pipeline.tokenizers.export import write_tokenizer

TEXTS = (topics["if"][:400], "  naïve — 你好 😀\t\r\n", "a<|im_end|>b", "")


def test_a_byte_level_vocabulary_comes_out_as_a_tokenizer_json(smollm_path: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    write_tokenizer(smollm_path, tmp_path)
    source, written = load_tokenizer(smollm_path), load_tokenizer(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        ids = source.encode(text)
        assert written.encode(text) == ids
        assert written.encode(text, parse_special=True) == theirs(text)["input_ids"]
    assert theirs.decode(source.encode(TEXTS[1])) == TEXTS[1]
    assert written.eos_ids == source.eos_ids
    assert written.bos_id == source.bos_id
    assert written.special_tokens == source.special_tokens
    chat = [{"role": "user", "content": "hello"}]
    assert written.chat_template == source.chat_template
    assert "<|im_start|>user\nhello<|im_end|>" in theirs.apply_chat_template(chat, tokenize=False)


@pytest.mark.parametrize("adds_bos", [True, False])
def test_a_sentence_piece_vocabulary_comes_out_as_a_tokenizer_model(
    adds_bos: bool,
    piece_model: Callable[..., bytes],
    piece_vocabulary_file: Callable[..., Path],
    tmp_path: Path,
) -> None:
    from transformers import AutoTokenizer

    model = piece_vocabulary_file(
        piece_model("bpe", user_defined_symbols=["<a  b>"]), add_bos_token=adds_bos, template="{{ messages }}"
    )
    out = tmp_path / "out"
    out.mkdir()
    write_tokenizer(model, out)
    source, written = load_tokenizer(model), load_tokenizer(out)
    theirs = AutoTokenizer.from_pretrained(out)
    for text in (*TEXTS, "x<a  b>y"):
        assert written.encode(text) == source.encode(text), text
    # transformers makes Llama's tokenizer anew, which treats leading spaces otherwise than SentencePiece.
    assert theirs(TEXTS[0])["input_ids"] == source.encode(TEXTS[0])
    assert (written.bos_id, written.eos_ids, written.chat_template) == (1, {2}, "{{ messages }}")


def test_a_folders_files_are_copied(tiny_tokenizer_dir: Path, tmp_path: Path) -> None:
    write_tokenizer(tiny_tokenizer_dir, tmp_path)
    assert {f.name: f.read_bytes() for f in tmp_path.iterdir()} == {
        f.name: f.read_bytes() for f in tiny_tokenizer_dir.iterdir()
    }
