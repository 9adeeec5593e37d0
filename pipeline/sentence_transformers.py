"""A checkpoint's own sentence-transformers files: how its authors make vectors with it.

modules.json names the steps (a Transformer, a Pooling, perhaps a Normalize); 1_Pooling/config.json the pooling;
config_sentence_transformers.json the prompts of queries and passages and the similarity that vectors are meant for;
sentence_bert_config.json how texts are put to the transformer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Final

from pipeline.embedding import Pooling
from pipeline.errors import UserError
from pipeline.gguf_metadata import read_gguf_metadata
from pipeline.tokenizers.checkpoint import read_json, read_json_value

_POOLING_FILES: Final = "*_Pooling/config.json"  # as in model_path.RESULT_FILES
_MODES: Final[Mapping[str, Pooling]] = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_lasttoken": "last",
    "pooling_mode_weightedmean_tokens": "weighted_mean",
    "mean": "mean",
    "lasttoken": "last",
    "weightedmean": "weighted_mean",
}
# llama.cpp's numbers; 2 is the first token's, 4 is for rerankers.
_GGUF_POOLINGS: Final[Mapping[str, Pooling | None]] = {"0": None, "1": "mean", "3": "last"}
_INSTEAD: Final = "set embed.pooling to mean, last or weighted_mean to embed without it"


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbedderFiles:
    """What a checkpoint says about embedding with it. `pooling` None: nothing."""

    pooling: Pooling | None = None
    include_prompt: bool = True
    query_prompt: str = ""
    passage_prompt: str = ""
    max_tokens: int | None = None  # longer texts are cut by their authors
    dimensions: int | None = None  # of a vector, where its authors keep no more


def read_embedder(model_path: Path, *, pooling_is_given: bool = False) -> EmbedderFiles:
    """The files in a model's folder, or what a .gguf file says; all defaults where there is nothing.

    UserError if they are damaged, or ask for what can't be done, so that nobody gets other vectors in silence. With
    `pooling_is_given`, the steps after the transformer and the similarity are not looked at.
    """
    if not model_path.is_dir():
        return EmbedderFiles(pooling=None if pooling_is_given else _gguf_pooling(model_path))
    steps = _steps(model_path)
    config = read_json(model_path / "config_sentence_transformers.json")
    pooling_file = _pooling_file(model_path, steps)
    pooling_config = read_json(pooling_file) if pooling_file is not None else {}
    limits = read_json(model_path / "sentence_bert_config.json")
    if not pooling_is_given:
        _refuse_steps(model_path, steps)
        _refuse_similarity(model_path, config, steps)
        _refuse_chat(model_path, limits)
        _refuse_own_code(model_path, steps)
    prompts = _prompts(model_path, config)
    default = _default_prompt(model_path, config, prompts)
    if limits.get("do_lower_case"):
        raise UserError(f"{model_path / 'sentence_bert_config.json'}: do_lower_case is not supported; lower the rows")
    return EmbedderFiles(
        pooling=_pooling(pooling_file, pooling_config) if pooling_file is not None and not pooling_is_given else None,
        include_prompt=bool(pooling_config.get("include_prompt", True)),
        query_prompt=prompts.get("query", default),
        passage_prompt=next((prompts[name] for name in ("document", "passage", "corpus") if name in prompts), default),
        max_tokens=_max_tokens(model_path, limits, steps),
        dimensions=None if pooling_is_given else _count(config.get("truncate_dim")),
    )


def _max_tokens(model_path: Path, limits: Mapping[str, Any], steps: list[tuple[str, str]]) -> int | None:
    """max_seq_length; where there is none, as in what sentence-transformers writes from 5.4 on, the tokenizer's."""
    own = _count(limits.get("max_seq_length"))
    if own is not None or not steps:
        return own
    return _count(read_json(model_path / "tokenizer_config.json").get("model_max_length"))


