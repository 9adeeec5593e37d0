"""Directories with a tokenizer.json, against transformers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as LibraryBackend
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from pipeline.errors import UserError
from pipeline.tokenizer import load_tokenizer

Folder = Callable[..., Path]


@pytest.fixture
def folder(tmp_path: Path, tiny_tokenizer_dir: Path) -> Folder:
    """`folder(config={...}, change=...)` -> the tiny tokenizer's directory with files changed."""

    def make(
        *,
        config: dict[str, Any] | None = None,
        change: Callable[[dict[str, Any]], object] | None = None,
        **files: dict[str, Any] | str,
    ) -> Path:
        for file in tiny_tokenizer_dir.iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
        settings = tmp_path / "tokenizer_config.json"
        if config is not None:
            settings.write_text(json.dumps({**json.loads(settings.read_text()), **config}))
        if change is not None:
            content = json.loads((tmp_path / "tokenizer.json").read_text())
            change(content)
            (tmp_path / "tokenizer.json").write_text(json.dumps(content))
        for name, content in files.items():
            text = content if isinstance(content, str) else json.dumps(content)
            (tmp_path / name.replace("__", ".")).write_text(text)
        return tmp_path

    return make


def frame(content: dict[str, Any]) -> None:
    """Make the tokenizer put <|im_start|> (1) before a text and <|im_end|> (2) after it."""
    content["post_processor"] = json.loads(
        processors.TemplateProcessing(
            single=["<|im_start|>", "$A", "<|im_end|>"],
            pair=["$A", "$B:1"],
            special_tokens=[("<|im_start|>", 1), ("<|im_end|>", 2)],
        ).__getstate__()
    )


def test_ids_and_text_equal_transformers(tiny_tokenizer_dir: Path, hard_texts: list[str]) -> None:
    ours, theirs = load_tokenizer(tiny_tokenizer_dir), AutoTokenizer.from_pretrained(tiny_tokenizer_dir)
    for text in hard_texts:
        ids = theirs.encode(text)
        assert ours.encode(text, parse_special=True) == ids
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
        assert ours.decode(ids, skip_special_tokens=False) == theirs.decode(ids, skip_special_tokens=False) == text


def test_control_strings_are_read_as_transformers_reads_them_when_told_to_split_special_tokens(
    tiny_tokenizer_dir: Path, hard_texts: list[str]
) -> None:
    ours, theirs = load_tokenizer(tiny_tokenizer_dir), AutoTokenizer.from_pretrained(tiny_tokenizer_dir)
    for text in hard_texts:
        assert ours.encode(text) == theirs.encode(text, split_special_tokens=True)
        assert not {0, 1, 2} & set(ours.encode(text))


@pytest.mark.parametrize(
    "config", [{}, {"add_bos_token": True}, {"add_bos_token": False}, {"add_bos_token": True, "add_eos_token": True}]
)
@pytest.mark.parametrize("framed", [False, True])
def test_what_is_added_around_a_text_is_what_transformers_adds(
    config: dict[str, Any], framed: bool, folder: Folder
) -> None:
    path = folder(config=config, change=frame if framed else None)
    ours, theirs = load_tokenizer(path), AutoTokenizer.from_pretrained(path)
    for text in ("", "hello", "héllo <|im_end|>"):
        assert ours.encode(text, parse_special=True) == theirs.encode(text)
        assert ours.encode(text, parse_special=True, add_special_tokens=False) == theirs.encode(
            text, add_special_tokens=False
        )
    assert (ours.encode("x")[:1] == [1]) is framed


@pytest.mark.parametrize(
    ("config", "ends"),
    [
        ({"add_bos_token": True, "add_eos_token": True}, ([1], [2])),  # E5-Mistral as published
        ({"add_eos_token": True}, ([1], [2])),
        ({"add_bos_token": False, "add_eos_token": True}, ([], [2])),
        ({"add_bos_token": True, "add_eos_token": True, "eos_token": None}, ([1], [])),
        ({}, ([1], [])),
    ],
)
def test_an_embedders_configuration_says_what_is_added_around_a_text(
    config: dict[str, Any], ends: tuple[list[int], list[int]], folder: Folder
) -> None:
    def begin(content: dict[str, Any]) -> None:
        template = processors.TemplateProcessing(single=["<|im_start|>", "$A"], special_tokens=[("<|im_start|>", 1)])
        content["post_processor"] = json.loads(template.__getstate__())

    path = folder(config={"tokenizer_class": "LlamaTokenizer", **config}, change=begin)
    plain = load_tokenizer(path)
    assert plain.encode("hello")[:1] == [1]
    assert plain.encode("hello")[-1:] != [2]
    (path / "modules.json").write_text("[]")
    embedder = load_tokenizer(path)
    for text in ("", "hello", "héllo <|im_end|>"):
        bare = embedder.encode(text, add_special_tokens=False)
        assert embedder.encode(text) == [*ends[0], *bare, *ends[1]]
    assert (embedder.digest == plain.digest) is (ends == ([1], []))


