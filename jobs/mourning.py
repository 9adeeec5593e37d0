"""The deaths of a run, for its report: what each cost, and how long it was until work went on. Pure: time is told."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jobs.events import ReplicaDied, ReplicaResized, ShardId
from jobs.terminal import human_seconds

MAX_REASON_CHARS = 200


class Mourning:
    """A record a death, in the order of their coming.

    `at_s`: when it was noticed, in seconds since the run began. `unheard_s`: how long ago the shard that was lost had
    last been heard, so within which time it was noticed; None if it never was. `splits_again`: that were leased to the
    replica and not committed. `recovered_after_s`: from then until its next generation had done a step (or was ready
    for one, if nothing is left for it to do); None if it never was. `ranks`: with how many it went on, where that has
    changed; 0: there was no room for it.
    """

    def __init__(self, began_at: float) -> None:
        self._began_at = began_at
        self._deaths: list[dict[str, Any]] = []
        self._lacking: dict[int, list[tuple[float, dict[str, Any]]]] = {}  # by replica: died when
        self._holders: dict[int, int] = {}  # split -> the replica that it is leased to
        self._num_leases = 0

    def grant(self, shard: ShardId, split: int) -> None:
        self._num_leases += 1
        self._holders[split] = shard.replica

    def commit(self, split: int) -> None:
        self._holders.pop(split, None)

    def mourn(self, death: ReplicaDied, now: float) -> None:
        lost = [split for split, replica in self._holders.items() if replica == death.replica]
        for split in lost:
            del self._holders[split]
        record = {
            "replica": death.replica,
            "at_s": round(now - self._began_at, 3),
            "reason": death.reason,
            "unheard_s": None if death.silent_s is None else round(death.silent_s, 3),
            "splits_again": len(lost),
            "recovered_after_s": None,
        }
        self._deaths.append(record)
        lacking = self._lacking.setdefault(death.replica, [])
        lacking.append((now, record))
        for _, earlier in lacking:
            earlier["recovered_after_s"] = None  # it was ready, and did nothing

    def resize(self, event: ReplicaResized) -> None:
        for record in reversed(self._deaths):
            if record["replica"] == event.replica:
                record["ranks"] = event.ranks
                return

    def is_ready(self, replica: int, now: float, *, stepped: bool) -> None:
        """The replica reports that it runs; `stepped`: and has done a step."""
        for died_at, record in self._lacking.get(replica, ()):
            if stepped or record["recovered_after_s"] is None:
                record["recovered_after_s"] = round(now - died_at, 3)
        if stepped:
            self._lacking.pop(replica, None)

    def facts(self) -> dict[str, Any]:
        return {"deaths": self._deaths, "splits_leased": self._num_leases, "recovery": recovery(self._deaths)}


def recovery(deaths: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Over all deaths after which work went on: {"mean_s", "worst_s"}. None if there were none."""
    seconds = [death["recovered_after_s"] for death in deaths if death["recovered_after_s"] is not None]
    if not seconds:
        return None
    return {"mean_s": round(sum(seconds) / len(seconds), 3), "worst_s": max(seconds)}


def describe_deaths(deaths: Sequence[dict[str, Any]]) -> str:
    """What a person is told of them, in a line.

    >>> describe_deaths([{"replica": 0, "reason": "killed", "splits_again": 2, "recovered_after_s": 4.0, "ranks": 1}])
    'a replica died (killed); 2 splits were done again; work went on after 0:04; with 1 rank'
    """
    last = deaths[-1]
    reason = " ".join(last["reason"].split())[:MAX_REASON_CHARS]
    again = sum(death["splits_again"] for death in deaths)
    words = [
        f"a replica died ({reason})" if len(deaths) == 1 else f"replicas died {len(deaths)} times (the last: {reason})",
        f"{again:,} split{'' if again == 1 else 's'} {'was' if again == 1 else 'were'} done again",
    ]
    found = recovery(deaths)
    if found is not None:
        words.append(f"work went on after {human_seconds(found['worst_s'])}")
        if len(deaths) > 1:
            words[-1] += f" at worst, {human_seconds(found['mean_s'])} on average"
    sizes = {death["replica"]: death["ranks"] for death in deaths if "ranks" in death}
    if sizes:
        fewest = min(sizes.values())
        words.append(f"with {fewest} rank{'' if fewest == 1 else 's'}" if fewest else "a replica has no room left")
    return "; ".join(words)
