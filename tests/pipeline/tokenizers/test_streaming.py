"""Decoding token by token: any tokens, in any order, give what decoding them at once gives."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor
from sentencepiece.sentencepiece_model_pb2 import ModelProto
from tokenizers import decoders

from pipeline.tokenizer import Tokenizer, load_tokenizer
from pipeline.tokenizers.piece_decoder import PieceDecoder, PieceTexts
from pipeline.tokenizers.streaming import StepwiseDecoder, UnknownDecoder, decoder_steps, token_bytes

QUICK = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

TOKENS = st.one_of(
    st.text(st.sampled_from("aé▁ Ġ<0x>Ċ\u200d😀"), max_size=6),
    st.integers(0, 255).map(lambda byte: f"<0x{byte:02X}>"),
    st.sampled_from(
        ["<0xE4>", "<0xBD>", "<0xA0>", "<0xF0>", "<0x9F>", "<0x98>", "<0x80>", "▁", "▁▁", " ", "", "<0x4", "<0xZZ>"]
    ),
)
LIBRARY_DECODERS = {
    "none": None,
    "byte level": decoders.ByteLevel(),
    "llama": decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    ),
    "gemma": decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]),
    "strip each": decoders.Sequence([decoders.Replace("▁", " "), decoders.Strip(" ", 2, 0)]),
    "strip all": decoders.Sequence([decoders.Fuse(), decoders.Strip("▁", 3, 0)]),
    "metaspace always": decoders.Metaspace(prepend_scheme="always"),
    "metaspace first": decoders.Metaspace(prepend_scheme="first"),
    "metaspace never": decoders.Metaspace(prepend_scheme="never"),
    "metaspace bytes": decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first")]),
    "byte level in a sequence": decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)]),
}


@pytest.mark.parametrize("name", LIBRARY_DECODERS)
@QUICK
@given(tokens=st.lists(TOKENS, max_size=12))
def test_steps_give_what_the_library_decoder_gives(name: str, tokens: list[str]) -> None:
    library = LIBRARY_DECODERS[name]
    steps = decoder_steps(None if library is None else json.loads(library.__getstate__()))
    decoder = StepwiseDecoder(tokens.__getitem__, steps)
    given_piecewise = "".join(decoder.push(at) for at in range(len(tokens))) + decoder.flush()
    assert given_piecewise == (" ".join(tokens) if library is None else library.decode(tokens))


@pytest.mark.parametrize(
    "library", [decoders.WordPiece(), decoders.CTC(), decoders.BPEDecoder(), decoders.Strip(" ", 0, 1)]
)
def test_a_decoder_that_looks_ahead_is_refused(library: Any) -> None:
    with pytest.raises(UnknownDecoder, match="step that can't be followed"):
        decoder_steps(json.loads(library.__getstate__()))


@QUICK
@given(data=st.data())
def test_any_ids_of_a_real_vocabulary_stream_as_they_decode(
    data: st.DataObject, smollm: Tokenizer, streamed: Callable[..., str]
) -> None:
    ids = data.draw(st.lists(st.one_of(st.integers(0, smollm.vocab_size + 5), st.integers(0, 300)), max_size=20))
    for skip in (True, False):
        assert streamed(smollm, ids, skip_special_tokens=skip) == smollm.decode(ids, skip_special_tokens=skip)


@QUICK
@given(data=st.data())
def test_text_and_its_pieces_hold_no_half_character(data: st.DataObject, smollm: Tokenizer) -> None:
    ids = smollm.encode(data.draw(st.text(max_size=30)))
    text = smollm.decode(ids)  # a few bytes are not in this vocabulary
    decoder = smollm.incremental()
    so_far = ""
    for token in ids:
        so_far += decoder.push(token)
        assert text.startswith(so_far)
    assert so_far + decoder.flush() == text


@pytest.fixture(scope="module")
def piece_models(piece_model: Callable[..., bytes]) -> dict[str, tuple[ModelProto, SentencePieceProcessor]]:
    plain = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    models = {
        "usual": piece_model("bpe"),
        "identity": piece_model("bpe", **plain),
        "no prefix": piece_model("bpe", add_dummy_prefix=False, **plain),
        "unigram": piece_model("unigram", user_defined_symbols=["▁▁", "<think>"]),
        "suffix": piece_model("unigram", treat_whitespace_as_suffix=True),
    }
    return {
        name: (ModelProto.FromString(model), SentencePieceProcessor.from_proto(model)) for name, model in models.items()
    }


@pytest.mark.parametrize("name", ["usual", "identity", "no prefix", "unigram", "suffix"])
@QUICK
@given(data=st.data())
def test_pieces_decode_as_sentencepiece_decodes_them(
    name: str, data: st.DataObject, piece_models: dict[str, tuple[ModelProto, SentencePieceProcessor]]
) -> None:
    model, theirs = piece_models[name]
    low = st.integers(0, 2) | st.integers(3, 258) | st.sampled_from([0xE4 + 3, 0xBD + 3, 0xA0 + 3, 0xF0 + 3, 0x9F + 3])
    spaces = st.sampled_from([at for at, piece in enumerate(model.pieces) if piece.piece.startswith("▁")])
    ids = data.draw(st.lists(st.one_of(low, spaces, st.integers(0, len(model.pieces) - 1)), max_size=12))
    decoder = PieceDecoder(PieceTexts(model, {}), skip_special_tokens=True)
    assert "".join(map(decoder.push, ids)) + decoder.flush() == theirs.decode(ids)


def test_a_character_comes_with_its_last_byte_and_no_sooner(smollm: Tokenizer) -> None:
    ids = smollm.encode("🧿")
    assert len(ids) > 1
    decoder = smollm.incremental()
    assert [decoder.push(token) for token in ids] == [*[""] * (len(ids) - 1), "🧿"]
    assert decoder.flush() == ""


def test_bytes_that_no_character_follows_come_out_replaced(
    piece_models: dict[str, tuple[ModelProto, SentencePieceProcessor]], piece_folder: Callable[..., Path]
) -> None:
    model, theirs = piece_models["identity"]
    tokenizer = load_tokenizer(piece_folder(model.SerializeToString()))
    decoder = tokenizer.incremental()
    assert [decoder.push(3 + byte) for byte in b"\xe4\xbd"] == ["", ""]
    assert decoder.flush() == "\ufffd\ufffd" == theirs.decode([3 + byte for byte in b"\xe4\xbd"])


def test_a_byte_level_token_with_foreign_characters_stands_for_itself() -> None:
    assert token_bytes("Ġa") == b" a"
    assert token_bytes("<｜end｜>") == "<｜end｜>".encode()
