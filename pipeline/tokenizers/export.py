"""Writes a checkpoint's tokenizer as files in Hugging Face layout, which transformers' AutoTokenizer loads too."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.tokenizers.gguf_byte_level import byte_level_backend
from pipeline.tokenizers.gguf_sentence_piece import sentence_piece_model
from pipeline.tokenizers.gguf_vocabulary import Vocabulary

_FILES = (
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json"),
)


def write_tokenizer(model: Path, out: Path) -> None:
    """Put the tokenizer of `model` (a .gguf file or a directory in Hugging Face layout) into the folder `out`.

    A directory's files are copied; what it lacks stays out. UserError when a file's vocabulary can't be written.
    """
    if model.is_dir():
        for name in _FILES:
            if (model / name).is_file():
                shutil.copyfile(model / name, out / name)
        return
    vocabulary = Vocabulary(model)
    config: dict[str, Any] = {**vocabulary.facts().special_tokens, "clean_up_tokenization_spaces": False}
    template = vocabulary.facts().chat_template
    if template is not None:
        config["chat_template"] = template
    if vocabulary.kind == "gpt2":
        byte_level_backend(vocabulary).save(str(out / "tokenizer.json"))
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    elif vocabulary.kind == "llama":
        (out / "tokenizer.model").write_bytes(sentence_piece_model(vocabulary).SerializeToString())
        before, after = vocabulary.ends_added(adds_bos=True)
        config |= {"tokenizer_class": "LlamaTokenizer", "legacy": True}
        config |= {"add_bos_token": before is not None, "add_eos_token": after is not None}
    else:
        raise UserError(f"{model}: a vocabulary of the kind {vocabulary.kind!r} can't be written to files of its own")
    text = json.dumps(config, ensure_ascii=False, indent=2) + "\n"
    (out / "tokenizer_config.json").write_text(text, encoding="utf-8")
