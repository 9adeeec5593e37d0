"""Embedded texts a second: Gristmill's engine against transformers and sentence-transformers, in one run.

Two corpora out of the Python language reference: texts of 12 to 160 words, evenly spread, and its sections as they are,
short and long ones mixed (up to 512 words of each). Mean pooling, unit length, in float32 and in bfloat16, the format
that the model is published in. transformers gets token ids in length-sorted batches, padded on the right, of the size
in --batches at which it is fastest, and only the decoder's body runs; sentence-transformers' `encode` gets texts, as
Gristmill does, and sorts and batches them itself. Each contestant runs in its own process, one after the
other, on the same number of threads; the time is that of embedding alone, after loading and a warm-up. Their vectors
are compared: in float32 every cosine distance is below 1e-4, or the benchmark fails.

    python -m benchmarks.embedding                      # SmolLM2, both corpora, both formats, all contestants
    python -m benchmarks.embedding --dtypes bfloat16 --corpora spread --texts 64
    python -m benchmarks.embedding --profile            # where Gristmill's time goes

sentence-transformers is left out where it is not installed (`pip install -e '.[benchmarks]'`).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.generation import MODEL, load_transformers, prompts, run_one
from pipeline.model_path import resolve_model
from pipeline.tokenizer import load_tokenizer
from pipeline.tokenizers.export import write_tokenizer

CONTESTANTS = {
    "transformers": "transformers, sorted batches",
    "sentence-transformers": "sentence-transformers encode",
    "torch": "Gristmill, torch alone",
    "kernels": "Gristmill, kernels in C",
}
PEERS = ("transformers", "sentence-transformers")
BATCH = 32
PAD = 2
DTYPES = ("float32", "bfloat16")
CORPORA = ("spread", "sections")
MOST_WORDS = 512
FARTHEST = 1e-4  # cosine distance in float32

Matrix = npt.NDArray[np.float32]


def texts_of(corpus: str, count: int) -> list[str]:
    """`count` texts, or as many as there are."""
    if corpus == "spread":
        return prompts(count)
    sections = sorted(topics.items())
    step = max(1, len(sections) // count)
    return [" ".join(text.split()[:MOST_WORDS]) for _, text in sections[::step]][:count]


def embed_transformers(path: Path, texts: Sequence[str], dtype: torch.dtype, batch: int) -> tuple[float, Matrix]:
    model = load_transformers(path, dtype).model
    tokens = [load_tokenizer(path).encode(text) for text in texts]

    @torch.inference_mode()
    def embed(rows: Sequence[list[int]]) -> Matrix:
        width = max(map(len, rows))
        ids = torch.tensor([[*row, *[PAD] * (width - len(row))] for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
        states = model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state.float()
        means = (states * mask[:, :, None]).sum(dim=1) / mask.sum(dim=1, keepdim=True)
        return torch.nn.functional.normalize(means, dim=1).numpy()

    embed(tokens[:2])
    order = sorted(range(len(tokens)), key=lambda place: len(tokens[place]))
    vectors = np.empty((len(texts), model.config.hidden_size), np.float32)
    start = time.perf_counter()
    for at in range(0, len(order), batch):
        places = order[at : at + batch]
        vectors[places] = embed([tokens[place] for place in places])
    return time.perf_counter() - start, vectors


def embed_sentence_transformers(path: Path, texts: Sequence[str], dtype: torch.dtype) -> tuple[float, Matrix]:
    """From the same weights and vocabulary, written as a Hugging Face directory."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer

    with tempfile.TemporaryDirectory() as folder:
        load_transformers(path, dtype).save_pretrained(folder)
        write_tokenizer(path, Path(folder))
        _drop_chat_template(Path(folder) / "tokenizer_config.json")
        body = Transformer(folder, model_kwargs={"dtype": dtype})
        if body.tokenizer.pad_token is None:
            body.tokenizer.pad_token = body.tokenizer.eos_token
        pooling = Pooling(body.get_embedding_dimension(), pooling_mode="mean")
        model = SentenceTransformer(modules=[body, pooling, Normalize()], device="cpu")
    model.encode(["warm", "up"])
    start = time.perf_counter()
    vectors = model.encode(list(texts), batch_size=BATCH, show_progress_bar=False, convert_to_numpy=True)
    return time.perf_counter() - start, np.asarray(vectors, np.float32)


def _drop_chat_template(config: Path) -> None:
    """sentence-transformers would embed each text as a user's message."""
    document = json.loads(config.read_text())
    document.pop("chat_template", None)
    config.write_text(json.dumps(document))


