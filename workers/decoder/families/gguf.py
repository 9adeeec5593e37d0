"""What GGUF files of all architectures share: metadata in Hugging Face's terms, and llama.cpp's names of tensors.

A family module that llama.cpp knows says under which names (`GGUF_ARCHITECTURES`), and completes from here what its
files say (`gguf_document`) and where its tensors are (`gguf_sources`). The keys are described in ggml's docs/gguf.md.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from torch import Tensor

from pipeline.errors import UserError
from workers.decoder.config import DecoderConfig, ExpertsConfig
from workers.decoder.families.document import Document
from workers.decoder.storage import Source

# Ours in a layer -> llama.cpp's; both with .weight or .bias behind.
_LAYER_NAMES = {
    "attention_norm": "attn_norm",
    "attention_post_norm": "post_attention_norm",
    "attention.output": "attn_output",
    "attention.query_norm": "attn_q_norm",
    "attention.key_norm": "attn_k_norm",
    "feed_forward_norm": "ffn_norm",
    "feed_forward_post_norm": "post_ffw_norm",
    "feed_forward.down": "ffn_down",
    "feed_forward.router": "ffn_gate_inp",
}
_KINDS = ("weight", "bias")


class GgufModel:
    """A file's metadata under its architecture's prefix, and what is known of its tensors without reading them."""

    def __init__(
        self,
        where: str,
        metadata: Mapping[str, Any],
        shapes: Mapping[str, tuple[int, ...]],
        numbers: Callable[[str], tuple[float, ...]],
    ) -> None:
        self.where = where
        self.architecture = str(metadata.get("general.architecture"))
        prefix = f"{self.architecture}."
        self.own = Document(where, {k.removeprefix(prefix): v for k, v in metadata.items() if k.startswith(prefix)})
        self.shapes = shapes
        self.numbers = numbers  # of a small tensor, by its name

    def __contains__(self, tensor: str) -> bool:
        return tensor in self.shapes

    def rows(self, tensor: str) -> int:
        if tensor not in self.shapes:
            raise UserError(f"{self.where}: has no tensor {tensor}; fetch the file again")
        return self.shapes[tensor][0]

    @property
    def head_width(self) -> int:
        equal = self.own.integer("embedding_length") // self.own.integer("attention.head_count")
        return self.own.integer("attention.key_length", equal)

    def document(self, model_type: str, **values: Any) -> Document:
        """What nearly every file says, under the keys of a Llama's config.json; `values` replace and complete it."""
        own = self.own
        heads, width = own.integer("attention.head_count"), self.head_width
        if "v_head_dim" not in values and own.integer("attention.value_length", width) != width:
            raise UserError(f"{self.where}: values of another width than keys are not supported for {model_type}")
        common: dict[str, Any] = {
            "model_type": model_type,
            "vocab_size": self.rows("token_embd.weight"),
            "hidden_size": own.integer("embedding_length"),
            "intermediate_size": own.values.get("feed_forward_length"),
            "num_hidden_layers": own.integer("block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": own.integer("attention.head_count_kv", heads),
            "head_dim": width,
            "max_position_embeddings": own.integer("context_length"),
            "rms_norm_eps": own.values.get("attention.layer_norm_rms_epsilon"),
            "layer_norm_eps": own.values.get("attention.layer_norm_epsilon"),
            "rope_theta": own.number("rope.freq_base", 10_000.0),
            "rope_scaling": self.rope_scaling(),
            # half a column more, so that what is read as int(head width * factor) is this number again
            "partial_rotary_factor": (own.integer("rope.dimension_count", width) + 0.5) / width,
            "sliding_window": own.values.get("attention.sliding_window"),
            "tie_word_embeddings": "output.weight" not in self,
            "is_causal": own.values.get("attention.causal"),
        }
        return Document(self.where, common | values)

    def rope_scaling(self) -> dict[str, Any] | None:
        if "rope_freqs.weight" in self:
            return {"rope_type": "divisors", "divisors": self.numbers("rope_freqs.weight")}
        kind = self.own.text("rope.scaling.type", "none")
        if kind == "none":
            return None
        scaling: dict[str, Any] = {"rope_type": kind, "factor": self.own.number("rope.scaling.factor")}
        if kind == "yarn":
            scaling |= {
                "original_max_position_embeddings": self.own.integer("rope.scaling.original_context_length"),
                "beta_fast": self.own.number("rope.scaling.yarn_beta_fast", 32.0),
                "beta_slow": self.own.number("rope.scaling.yarn_beta_slow", 1.0),
            }
        return scaling


def sources(config: DecoderConfig, names: Collection[str], *, pairs_apart: bool = True) -> dict[str, Source]:
    """llama.cpp's names of our tensors, as far as architectures agree on them; a family adds its own.

    Query, key and value may come as one tensor, gate and up as well, experts stacked or one by one. `pairs_apart` is
    False where llama.cpp has reordered query and key rows for its rotation (see `HalvesTogether`).
    """
    found = {}
    for kind in _KINDS:
        found[f"embedding.{kind}"] = Source(f"token_embd.{kind}")
        found[f"positions.{kind}"] = Source(f"position_embd.{kind}")
        found[f"embedding_norm.{kind}"] = Source(f"token_embd_norm.{kind}")
        found[f"norm.{kind}"] = Source(f"output_norm.{kind}")
        found[f"output.{kind}"] = Source(f"output.{kind}")
    for i in range(len(config.layers)):
        found |= _attention_sources(config, names, i, pairs_apart)
        found |= _feed_forward_sources(config, names, i)
        found[f"layers.{i}.attention.sinks"] = Source(f"blk.{i}.attn_sinks.weight")
        for ours, published in _LAYER_NAMES.items():
            for kind in _KINDS:
                found[f"layers.{i}.{ours}.{kind}"] = Source(f"blk.{i}.{published}.{kind}")
    return found


def _attention_sources(config: DecoderConfig, names: Collection[str], i: int, pairs_apart: bool) -> dict[str, Source]:
    spec = config.layers[i].attention.spec
    parts = (
        ("query", "q", spec.num_heads, spec.head_width),
        ("key", "k", spec.num_kv_heads, spec.head_width),
        ("value", "v", spec.num_kv_heads, spec.value_width),
    )
    found, begin = {}, 0
    for ours, letter, heads, width in parts:
        arrange = None if pairs_apart or ours == "value" else HalvesTogether(heads)
        end = begin + heads * width
        for kind in _KINDS:
            source = Source(f"blk.{i}.attn_{letter}.{kind}", arrange=arrange)
            if f"blk.{i}.attn_qkv.{kind}" in names:
                source = Source(f"blk.{i}.attn_qkv.{kind}", rows=(begin, end), arrange=arrange)
            found[f"layers.{i}.attention.{ours}.{kind}"] = source
        begin = end
    return found


def _feed_forward_sources(config: DecoderConfig, names: Collection[str], i: int) -> dict[str, Source]:
    found = {}
    forward = config.layers[i].feed_forward
    ours, blk = f"layers.{i}.feed_forward", f"blk.{i}"
    if isinstance(forward, ExpertsConfig):
        found[f"{ours}.shared_gate.weight"] = Source(f"{blk}.ffn_gate_inp_shexp.weight", arrange=_as_row)
        found[f"{ours}.router.correction"] = Source(f"{blk}.exp_probs_b.bias")
        for name in ("gate", "up", "down"):
            found[f"{ours}.shared.{name}.weight"] = Source(f"{blk}.ffn_{name}_shexp.weight")
        for e in range(forward.router.num_experts):
            for name in ("gate", "up", "down"):
                for kind in _KINDS:
                    single = f"{blk}.ffn_{name}.{e}.{kind}"  # before llama.cpp stacked them
                    stacked = Source(f"{blk}.ffn_{name}_exps.{kind}", at=e)
                    found[f"{ours}.experts.{e}.{name}.{kind}"] = Source(single) if single in names else stacked
        return found
    for kind in _KINDS:
        up = f"{blk}.ffn_up.{kind}"
        found[f"{ours}.gate.{kind}"], found[f"{ours}.up.{kind}"] = Source(f"{blk}.ffn_gate.{kind}"), Source(up)
        if forward.gated and up in names and f"{blk}.ffn_gate.{kind}" not in names:  # Phi-3
            found[f"{ours}.gate.{kind}"] = Source(up, rows=(0, forward.width))
            found[f"{ours}.up.{kind}"] = Source(up, rows=(forward.width, 2 * forward.width))
    return found


def _as_row(gate: Tensor) -> Tensor:
    """llama.cpp keeps the shared expert's gate as [C]; ours is [1, C]."""
    return gate.view(1, -1)


class HalvesTogether:
    """Undoes llama.cpp's order of query and key rows, which pairs row 2i of a head with 2i + 1 for its rotation.

    Ours, like Hugging Face's, pairs row i with i + half: [0, 2, 4, 1, 3, 5] of each head of width 6.
    """

    def __init__(self, num_heads: int) -> None:
        self._num_heads = num_heads

    def __call__(self, rows: Tensor) -> Tensor:
        return rows.view(self._num_heads, -1, 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)
