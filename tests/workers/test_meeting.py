"""Ranks that meet while one of them, or the place where they meet, is gone."""

from __future__ import annotations

import pytest

from pipeline.errors import JobError
from workers.engine_factory import load_engine
from workers.parallel.group import Gang
from workers.parallel.placement import Placement
from workers.parallel.seat import GangBroken, Seat
from workers.settings import EngineSettings


@pytest.mark.parametrize(("raised", "told"), [(RuntimeError("no"), GangBroken), (JobError("no"), JobError)])
def test_a_rank_that_waits_in_vain_for_the_others_says_that_the_gang_broke_and_not_the_model(
    tiny_model, monkeypatch, raised, told
):
    """So that the gang is formed again, and the job goes on."""

    def form(_: Gang) -> None:
        raise raised

    monkeypatch.setattr(Gang, "form", form)
    placement = Placement(num_experts=5, layers=tuple(range(4)), slots=(((0, 2, 4), (1, 3)),) * 4)
    seat = Seat(
        host="127.0.0.1", port=1, gang="worker-0.0", rank=0, nodes=("one", "one"), placement=placement.to_json()
    )
    with pytest.raises(told, match=r"no$"):
        load_engine(EngineSettings(model_path=str(tiny_model("mixtral")), kv_cache_bytes=1 << 20, seat=seat))
