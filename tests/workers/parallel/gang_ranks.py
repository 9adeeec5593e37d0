"""What one rank of a gang does in a process of its own, for tests."""

from __future__ import annotations

import os
import pickle
import signal
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import torch

from workers.engine import SamplingParams
from workers.engine.request import EmbedRequest, GenerateRequest
from workers.engine_factory import load_engine
from workers.parallel.dispatch import LocalDispatcher
from workers.parallel.exchange import AllToAllDispatcher
from workers.parallel.group import Gang
from workers.parallel.placement import Placement, Topology
from workers.parallel.seat import Seat
from workers.settings import EngineSettings


def requests_of(task: dict[str, Any]) -> list[GenerateRequest | EmbedRequest]:
    found: list[GenerateRequest | EmbedRequest] = []
    for row, tokens in enumerate(task["prompts"]):
        found.append(
            GenerateRequest(
                request_id=2 * row, token_ids=tokens, params=SamplingParams(**task["params"][row % 2]), key=row
            )
        )
        found.append(EmbedRequest(request_id=2 * row + 1, token_ids=tokens))
    return found


def anonymous_bytes() -> int:
    """Resident memory that is no file's."""
    memory = psutil.Process().memory_info()
    return int(memory.rss - memory.shared)


def answers(task: dict[str, Any], seat: Seat | None) -> dict[str, Any]:
    """Every request's answer, from whichever rank `task["shares"]` gives it to. Rank r begins `late_s[r]` later."""
    settings = {"threads": 1, "dtype": "float32", "kv_cache_bytes": 1 << 20} | task.get("engine", {})
    before = anonymous_bytes()
    loaded = load_engine(EngineSettings(model_path=task["model"], seat=seat, **settings))
    resident = anonymous_bytes() - before
    engine, lock_step = loaded.engine, loaded.lock_step
    rank = seat.rank if seat else 0
    mine = [request for request in requests_of(task) if seat is None or task["shares"][request.request_id] == rank]
    begin_at = time.monotonic() + task.get("late_s", [0.0] * 8)[rank]
    found = {}
    while len({key for key, _ in found}) < len(mine) or lock_step is not None:
        if mine and time.monotonic() >= begin_at:
            for request in mine:
                engine.add(request)
            begin_at = float("inf")
        if lock_step is not None and lock_step.agree(stopping=(Path(task["out"]) / "stop").exists()):
            break
        if engine.has_work:
            for one in engine.step():
                vector = None if one.vector is None else one.vector.tobytes()
                found[one.request_id, one.sample] = (list(one.token_ids), one.finish_reason, vector)
        if lock_step is not None and len({key for key, _ in found}) == len(mine):
            (Path(task["out"]) / f"done-{rank}").touch()
            if all((Path(task["out"]) / f"done-{other}").exists() for other in range(seat.num_ranks)):
                (Path(task["out"]) / "stop").touch()
    decoder = getattr(engine, "_engine", engine).decoder
    banks = [bank for block in decoder.blocks if hasattr(block.feed_forward, "gate_up")
             for bank in (block.feed_forward.gate_up, block.feed_forward.down)]  # fmt: skip
    return {
        "found": found,
        "steps": engine.stats.steps,
        "stats": engine.stats.as_dict(),
        "bank_bytes": sum(bank.nbytes for bank in banks if bank.dtype),
        "resident_bytes": resident,
    }


def dispatched(task: dict[str, Any], seat: Seat) -> dict[str, Any]:
    """This rank's tokens through the experts of `task["placement"]`, and through local ones: both answers."""
    gang = Gang(seat, torch.device("cpu"))
    gang.form()
    placement = Placement.from_json(seat.placement)
    dispatcher = AllToAllDispatcher(gang, placement, Topology.of(seat.nodes))
    torch.manual_seed(99)
    scales = torch.randn(placement.num_experts, task["width"])  # the same on all ranks
    pairs = []
    for layer in placement.layers:
        tokens = task["tokens"][seat.rank]
        torch.manual_seed(1000 * layer + seat.rank)
        x, weights = torch.randn(tokens, task["width"]), torch.rand(tokens, task["top_k"])
        ids = torch.stack(
            [torch.randperm(placement.num_experts)[: task["top_k"]].sort().values for _ in range(tokens)]
        ) if tokens else torch.empty(0, task["top_k"], dtype=torch.int64)  # fmt: skip
        held = placement.held(layer, seat.rank)

        def compute(rows, rows_per_slot, held=held):
            return rows * scales[torch.tensor(held, dtype=torch.int64)].repeat_interleave(rows_per_slot, dim=0)

        def compute_all(rows, rows_per_slot):
            return rows * scales.repeat_interleave(rows_per_slot, dim=0)

        remote = dispatcher.run(layer, placement.num_experts, x, ids, weights, compute)
        local = LocalDispatcher().run(layer, placement.num_experts, x, ids, weights, compute_all)
        pairs.append((remote, local))
    traffic = dispatcher.traffic
    return {
        "pairs": pairs,
        "bytes_to": traffic.bytes_to,
        "exchanges": traffic.exchanges,
        "rows": {layer: rows.tolist() for layer, rows in traffic.rows.items()},
    }


def stopped(task: dict[str, Any], seat: Seat) -> dict[str, Any]:
    """The last rank dies before an exchange; the others say how that ended for them.

    Meanwhile another thread of theirs adds a byte to `beats` in `task["out"]` every 50 ms.
    """
    gang = Gang(seat, torch.device("cpu"))
    gang.form()
    assert gang.tell([seat.rank]) == [[rank] for rank in range(seat.num_ranks)]
    assert gang.swap([(seat.rank, to) for to in range(seat.num_ranks)]) == [
        (sender, seat.rank) for sender in range(seat.num_ranks)
    ]
    if seat.rank == seat.num_ranks - 1:
        (Path(task["out"]) / "dead").touch()
        os.kill(os.getpid(), getattr(signal, task["signal"]))

    def beat() -> None:
        with (Path(task["out"]) / "beats").open("ab", buffering=0) as beats:
            while True:
                beats.write(b".")
                time.sleep(0.05)

    threading.Thread(target=beat, daemon=True).start()
    try:
        gang.tell([0])
    except RuntimeError as error:
        return {"error": str(error)}
    return {"error": None}


def run(task: dict[str, Any], seat: Seat | None, out: str) -> None:
    """The process: `out` is the file for what it answers, as a pickle."""
    torch.set_num_threads(1)
    answer = {"answers": answers, "dispatched": dispatched, "stopped": stopped}[task["kind"]](task, seat)
    Path(out).write_bytes(pickle.dumps(answer))
