"""Which module knows which architecture. Adding one is adding a module, its import here and its name in _MODULES."""

from __future__ import annotations

from collections.abc import Collection
from typing import Protocol, runtime_checkable

from pipeline.errors import UserError
from workers.decoder.config import DecoderConfig
from workers.decoder.families import (
    bloom,
    deepseek,
    gemma,
    gemma2,
    gemma3,
    gpt2,
    gpt_neo,
    gpt_neox,
    gpt_oss,
    granite,
    granitemoe,
    llama,
    mistral,
    mixtral,
    mpt,
    olmoe,
    phi,
    phi3,
    phimoe,
    qwen2,
    qwen2_moe,
    qwen3,
    qwen3_moe,
    xglm,
)
from workers.decoder.families.document import Document
from workers.decoder.families.gguf import GgufModel
from workers.decoder.storage import Source


class Family(Protocol):
    """A module of this folder. `sources` gives each of our tensor names its place among the published `names`.

    A family that reads quantized checkpoints says so in `QUANTIZATIONS`, by the names of quantization_config.
    """

    MODEL_TYPES: tuple[str, ...]

    def read_config(self, document: Document) -> DecoderConfig: ...

    def sources(self, config: DecoderConfig, names: Collection[str]) -> dict[str, Source]: ...


@runtime_checkable
class GgufFamily(Protocol):
    """A module of this folder whose architecture llama.cpp knows too, by one of GGUF_ARCHITECTURES.

    `gguf_document` says in the keys of a config.json what the file's metadata say; its model_type may be another
    module's.
    """

    GGUF_ARCHITECTURES: tuple[str, ...]

    def gguf_document(self, model: GgufModel) -> Document: ...

    def gguf_sources(self, config: DecoderConfig, names: Collection[str]) -> dict[str, Source]: ...


_MODULES: tuple[Family, ...] = (
    bloom,
    deepseek,
    gemma,
    gemma2,
    gemma3,
    gpt2,
    gpt_neo,
    gpt_neox,
    gpt_oss,
    granite,
    granitemoe,
    llama,
    mistral,
    mixtral,
    mpt,
    olmoe,
    phi,
    phi3,
    phimoe,
    qwen2,
    qwen2_moe,
    qwen3,
    qwen3_moe,
    xglm,
)
FAMILIES: dict[str, Family] = {model_type: module for module in _MODULES for model_type in module.MODEL_TYPES}
GGUF_FAMILIES: dict[str, GgufFamily] = {
    architecture: module
    for module in _MODULES
    if isinstance(module, GgufFamily)
    for architecture in module.GGUF_ARCHITECTURES
}


def family_of(document: Document) -> Family:
    model_type = document.text("model_type")
    if model_type not in FAMILIES:
        raise UserError(
            f"{document.where}: architecture {model_type!r} is not supported ({', '.join(sorted(FAMILIES))} are)"
        )
    return FAMILIES[model_type]


def quantizations_of(family: Family) -> tuple[str, ...]:
    return getattr(family, "QUANTIZATIONS", ())


def gguf_family_of(model: GgufModel) -> GgufFamily:
    if model.architecture not in GGUF_FAMILIES:
        raise UserError(
            f"{model.where}: architecture {model.architecture!r} is not supported in GGUF files "
            f"({', '.join(sorted(GGUF_FAMILIES))})"
        )
    return GGUF_FAMILIES[model.architecture]
