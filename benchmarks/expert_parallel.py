"""What spreading experts costs: tokens a second over several ranks against one shard with as many threads.

The same Mixture-of-Experts model (SmolLM2 upcycled to 8 experts, 2 a token), the same prompts, greedy, the
end of text ignored. Over R ranks of one thread each a rank gets every R-th prompt; the time is from when all have
loaded and warmed up until the last answer. Bytes are of hidden states that went to another rank, a token and layer,
both ways; the least that would do is one row to each other rank that holds any of its experts, and one sum back.

    python -m benchmarks.expert_parallel
    python -m benchmarks.expert_parallel --prompts 32 --new-tokens 16 --ranks 3 --model out/demo/model
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.generation import MODEL, prompts
from pipeline.model_path import resolve_model
from workers.decoder.upcycle import upcycle
from workers.engine import Engine
from workers.engine.request import GenerateRequest, SamplingParams
from workers.forecast import expert_layers
from workers.gang_engine import GangEngine
from workers.parallel.exchange import AllToAllDispatcher
from workers.parallel.group import Gang, Rendezvous
from workers.parallel.placement import Placement, Topology, round_robin
from workers.parallel.seat import Seat

UPCYCLED = Path("out/benchmarks/moe")
WARM_TOKENS = 4
MIN_SHARE = 0.8


class CountingDispatcher(AllToAllDispatcher):
    """Counts besides how many other ranks each token had to reach."""

    least_rows = 0

    def _slots(self, layer: int, num_experts: int, expert_ids: Tensor) -> Tensor:
        slots = super()._slots(layer, num_experts, expert_ids)
        ends = torch.tensor(self._layers[layer].slots).cumsum(0)
        ranks = torch.searchsorted(ends, slots.view(expert_ids.shape), right=True)  # [T, k]
        reached = torch.zeros(ranks.shape[0], len(ends), dtype=torch.bool).scatter_(1, ranks, True)
        reached[:, self._gang.rank] = False
        self.least_rows += int(reached.sum())
        return slots


def child(model: str, texts: str, new_tokens: str, dtype: str, threads: str, seat: str) -> None:
    """One rank, or a shard without a gang."""
    torch.set_num_threads(int(threads))
    own = json.loads(Path(texts).read_text())
    if seat == "null":
        engine: Any = Engine.from_checkpoint(model, dtype=dtype)
        gang = dispatcher = None
        tokenizer = engine.tokenizer
    else:
        place = Seat(**json.loads(seat))
        gang, placement = Gang(place, torch.device("cpu")), Placement.from_json(place.placement)
        dispatcher = CountingDispatcher(gang, placement, Topology.even(place.num_ranks))
        held = placement.held_by(place.rank, 1 + max(placement.layers))
        plain = Engine.from_checkpoint(model, dtype=dtype, experts=held, dispatcher=dispatcher)
        gang.form()
        engine, tokenizer = GangEngine(plain, gang, dispatcher), plain.tokenizer
        own = own[place.rank :: place.num_ranks]
    assert tokenizer is not None
    ids = [tokenizer.encode(text) for text in own]
    generate(engine, gang, ids[:2], WARM_TOKENS)
    before, least = engine.stats.as_dict(), dispatcher.least_rows if dispatcher else 0
    begin = time.perf_counter()
    generated = generate(engine, gang, ids, int(new_tokens))
    seconds = time.perf_counter() - begin
    after = engine.stats.as_dict()
    result = {"seconds": seconds, "generated": generated, "stats": {name: after[name] - before[name] for name in after}}
    if dispatcher is not None:
        result |= {"layers": len(placement.layers), "least_rows": dispatcher.least_rows - least}
        result["row_bytes"] = 4 * plain.decoder.hidden_width
    print(json.dumps(result))


def generate(engine: Any, gang: Gang | None, prompts_ids: list[list[int]], new_tokens: int) -> int:
    """Tokens generated here, once the whole gang is done."""
    params = SamplingParams(max_new_tokens=new_tokens, temperature=0.0, ignore_eos=True)
    for i, ids in enumerate(prompts_ids):
        engine.add(GenerateRequest(request_id=i, token_ids=ids, params=params, key=i))
    answered = generated = 0
    while True:
        if gang is not None:
            engine.agree(stopping=False)
        for answer in engine.step() if engine.has_work else []:
            answered += 1
            generated += len(answer.token_ids)
        done = answered == len(prompts_ids)
        if done if gang is None else all(told == [1] for told in gang.tell([int(done)])):
            return generated


def run(model: Path, texts: Path, options: argparse.Namespace, ranks: int, threads: int) -> list[dict[str, Any]]:
    """Each rank's result; one rank is a shard without a gang."""
    seats: list[Any] = [None]
    if ranks > 1:
        layers, num_experts = expert_layers(model)
        rendezvous = Rendezvous("127.0.0.1")
        placement = round_robin(layers, num_experts, ranks).to_json()
        seats = [asdict(seat) for seat in rendezvous.seats("benchmark", ["here"] * ranks, placement)]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
    processes = [
        subprocess.Popen(
            [
                *(sys.executable, "-m", "benchmarks.expert_parallel", "--child"),
                *(str(model), str(texts), str(options.new_tokens), options.dtype, str(threads), json.dumps(seat)),
            ],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        for seat in seats
    ]
    results = []
    for process in processes:
        out, _ = process.communicate()
        if process.returncode:
            raise SystemExit(f"a rank failed with {process.returncode}")
        results.append(json.loads(out.splitlines()[-1]))
    if ranks > 1:
        rendezvous.close()
    return results


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        child(*sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help=f"a Mixture of Experts; made in {UPCYCLED} unless given")
    parser.add_argument("--prompts", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--ranks", type=int, default=2)
    options = parser.parse_args()
    if options.model is None and not (UPCYCLED / "config.json").exists():
        upcycle(resolve_model(MODEL), UPCYCLED, experts=8, top_k=2)
    model = UPCYCLED if options.model is None else resolve_model(options.model)
    texts = Path("out/benchmarks/prompts.json")
    texts.parent.mkdir(parents=True, exist_ok=True)
    texts.write_text(json.dumps(prompts(options.prompts)))
    ranks = options.ranks
    print(f"{model}: {options.prompts} prompts, {options.new_tokens} new tokens, {options.dtype}")
    rates = {}
    for name, num_ranks, threads in (
        (f"1 shard, {ranks} threads", 1, ranks),
        (f"{ranks} ranks, 1 thread each", ranks, 1),
    ):
        results = run(model, texts, options, num_ranks, threads)
        seconds = max(result["seconds"] for result in results)
        rates[num_ranks] = sum(result["generated"] for result in results) / seconds
        print(f"{name:28} {rates[num_ranks]:8.1f} tokens/s {seconds:8.1f} s", flush=True)
    print(f"{'share kept':28} {rates[ranks] / rates[1]:8.2f}   (at least {MIN_SHARE} is wanted)")
    show_traffic(results)


def show_traffic(results: list[dict[str, Any]]) -> None:
    stats = [result["stats"] for result in results]
    layers, row_bytes = results[0]["layers"], results[0]["row_bytes"]
    steps = stats[0]["steps"]
    tokens = sum(one["prefill_tokens"] + one["decode_tokens"] for one in stats)
    moved = sum(one["exchanged_bytes"] for one in stats)
    least = sum(result["least_rows"] for result in results) * row_bytes * 2
    print(f"    exchanges a layer and step   {stats[0]['exchanges'] / steps / layers:12.2f}")
    print(f"    bytes a token and layer      {moved / tokens / layers:12.0f}   at least {least / tokens / layers:.0f}")
    for rank, one in enumerate(stats):
        spent = one["prefill_s"] + one["decode_s"]
        print(
            f"    rank {rank}: {one['exchange_s'] / spent:.0%} of {spent:.1f} s in the decoder exchanging and waiting"
        )


if __name__ == "__main__":
    main()
