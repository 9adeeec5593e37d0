"""GGUF files: their metadata as the configuration that the same model has on Hugging Face, and their tensors' names.

The keys are described in ggml's docs/gguf.md. What llama.cpp calls "llama" is Llama, Mistral and Mixtral alike.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor

from pipeline.errors import UserError
from workers.decoder.config import DecoderConfig, ExpertsConfig
from workers.decoder.families.document import Document
from workers.decoder.storage import Source

ARCHITECTURES = ("llama",)


def read_document(where: str, metadata: Mapping[str, Any], tensors: GgufTensors) -> Document:
    architecture = metadata.get("general.architecture")
    if architecture not in ARCHITECTURES:
        raise UserError(f"{where}: architecture {architecture!r} is not supported ({', '.join(ARCHITECTURES)} is)")
    prefix = f"{architecture}."
    own = Document(where, {k.removeprefix(prefix): v for k, v in metadata.items() if k.startswith(prefix)})
    heads = own.integer("attention.head_count")
    hidden_width = own.integer("embedding_length")
    experts = own.integer("expert_count") if own.values.get("expert_count") else 0
    head_width = own.integer("attention.key_length", hidden_width // heads)
    if own.integer("rope.dimension_count", head_width) != head_width:
        raise UserError(f"{where}: rope.dimension_count below the head width is not supported for {architecture}")
    values: dict[str, Any] = {
        "model_type": "mixtral" if experts else "llama",
        "vocab_size": tensors.rows("token_embd.weight"),
        "hidden_size": hidden_width,
        "intermediate_size": own.integer("feed_forward_length"),
        "num_hidden_layers": own.integer("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": own.integer("attention.head_count_kv", heads),
        "head_dim": head_width,
        "max_position_embeddings": own.integer("context_length"),
        "rms_norm_eps": own.number("attention.layer_norm_rms_epsilon"),
        "rope_theta": own.number("rope.freq_base", 10_000.0),
        "rope_scaling": _rope_scaling(own, tensors),
        "tie_word_embeddings": "output.weight" not in tensors,
        "attention_bias": "blk.0.attn_q.bias" in tensors,
    }
    if experts:
        values |= {"num_local_experts": experts, "num_experts_per_tok": own.integer("expert_used_count")}
    return Document(where, values)


def sources(config: DecoderConfig, names: Collection[str]) -> dict[str, Source]:
    found = {
        "embedding.weight": Source("token_embd.weight"),
        "norm.weight": Source("output_norm.weight"),
        "output.weight": Source("output.weight"),
    }
    for i, layer in enumerate(config.layers):
        ours, blk = f"layers.{i}", f"blk.{i}"
        spec = layer.attention.spec
        found[f"{ours}.attention_norm.weight"] = Source(f"{blk}.attn_norm.weight")
        found[f"{ours}.feed_forward_norm.weight"] = Source(f"{blk}.ffn_norm.weight")
        for kind in ("weight", "bias"):
            found[f"{ours}.attention.query.{kind}"] = Source(
                f"{blk}.attn_q.{kind}", arrange=HalvesTogether(spec.num_heads)
            )
            found[f"{ours}.attention.key.{kind}"] = Source(
                f"{blk}.attn_k.{kind}", arrange=HalvesTogether(spec.num_kv_heads)
            )
            found[f"{ours}.attention.value.{kind}"] = Source(f"{blk}.attn_v.{kind}")
            found[f"{ours}.attention.output.{kind}"] = Source(f"{blk}.attn_output.{kind}")
        if not isinstance(layer.feed_forward, ExpertsConfig):
            for name in ("gate", "up", "down"):
                found[f"{ours}.feed_forward.{name}.weight"] = Source(f"{blk}.ffn_{name}.weight")
            continue
        found[f"{ours}.feed_forward.router.weight"] = Source(f"{blk}.ffn_gate_inp.weight")
        for e in range(layer.feed_forward.router.num_experts):
            for name in ("gate", "up", "down"):
                single = f"{blk}.ffn_{name}.{e}.weight"  # before llama.cpp stacked them
                source = Source(single) if single in names else Source(f"{blk}.ffn_{name}_exps.weight", at=e)
                found[f"{ours}.feed_forward.experts.{e}.{name}.weight"] = source
    return found


class HalvesTogether:
    """Undoes llama.cpp's order of query and key rows, which pairs row 2i of a head with 2i + 1 for its rotation.

    Ours, like Hugging Face's, pairs row i with i + half: [0, 2, 4, 1, 3, 5] of each head of width 6.
    """

    def __init__(self, num_heads: int) -> None:
        self._num_heads = num_heads

    def __call__(self, rows: Tensor) -> Tensor:
        return rows.view(self._num_heads, -1, 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


class GgufTensors:
    """What `read_document` needs to know of a file's tensors."""

    def __init__(self, where: str, shapes: Mapping[str, tuple[int, ...]], divisors: tuple[float, ...]) -> None:
        self._where = where
        self._shapes = shapes
        self.divisors = divisors  # rope_freqs.weight, where there is one

    def __contains__(self, name: str) -> bool:
        return name in self._shapes

    def rows(self, name: str) -> int:
        if name not in self._shapes:
            raise UserError(f"{self._where}: has no tensor {name}; fetch the file again")
        return self._shapes[name][0]


def _rope_scaling(own: Document, tensors: GgufTensors) -> dict[str, Any] | None:
    if tensors.divisors:
        return {"rope_type": "divisors", "divisors": tensors.divisors}
    kind = own.text("rope.scaling.type", "none")
    if kind == "none":
        return None
    return {"rope_type": kind, "factor": own.number("rope.scaling.factor")}