def test_tokens_that_only_the_configuration_names_are_added(folder: Folder) -> None:
    listed = {
        "600": {"content": "<tool>", "special": True, "lstrip": False, "rstrip": True, "normalized": False},
        "601": {"content": "<think>", "special": False, "lstrip": False, "rstrip": False, "normalized": False},
    }
    path = folder(config={"added_tokens_decoder": listed, "additional_special_tokens": ["<extra>"]})
    ours, theirs = load_tokenizer(path), AutoTokenizer.from_pretrained(path)
    text = "a<tool>  b<think>c</think><extra>d é<tool> é"
    assert ours.encode(text, parse_special=True) == theirs.encode(text)
    assert ours.encode(text) == theirs.encode(text, split_special_tokens=True)
    assert ours.vocab_size == len(theirs) == 603
    ids = theirs.encode(text)
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


def test_the_older_special_tokens_map_is_read_too(tmp_path: Path, tiny_tokenizer_dir: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes((tiny_tokenizer_dir / "tokenizer.json").read_bytes())
    mapped = {"bos_token": {"content": "<|im_start|>"}, "eos_token": "<|im_end|>", "additional_special_tokens": ["<x>"]}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(mapped))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    ours, theirs = load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert (ours.bos_id, ours.eos_ids) == (theirs.bos_token_id, {theirs.eos_token_id}) == (1, {2})
    assert ours.encode("a<x>b", parse_special=True) == theirs.encode("a<x>b")


def test_end_of_text_tokens_are_merged_from_every_file_that_names_some(folder: Folder) -> None:
    path = folder(
        config__json={"eos_token_id": 7, "text_config": {"eos_token_id": [8]}},
        generation_config__json={"eos_token_id": [0, 9]},
    )
    assert load_tokenizer(path).eos_ids == {0, 2, 7, 8, 9}


def test_end_of_text_tokens_may_be_missing_everywhere(folder: Folder) -> None:
    path = folder(config={"eos_token": None, "bos_token": None}, config__json={"eos_token_id": None, "bos_token_id": 5})
    tokenizer = load_tokenizer(path)
    assert tokenizer.eos_ids == frozenset()
    assert tokenizer.bos_id == 5


def test_a_chat_template_of_its_own_file_goes_before_the_one_in_the_configuration(folder: Folder) -> None:
    path = folder(config={"chat_template": "from config"}, chat_template__jinja="from file")
    assert load_tokenizer(path).chat_template == "from file" == AutoTokenizer.from_pretrained(path).chat_template
    (path / "chat_template.jinja").unlink()
    assert load_tokenizer(path).chat_template == "from config"


def test_the_default_is_taken_of_several_chat_templates(folder: Folder) -> None:
    named = [{"name": "rag", "template": "R"}, {"name": "default", "template": "D"}]
    path = folder(config={"chat_template": named})
    (path / "chat_template.jinja").unlink(missing_ok=True)
    assert load_tokenizer(path).chat_template == "D" == AutoTokenizer.from_pretrained(path).get_chat_template()


def test_without_a_chat_template_there_is_none(folder: Folder) -> None:
    path = folder()
    (path / "chat_template.jinja").unlink()
    assert load_tokenizer(path).chat_template is None


def test_truncation_and_padding_in_the_file_are_not_applied(folder: Folder) -> None:
    backend = LibraryBackend.from_file(str(folder() / "tokenizer.json"))
    backend.enable_truncation(3)
    backend.enable_padding(length=10)
    path = folder(change=lambda content: content.update(json.loads(backend.to_str())))
    tokenizer = load_tokenizer(path)
    assert len(tokenizer.encode("one two three four five six")) > 3
    assert tokenizer.encode("") == []


def test_the_digest_follows_the_vocabulary_but_not_the_chat_template(folder: Folder) -> None:
    before = load_tokenizer(folder()).digest
    assert load_tokenizer(folder(config={"chat_template": "another"}, chat_template__jinja="another")).digest == before
    assert load_tokenizer(folder(change=frame)).digest != before


def library_folder(path: Path, backend: LibraryBackend) -> Path:
    PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>").save_pretrained(path)
    return path


