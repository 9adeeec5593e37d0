"""Small real things that tests share: a tokenizer trained on the language reference, and seeded random checkpoints."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import yaml
from hypothesis import HealthCheck, settings

# How long an example takes says more about what else the machine does than about the code.
settings.register_profile("gristmill", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("gristmill")

PARITY = Path(__file__).parent / "workers" / "decoder" / "parity"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="session")
def tiny_tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE tokenizer of 600 tokens in Hugging Face layout, with a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([topics[name] for name in sorted(topics)[:12]], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    fast.chat_template = CHAT_TEMPLATE
    folder = tmp_path_factory.mktemp("tokenizer")
    fast.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer_dir: Path) -> Callable[..., Path]:
    """`tiny_model("llama", **config overrides)` -> a seeded random checkpoint of 4 layers in Hugging Face layout.

    Weights are drawn wide enough (standard deviation 0.2) that a misrouted token or position changes the answer. What
    an architecture needs beyond the settings here is in tests/workers/decoder/parity/MODEL_TYPE.yaml.
    """
    made: dict[str, Path] = {}

    def make(model_type: str = "llama", *, seed: int = 0, tokenizer: bool = True, **overrides: Any) -> Path:
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        settings: dict[str, Any] = {
            "vocab_size": 603,
            "hidden_size": 60,
            "intermediate_size": 72,
            "num_hidden_layers": 4,
            "num_attention_heads": 6,
            "num_key_value_heads": 3,
            "head_dim": 10,
            "max_position_embeddings": 512,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
            "initializer_range": 0.2,
            "tie_word_embeddings": False,
        }
        own = yaml.safe_load((PARITY / f"{model_type}.yaml").read_text(encoding="utf-8"))
        for name in own.get("without", ()):
            del settings[name]
        settings |= own.get("settings", {}) | overrides
        key = hashlib.sha256(json.dumps([model_type, seed, tokenizer, settings], sort_keys=True).encode()).hexdigest()
        if key not in made:
            torch.manual_seed(seed)
            config = AutoConfig.for_model(model_type, **settings)
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
            # Ones and zeros everywhere would hide a norm or a bias that is skipped.
            for name, tensor in (*model.named_parameters(), *model.named_buffers()):
                if not tensor.is_floating_point():
                    continue
                if name.endswith(("bias", "sinks")):
                    torch.nn.init.normal_(tensor, 0, 0.3)
                elif tensor.ndim == 1 and name.endswith("weight"):
                    torch.nn.init.uniform_(tensor, 0.5, 1.5)
            folder = tmp_path_factory.mktemp(model_type)
            model.save_pretrained(folder)
            if tokenizer:
                for file in tiny_tokenizer_dir.iterdir():
                    (folder / file.name).write_bytes(file.read_bytes())
            made[key] = folder
        return made[key]

    return make
