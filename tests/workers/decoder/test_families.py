"""The forms in which dense architectures are published, and what of them is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.errors import UserError
from workers.decoder.checkpoint import load_checkpoint
from workers.decoder.families.gguf import GgufModel
from workers.decoder.families.layer_norm import alibi_slopes
from workers.decoder.families.registry import family_of, gguf_family_of
from workers.decoder.model import Decoder
from workers.engine import Engine, SamplingParams
from workers.engine_factory import load_engine
from workers.settings import EngineSettings

PROMPT = torch.randint(3, 603, (30,), generator=torch.Generator().manual_seed(4)).tolist()
ABSENT = object()


@pytest.fixture
def altered(tiny_model: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """`altered(model_type, settings, changes, rename)`: a tiny checkpoint with another config.json and tensor names."""

    def make(
        model_type: str, settings: dict[str, Any], changes: dict[str, Any], rename: Callable[[str], str] = str
    ) -> Path:
        folder = Path(shutil.copytree(tiny_model(model_type, tokenizer=False, **settings), tmp_path / "model"))
        config = json.loads((folder / "config.json").read_text()) | changes
        written = {key: value for key, value in config.items() if value is not ABSENT}
        (folder / "config.json").write_text(json.dumps(written))
        tensors = load_file(folder / "model.safetensors")
        save_file({rename(name): tensor for name, tensor in tensors.items()}, folder / "model.safetensors")
        return folder

    return make


@pytest.mark.parametrize("model_type", ["gpt2", "bloom"])
def test_tensors_are_found_without_the_prefix_that_transformers_writes(
    model_type: str, altered: Callable[..., Path], tiny_model: Any, paged: Any
) -> None:
    """As in the models' first files."""
    settings = {"tie_word_embeddings": True}
    folder = altered(model_type, settings, {}, lambda name: name.removeprefix("transformer."))
    whole = tiny_model(model_type, tokenizer=False, **settings)
    assert torch.equal(paged(folder).logits(PROMPT), paged(whole).logits(PROMPT))


@pytest.mark.parametrize("model_type", ["mistral", "gemma3_text", "mixtral"])
def test_a_base_model_saved_alone_embeds_and_does_not_generate(
    model_type: str, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    """As E5-Mistral and Qwen3-Embedding are published."""
    whole = tiny_model(model_type)
    folder = Path(shutil.copytree(whole, tmp_path / "model"))
    tensors = {name.removeprefix("model."): tensor for name, tensor in load_file(whole / "model.safetensors").items()}
    tensors.pop("lm_head.weight", None)
    save_file(tensors, folder / "model.safetensors")
    engine, texts = Engine.from_checkpoint(folder, dtype="float32"), ["a fox", "éclair"]
    assert (engine.embed(texts) == Engine.from_checkpoint(whole, dtype="float32").embed(texts)).all()
    if engine.decoder.config.tied_embeddings:
        assert engine.generate(texts)
    else:
        with pytest.raises(ValueError, match="no output matrix to generate with"):
            engine.generate(texts)
        engine.embed(texts)
        with pytest.raises(UserError, match="no output matrix to generate with, its files hold the base model alone"):
            load_engine(EngineSettings(model_path=str(folder), dtype="float32")).refuse_generation("the model")


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_gemma_3_that_sees_images_is_read_for_its_text_part(
    prefix: str, altered: Callable[..., Path], tiny_model: Any, paged: Any
) -> None:
    text = json.loads((tiny_model("gemma3_text", tokenizer=False) / "config.json").read_text())
    changes = dict.fromkeys(text, ABSENT) | {"model_type": "gemma3", "text_config": text, "vision_config": {}}
    folder = altered("gemma3_text", {}, changes, lambda name: prefix + name.removeprefix("model."))
    whole = tiny_model("gemma3_text", tokenizer=False)
    assert torch.equal(paged(folder).logits(PROMPT), paged(whole).logits(PROMPT))


GEMMA_3_ROPE = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5e5},
    "sliding_attention": {"rope_type": "default", "rope_theta": 5e3},
}


@pytest.mark.parametrize(
    ("model_type", "settings", "older"),
    [
        (
            *("gemma3_text", {"rope_parameters": GEMMA_3_ROPE}),
            {
                **{"rope_parameters": ABSENT, "layer_types": ABSENT, "sliding_window_pattern": 6, "rope_theta": 5e5},
                **{"rope_local_base_freq": 5e3, "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
            },
        ),
        ("gemma2", {}, {"layer_types": ABSENT, "rope_parameters": ABSENT, "tie_word_embeddings": ABSENT}),
        ("gpt_neox", {}, {"rope_parameters": ABSENT, "rotary_pct": 0.4, "rotary_emb_base": 10000}),
        (
            *("phi3", {"partial_rotary_factor": 0.4, "original_max_position_embeddings": 32}),
            {"rope_parameters": ABSENT, "rope_theta": 10000.0, "partial_rotary_factor": 0.4, "rope_scaling": None},
        ),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 3}, {"layer_types": ABSENT}),
        ("gpt_neo", {}, {"attention_layers": ABSENT, "activation_function": ABSENT}),
        ("bloom", {}, {"n_head": ABSENT, "num_attention_heads": 6, "hidden_size": ABSENT, "n_embed": 60}),
    ],
)
def test_configurations_of_older_transformers_mean_the_same(
    model_type: str, settings: dict[str, Any], older: dict[str, Any], altered: Callable[..., Path], tiny_model: Any
) -> None:
    now = load_checkpoint(tiny_model(model_type, tokenizer=False, **settings)).config
    assert load_checkpoint(altered(model_type, settings, older)).config == now