def embed_gristmill(path: Path, texts: Sequence[str], dtype: str) -> tuple[float, Matrix, dict[str, float]]:
    from workers.engine import Engine

    engine = Engine.from_checkpoint(path, device="cpu", dtype=dtype)
    engine.embed(["warm", "up"])
    before = engine.stats.as_dict()
    start = time.perf_counter()
    vectors = engine.embed(list(texts))
    seconds = time.perf_counter() - start
    return seconds, vectors, {name: value - before[name] for name, value in engine.stats.as_dict().items()}


def child(contestant: str, corpus: str, count: str, dtype: str, threads: str, batch: str, file: str) -> None:
    torch.set_num_threads(int(threads))
    path, texts, stats = resolve_model(MODEL), texts_of(corpus, int(count)), dict[str, float]()
    if contestant == "transformers":
        seconds, vectors = embed_transformers(path, texts, getattr(torch, dtype), int(batch))
    elif contestant == "sentence-transformers":
        seconds, vectors = embed_sentence_transformers(path, texts, getattr(torch, dtype))
    else:
        seconds, vectors, stats = embed_gristmill(path, texts, dtype)
    np.save(file, vectors)
    print(json.dumps({"seconds": seconds, "stats": stats}))


def profile(count: int, dtype: str, threads: int) -> None:
    """What of Gristmill's embedding takes longest, by Python function."""
    import cProfile
    import pstats

    from workers.engine import Engine

    torch.set_num_threads(threads)
    engine = Engine.from_checkpoint(resolve_model(MODEL), device="cpu", dtype=dtype)
    texts = prompts(count)
    engine.embed(["warm", "up"])
    with cProfile.Profile() as measured:
        engine.embed(texts)
    pstats.Stats(measured).sort_stats("tottime").print_stats(25)


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        child(*sys.argv[2:])
        return
    installed = importlib.util.find_spec("sentence_transformers") is not None
    present = [name for name in CONTESTANTS if name != "sentence-transformers" or installed]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=512, help="of each corpus, if it has so many")
    parser.add_argument("--corpora", nargs="+", default=list(CORPORA), choices=CORPORA)
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=DTYPES)
    parser.add_argument("--batches", nargs="+", type=int, default=[8, 32, 64], help="sizes transformers is tried with")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--contestants", nargs="+", default=present, choices=list(CONTESTANTS))
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args()
    if options.profile:
        profile(options.texts, options.dtypes[0], options.threads)
        return
    for corpus in options.corpora:
        for dtype in options.dtypes:
            compare(corpus, dtype, options)


def compare(corpus: str, dtype: str, options: argparse.Namespace) -> None:
    """All contestants on one corpus in one number format."""
    texts, threads = texts_of(corpus, options.texts), options.threads
    tokens = sum(len(load_tokenizer(resolve_model(MODEL)).encode(text)) for text in texts)
    print(f"{corpus}: {len(texts)} texts of {tokens:,} tokens, {dtype}, {threads} threads")
    rates: dict[str, float] = {}
    vectors: dict[str, Matrix] = {}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "vectors.npy"

        def run(contestant: str, batch: int) -> dict[str, Any]:
            arguments = (contestant, corpus, options.texts, dtype, threads, batch, file)
            return run_one("benchmarks.embedding", *arguments, threads=threads)

        for contestant in options.contestants:
            if contestant == "transformers":
                tried = [(run(contestant, batch), batch) for batch in options.batches]
                result, batch = min(tried, key=lambda one: float(one[0]["seconds"]))
                shown = ", ".join(f"{one}: {tokens / timed['seconds']:.1f}" for timed, one in tried)
                print(f"    transformers' tokens/s by batch: {shown}; {batch} counts")
            else:
                result = run(contestant, BATCH)
            vectors[contestant] = np.load(file)
            rates[contestant] = tokens / result["seconds"]
            ratios = "".join(
                f"{rates[contestant] / rates[peer]:8.2f} x {peer}"
                for peer in PEERS
                if peer in rates and peer != contestant
            )
            print(f"{CONTESTANTS[contestant]:36} {rates[contestant]:8.1f} tokens/s {result['seconds']:8.1f} s{ratios}")
            for name, value in result["stats"].items():
                print(f"    {name:32} {value:12.2f}", flush=True)
    first, *others = options.contestants
    for other in others:
        distance = float((1 - (vectors[first] * vectors[other]).sum(axis=1)).max())
        print(f"farthest from {first}'s vectors: {other}'s, by {distance:.1e}")
        if dtype == "float32" and not distance < FARTHEST:
            raise SystemExit(f"{other} and {first} don't embed the same")


if __name__ == "__main__":
    main()