def _count(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def _gguf_pooling(file: Path) -> Pooling | None:
    """All that a .gguf file says of embedding: its authors' prompts are not in it."""
    if file.suffix != ".gguf" or not file.is_file():
        return None
    key = f"{read_gguf_metadata(file, prefix='general.architecture').get('general.architecture')}.pooling_type"
    pooling = str(read_gguf_metadata(file, prefix=key).get(key, 0))
    if pooling in _GGUF_POOLINGS:
        return _GGUF_POOLINGS[pooling]
    raise UserError(f"{file} asks for pooling of another kind ({key} {pooling}); set embed.pooling to mean or last")


def _steps(model_path: Path) -> list[tuple[str, str]]:
    """(kind, folder) of each module, in order; none without modules.json."""
    file = model_path / "modules.json"
    modules = read_json_value(file)
    if modules is None:
        return []
    try:
        return [(str(module["type"]), str(module.get("path", ""))) for module in modules]
    except (TypeError, KeyError, AttributeError):
        raise UserError(f"{file}: must be a list of modules, each with a type and a path") from None


def _kind(step: str) -> str:
    """`sentence_transformers.models.Pooling` -> Pooling; a module of somebody else's stays as it is."""
    return step.rpartition(".")[2] if step.startswith("sentence_transformers.") else step


def _refuse_steps(model_path: Path, steps: list[tuple[str, str]]) -> None:
    if not steps:
        return
    file = model_path / "modules.json"
    for place, (step, folder) in enumerate(steps):
        kind = _kind(step)
        if kind == "Transformer" and place == 0:
            if folder:
                raise UserError(
                    f"{file}: its weights are in {folder}/; name that folder as the model, and embed.pooling, "
                    "which is not said there"
                )
        elif not ((kind == "Pooling" and place == 1) or (kind == "Normalize" and place == 2)):
            raise UserError(f"{file}: step {place} is a {kind} module, which is not supported; {_INSTEAD}")


def _refuse_similarity(model_path: Path, config: Mapping[str, Any], steps: list[tuple[str, str]]) -> None:
    """Vectors here have unit length: of unnormalised ones the inner product is another similarity."""
    similarity = config.get("similarity_fn_name") or "cosine"
    normalises = any(_kind(step) == "Normalize" for step, _ in steps)
    if similarity == "cosine" or (similarity == "dot" and normalises):
        return
    what = f"{similarity} similarity" + (" of vectors that are not normalised" if similarity == "dot" else "")
    raise UserError(
        f"{model_path / 'config_sentence_transformers.json'} asks for {what}; only cosine is supported: {_INSTEAD}"
    )


def _refuse_chat(model_path: Path, limits: Mapping[str, Any]) -> None:
    """sentence-transformers from 5.4 on sends all texts through the chat template where `message` is in this list."""
    modalities = limits.get("modality_config")
    if isinstance(modalities, dict) and "message" in modalities:
        raise UserError(
            f"{model_path / 'sentence_bert_config.json'} puts texts through the chat template (message in "
            f"modality_config), which is not supported; {_INSTEAD}"
        )


def _refuse_own_code(model_path: Path, steps: list[tuple[str, str]]) -> None:
    """Embedders that bring code attend to later tokens too, most of them, and their configuration need not say so."""
    file = model_path / "config.json"
    own = read_json(file).get("auto_map")
    if steps and isinstance(own, dict) and "AutoModel" in own:
        raise UserError(f"{file}: its vectors come of code of its own (auto_map), which is never run; {_INSTEAD}")


def _pooling_file(model_path: Path, steps: list[tuple[str, str]]) -> Path | None:
    """That of the Pooling module; without modules.json the one that lies there."""
    folders = [folder for step, folder in steps if _kind(step) == "Pooling"]
    if folders:
        file = model_path / folders[0] / "config.json"
        if not file.is_file() or not fnmatch(f"{folders[0]}/config.json", _POOLING_FILES):
            raise UserError(f"{model_path / 'modules.json'}: its pooling should be in {file}, N_Pooling/config.json")
        return file
    return next(iter(sorted(model_path.glob(_POOLING_FILES))), None)


def _pooling(file: Path, config: Mapping[str, Any]) -> Pooling:
    mode = config.get("pooling_mode")
    if mode is not None:
        modes = [str(one) for one in mode] if isinstance(mode, list | tuple) else [str(mode)]
    else:
        modes = [key for key, on in config.items() if key.startswith("pooling_mode_") and on]
    if len(modes) == 1 and modes[0] in _MODES:
        return _MODES[modes[0]]
    raise UserError(
        f"{file} asks for {', '.join(modes) or 'no pooling'}; set embed.pooling to mean, last or weighted_mean"
    )


def _prompts(model_path: Path, config: Mapping[str, Any]) -> dict[str, str]:
    prompts = config.get("prompts") or {}
    if not isinstance(prompts, dict) or not all(isinstance(text, str) for text in prompts.values()):
        raise UserError(f"{model_path / 'config_sentence_transformers.json'}: prompts must map names to texts")
    return prompts


def _default_prompt(model_path: Path, config: Mapping[str, Any], prompts: Mapping[str, str]) -> str:
    name = config.get("default_prompt_name")
    if name is None:
        return ""
    if not isinstance(name, str) or name not in prompts:
        raise UserError(
            f"{model_path / 'config_sentence_transformers.json'}: default_prompt_name {name!r} is none of its prompts"
        )
    return prompts[name]