LONGROPE = {
    "original_max_position_embeddings": 32,
    "rope_parameters": {
        **{"rope_type": "longrope", "rope_theta": 1e4},
        **{"short_factor": [1.0, 1.1, 1.2, 1.3, 1.4], "long_factor": [1.0, 1.5, 2.5, 4.0, 9.0]},
    },
}


def test_longrope_takes_its_short_factors_where_a_decoder_is_loaded_for_short_contexts(
    tiny_model: Callable[..., Path], paged: Any, reference: Any
) -> None:
    folder = tiny_model("phi3", tokenizer=False, **LONGROPE)
    with torch.no_grad():
        wanted = reference(folder)(torch.tensor([PROMPT])).logits[0]
    short = paged(Decoder.load(folder, dtype="float32", max_context=32)).logits(PROMPT)
    assert (short - wanted).abs().max() / wanted.abs().max() < 1e-4
    assert (paged(folder).logits(PROMPT) - wanted).abs().max() / wanted.abs().max() > 1e-2


def test_an_engine_tells_the_decoder_how_long_its_contexts_are(tiny_model: Callable[..., Path], reference: Any) -> None:
    folder = tiny_model("phi3", tokenizer=False, **LONGROPE)
    engine = Engine.from_checkpoint(folder, dtype="float32", max_context=32)
    (output,) = engine.generate([PROMPT[:4]], SamplingParams(max_new_tokens=28, temperature=0.0, ignore_eos=True))
    ids = torch.tensor([PROMPT[:4]])
    generated = reference(folder).generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=28, do_sample=False, eos_token_id=None
    )
    assert output.token_ids == generated[0, 4:].tolist()


@pytest.mark.parametrize(
    ("model_type", "changes", "complaint"),
    [
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention True is not supported, only False"),
        ("gpt2", {"activation_function": "mish"}, "activation_function 'mish' is not supported"),
        ("gpt_neo", {"attention_types": [[["global"], 3]]}, "attention_types must be .* for each of 4 layers"),
        ("gpt_neo", {"attention_types": [[["axial"], 4]]}, "attention_types must be"),
        ("bloom", {"apply_residual_connection_post_layernorm": True}, "apply_residual_connection_post_layernorm"),
        ("bloom", {"n_head": 7}, "hidden_size must be a multiple of 7"),
        ("mpt", {"attn_config": {"alibi": False}}, "attn_config: alibi False is not supported"),
        ("mpt", {"attn_config": {"qk_ln": True}}, "attn_config: qk_ln True is not supported"),
        ("mpt", {"no_bias": False}, "no_bias False is not supported"),
        ("xglm", {"pad_token_id": 2}, "pad_token_id must be below 2"),
        ("gemma", {"use_bidirectional_attention": True}, "use_bidirectional_attention True is not supported"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention True is not supported"),
        ("qwen2", {"is_causal": False}, "is_causal False is not supported"),
        ("gemma2", {"final_logit_softcapping": 0.0}, "final_logit_softcapping must be a number above 0"),
        ("gemma2", {"layer_types": ["full_attention"]}, "layer_types must be 4 times"),
        ("gemma2", {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar must be"),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping 50.0 is not supported"),
        ("phi3", {"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0]}}, "long_factor is missing"),
        (
            *("phi3", {"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}}),
            "factor must be a list of 5 numbers",
        ),
        ("gpt_neox", {"rope_parameters": {"partial_rotary_factor": 0.3}}, "rotary positions need an even width"),
        ("llama", {"rope_parameters": {"rope_type": "spiral"}}, "rope_type 'spiral' is not supported"),
    ],
)
def test_what_can_not_be_done_is_refused_in_one_line(
    model_type: str, changes: dict[str, Any], complaint: str, altered: Callable[..., Path]
) -> None:
    folder = altered(model_type, {}, changes)
    with pytest.raises(UserError, match=complaint) as caught:
        load_checkpoint(folder)
    assert str(folder / "config.json") in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("architecture", "layers"), [("gemma2", 46), ("gemma3", 62)])
def test_a_gguf_of_the_27b_gemmas_divides_scores_by_the_model_width_a_head(architecture: str, layers: int) -> None:
    """4608 / 32 and 5376 / 32 in the published configurations, which the files leave out."""
    own = {"embedding_length": 4608, "attention.head_count": 32, "attention.key_length": 128, "context_length": 8192}
    own |= {"feed_forward_length": 64, "attention.layer_norm_rms_epsilon": 1e-6, "attention.sliding_window": 64}
    shapes = {"token_embd.weight": (1000, 4608)}
    for count, width in ((layers, 144), (layers - 4, 128)):
        metadata = {f"{architecture}.{key}": value for key, value in (own | {"block_count": count}).items()}
        model = GgufModel("f.gguf", metadata | {"general.architecture": architecture}, shapes, lambda name: ())
        document = gguf_family_of(model).gguf_document(model)
        assert family_of(document).read_config(document).layers[0].attention.spec.scale == width**-0.5


def test_alibi_slopes_between_powers_of_two_are_those_of_the_paper() -> None:
    assert alibi_slopes(4) == (2**-2, 2**-4, 2**-6, 2**-8)
    assert alibi_slopes(6) == (2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3)
