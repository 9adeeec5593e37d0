"""A checkpoint opened for reading: what decoder it is, and its tensors by our names.

Directories in Hugging Face layout with safetensors, and GGUF files. Nothing is ever unpickled.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from pipeline.errors import UserError
from workers.decoder.config import DecoderConfig
from workers.decoder.families import gguf
from workers.decoder.families.document import Document
from workers.decoder.families.registry import GGUF_FAMILIES, Family, family_of, gguf_family_of, quantizations_of
from workers.decoder.gguf_files import GgufFiles
from workers.decoder.safetensors_files import SafetensorsFiles, has_safetensors
from workers.decoder.storage import Source, Storage


class Checkpoint:
    def __init__(self, path: Path, config: DecoderConfig, storage: Storage, sources: dict[str, Source]) -> None:
        self.path = path
        self.config = config
        self.storage = storage
        self.sources = sources

    def read(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Our tensor `name`, in memory of its own. UserError where it is missing or has another shape."""
        self.check(name, shape)
        source = self.sources[name]
        tensor = self.storage.read(source, dtype)
        if tensor.shape != shape:
            raise self._misshapen(source, shape)
        return tensor

    def check(self, name: str, shape: tuple[int, ...]) -> None:
        """UserError where `name` is missing or can't have `shape`, found without reading it."""
        source = self.sources[name]
        for needed in (source.name, *(() if source.scales is None else (source.scales,))):
            if needed not in self.storage.names:
                raise UserError(
                    f"{self.path}: tensor {needed} is missing, which this {self.config.architecture} of "
                    f"{len(self.config.layers)} layers needs; fetch the checkpoint again, or mend its configuration"
                )
        piece = source.piece(self.storage.shape(source.name))
        if piece is not None and source.arrange is not None:
            try:
                piece = tuple(source.arrange(torch.empty(piece, device="meta")).shape)
            except (RuntimeError, IndexError):  # no such view of a tensor of this shape
                raise self._misshapen(source, shape) from None
        if piece != shape:
            raise self._misshapen(source, shape)

    def _misshapen(self, source: Source, wanted: tuple[int, ...]) -> UserError:
        piece = "" if source.at is None and source.rows is None else "a piece of "
        return UserError(
            f"{self.storage.where(source.name)}: tensor {source.name} has the shape "
            f"{list(self.storage.shape(source.name))}, but the configuration needs {piece}it to be {list(wanted)}; "
            "fetch the checkpoint again, or mend its configuration"
        )


def load_checkpoint(path: Path) -> Checkpoint:
    """Open a directory in Hugging Face layout or a .gguf file. Reads headers only; UserError when it can't be."""
    if path.is_dir():
        return _open_folder(path)
    if path.is_file():
        return _open_gguf(path)
    raise UserError(f"{path}: no such file or folder")


def read_document(folder: Path) -> Document:
    """The config.json of a directory in Hugging Face layout."""
    file = folder / "config.json"
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{folder}: not a model in Hugging Face layout: it has no config.json") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file}: can't be read as JSON: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{file}: holds no object")
    return Document(str(file), values)


def _read_config(family: Family, document: Document) -> DecoderConfig:
    # Embedders made of decoders that attend to what comes later as well (EmbeddingGemma, gte-Qwen2) are others.
    document.refuse({"is_causal": True, "use_bidirectional_attention": False})
    try:
        return family.read_config(document)
    except UserError:
        raise
    except (ValueError, ArithmeticError, MemoryError) as error:  # fine one by one, and no decoder together
        raise UserError(f"{document.where}: {str(error) or 'has numbers that no decoder can be made of'}") from None


def _open_folder(folder: Path) -> Checkpoint:
    document = read_document(folder)
    family = family_of(document)
    if "quantization_config" in document:
        method = document.inner("quantization_config").text("quant_method", "unknown")
        if method not in quantizations_of(family):
            raise UserError(
                f"{document.where}: weights quantized by {method!r} can't be read; "
                "use the unquantized checkpoint or a GGUF"
            )
    config = _read_config(family, document)
    if not has_safetensors(folder):
        pickles = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in folder.glob(pattern))
        if pickles:
            raise UserError(
                f"{folder / pickles[0]}: pickled weights are never read, since reading them can run any code; "
                "convert the checkpoint to safetensors or fetch it in that format"
            )
        raise UserError(f"{folder}: has neither model.safetensors nor model.safetensors.index.json; fetch the weights")
    storage = SafetensorsFiles(folder)
    return Checkpoint(folder, *_placed(family, config, storage))


def _placed(
    family: Family, config: DecoderConfig, storage: SafetensorsFiles
) -> tuple[DecoderConfig, SafetensorsFiles, dict[str, Source]]:
    """Where the tensors are. Files of the base model alone, as published embedders have them, lack the "model." before
    every name, and the output matrix: what is read of those embeds, and can't continue a text unless it is tied."""
    sources = family.sources(config, storage.names)
    embedding = sources["embedding.weight"].name
    prefix = embedding[: embedding.find(".") + 1]
    if embedding in storage.names or embedding.removeprefix(prefix) not in storage.names:
        return config, storage, sources
    sources = {
        ours: replace(
            source,
            name=source.name.removeprefix(prefix),
            scales=None if source.scales is None else source.scales.removeprefix(prefix),
        )
        for ours, source in family.sources(config, {prefix + name for name in storage.names}).items()
    }
    lacks_output = not config.tied_embeddings and sources["output.weight"].name not in storage.names
    return replace(config, has_output=not lacks_output), storage, sources


def _open_gguf(path: Path) -> Checkpoint:
    storage = GgufFiles(path, prefixes=tuple(f"{name}." for name in ("general", *GGUF_FAMILIES)))
    model = gguf.GgufModel(
        str(path),
        storage.metadata,
        {name: storage.shape(name) for name in storage.names},
        lambda name: tuple(storage.read(Source(name), torch.float32).tolist()),
    )
    family = gguf_family_of(model)
    document = family.gguf_document(model)
    config = _read_config(family_of(document), document)
    return Checkpoint(path, config, storage, family.gguf_sources(config, storage.names))