def llama_like(prepend_scheme: str | None) -> LibraryBackend:
    """Return a byte-fallback BPE tokenizer as Llama's: with the older normalizer (None) or a Metaspace scheme."""
    letters = [*map(chr, range(ord("!"), 0x7F)), "é", "▁"]
    words = ["He", "ll", "Hell", "Hello", "▁w", "▁▁", "▁t", "▁th", "▁the"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters, *words]
    merges = [
        ("H", "e"),
        ("l", "l"),
        ("He", "ll"),
        ("Hell", "o"),
        ("▁", "w"),
        ("▁", "▁"),
        ("▁", "t"),
        ("▁t", "h"),
        ("▁th", "e"),
    ]
    backend = LibraryBackend(
        models.BPE(
            {token: at for at, token in enumerate(tokens)}, merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>"
        )
    )
    if prepend_scheme is None:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend_scheme, split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in ("<unk>", "<s>", "</s>")])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return backend


@pytest.mark.parametrize("prepend_scheme", [None, "always", "first", "never"])
def test_sentencepiece_like_files_equal_the_library(
    prepend_scheme: str | None, tmp_path: Path, hard_texts: list[str], streamed: Callable[..., str]
) -> None:
    backend = llama_like(prepend_scheme)
    ours = load_tokenizer(library_folder(tmp_path, llama_like(prepend_scheme)))
    for text in hard_texts:
        ids = backend.encode(text).ids
        assert ours.encode(text, parse_special=True) == ids
        for skip in (True, False):
            decoded = ours.decode(ids, skip_special_tokens=skip)
            assert decoded == backend.decode(ids, skip_special_tokens=skip)
            assert decoded == streamed(ours, ids, skip_special_tokens=skip)


@pytest.mark.parametrize("prepend_scheme", [None, "always", "first", "never"])
def test_text_after_a_parsed_token_begins_alike_whether_or_not_a_literal_span_holds_a_control_string(
    prepend_scheme: str | None, tmp_path: Path
) -> None:
    tokenizer = load_tokenizer(library_folder(tmp_path, llama_like(prepend_scheme)))
    text = "<s>the Hello</s>the <s> é"
    literal = ((20, 23),)  # the last <s>
    ids = tokenizer.encode(text, parse_special=True, literal=literal)
    begun = tokenizer.encode("<s>the Hello</s>the ", parse_special=True)
    assert text[20:23] == "<s>"
    assert ids[: len(begun) - 1] == begun[:-1]
    assert ids.count(1) == 2  # the one added, the one at the start
    assert tokenizer.decode(ids, skip_special_tokens=False).endswith("the <s> é")


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda path: path.write_text("{"), "corrupt or too new"),
        (lambda path: path.write_text("[]"), "corrupt or too new"),
        (lambda path: path.write_bytes(b"\xff\xfe\x00"), "corrupt or too new"),
        (lambda path: path.write_bytes(path.read_bytes()[:5000]), "corrupt or too new"),
        (lambda path: path.with_name("tokenizer_config.json").write_text("{"), "can't be read as JSON"),
        (lambda path: path.with_name("tokenizer_config.json").write_text("[]"), "not an object"),
        (
            lambda path: path.with_name("tokenizer_config.json").write_text('{"added_tokens_decoder": {"x": {}}}'),
            "bad added_tokens_decoder",
        ),
        (lambda path: path.with_name("config.json").write_text("nonsense"), "config.json: can't be read as JSON"),
        (lambda path: path.with_name("chat_template.jinja").write_bytes(b"\xff"), "chat_template.jinja: can't be read"),
    ],
)
def test_a_corrupt_file_is_refused_with_one_line(spoil: Callable[[Path], object], said: str, folder: Folder) -> None:
    path = folder()
    spoil(path / "tokenizer.json")
    with pytest.raises(UserError, match=said) as refusal:
        load_tokenizer(path)
    assert "\n" not in str(refusal.value)


def test_a_decoder_that_cannot_be_followed_is_refused(folder: Folder) -> None:
    path = folder(change=lambda content: content.update(decoder=json.loads(decoders.WordPiece().__getstate__())))
    with pytest.raises(UserError, match="its decoder has a WordPiece step"):
        load_tokenizer(path)


def test_a_place_without_a_tokenizer_says_what_is_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no tokenizer.json or tokenizer.model in it"):
        load_tokenizer(tmp_path)
    (tmp_path / "vocab.json").write_text("{}")
    (tmp_path / "merges.txt").write_text("")
    with pytest.raises(UserError, match=r"only vocab.json and merges.txt; save it again"):
        load_tokenizer(tmp_path)
    with pytest.raises(UserError, match=r"neither a directory nor a .gguf file"):
        load_tokenizer(tmp_path / "vocab.json")
