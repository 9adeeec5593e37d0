"""Which nodes a job may use, and whether they could ever hold it: told before anything waits for them."""

from __future__ import annotations

import re
from typing import Any

import pytest

from jobs.cluster import node_labels
from jobs.cluster.feasibility import complaint
from jobs.cluster.hosts import refuse_wishes_of_nodes
from jobs.layout import Layout, Machine
from jobs.spec import ClusterSpec
from jobs.specfile import parse_spec
from pipeline.errors import UserError
from workers.replica import Resources

GIB = 1 << 30


@pytest.mark.parametrize(
    ("rule", "values"),
    [
        ("gpu", ["gpu"]),
        ("!gpu", ["big", None]),
        ("in(gpu, big)", ["gpu", "big"]),
        ("!in(gpu,big)", [None]),
    ],
)
def test_a_rule_means_the_nodes_whose_label_it_fits(rule: str, values: list[str | None]) -> None:
    labels = [{"pool": value} if value else {} for value in ("gpu", "big", None)]
    assert [one.get("pool") for one in labels if node_labels.matches({"pool": rule}, one)] == values


def test_rules_reach_ray_without_the_spaces_that_it_takes_for_part_of_a_value() -> None:
    assert ClusterSpec(labels={"pool": "in(a, b)"}).labels == {"pool": "in(a,b)"}


@pytest.mark.parametrize("labels", [{"pool": "in(a"}, {"pool": ""}, {"-": "a"}, {"pool": "a b"}])
def test_what_is_no_rule_is_refused_where_it_stands(labels: dict[str, str]) -> None:
    with pytest.raises(UserError, match=r"cluster\.labels"):
        parse_spec({"model": "m", "input": {"path": "rows"}, "embed": {}, "cluster": {"labels": labels}})


def test_nodes_that_are_avoided_are_left_out_but_not_against_a_persons_own_rule() -> None:
    rules = node_labels.without_nodes({"pool": "a"}, ["2f", "1e"])
    assert rules == {"pool": "a", "ray.io/node-id": "!in(1e,2f)"}
    assert not node_labels.matches(rules, {"pool": "a", "ray.io/node-id": "2f"})
    assert node_labels.matches(rules, {"pool": "a", "ray.io/node-id": "3f"})
    assert node_labels.without_nodes({"ray.io/node-id": "1e"}, ["1e"]) == {"ray.io/node-id": "1e"}


def test_a_label_that_no_node_has_is_told_with_what_they_have() -> None:
    nodes = [{"pool": "gpu", "zone": "a"}, {"pool": "cpu"}]
    node_labels.refuse_no_match({"pool": "gpu", "zone": "a"}, nodes)
    with pytest.raises(UserError, match=r"no node has pool: big \(of 2 looked at, their pool is cpu, gpu\)"):
        node_labels.refuse_no_match({"pool": "big"}, nodes)
    with pytest.raises(UserError, match=r"no node has zone: a \(of 1 looked at, none has a label zone\)"):
        node_labels.refuse_no_match({"pool": "cpu", "zone": "a"}, nodes)


def judge(replicas: int, ranks: int, needs: dict[str, Any], cpus: list[int], *, apart: bool = False) -> str | None:
    layout = Layout(replicas=replicas, ranks=ranks, device="cpu", threads=needs["num_cpus"], why="asked")
    machines = [Machine(num_cpus=count, memory_bytes=8 * GIB) for count in cpus]
    return complaint(layout, Resources(**needs), machines, apart=apart, labels={"pool": "a"})


@pytest.mark.parametrize(
    ("replicas", "ranks", "needs", "cpus", "apart", "expected"),
    [
        (1, 2, {"num_cpus": 2}, [2, 2], False, None),
        (2, 2, {"num_cpus": 2}, [5, 5], True, None),
        (1, 1, {"num_cpus": 4}, [2, 3], False, "needs 4 CPUs, and of the 2 nodes with pool: a none has it .*: 3 CPUs"),
        (
            1,
            3,
            {"num_cpus": 2},
            [3, 3],
            False,
            "3 shards of 2 CPUs are asked for, and .* room for 2; set .*threads",
        ),
        (1, 2, {"num_cpus": 1, "num_gpus": 1}, [4, 4], False, "at most: 4 CPUs, 0 GPUs"),
        (
            1,
            2,
            {"num_cpus": 1, "memory_bytes": 9 * GIB},
            [4, 4],
            False,
            "9.0 GiB of memory, .*: 4 CPUs, 8.0 GiB",
        ),
        (2, 2, {"num_cpus": 1}, [9, 1], True, r"cluster.spread: .* need 4 places .* have 3; set cluster.spread: false"),
        (1, 1, {"num_cpus": 1}, [], False, "of the 0 nodes"),
    ],
)
def test_what_no_set_of_nodes_could_hold_is_told_with_how_to_mend_it(
    replicas: int, ranks: int, needs: dict[str, Any], cpus: list[int], apart: bool, expected: str | None
) -> None:
    found = judge(replicas, ranks, needs, cpus, apart=apart)
    if expected is None:
        assert found is None
    else:
        assert found is not None
        assert re.search(expected, found), found
        assert "\n" not in found


@pytest.mark.parametrize("wish", [{"labels": {"pool": "a"}}, {"spread": True}, {"wait_s": 5}])
def test_what_only_a_cluster_can_give_is_refused_where_there_is_none(wish: dict[str, Any]) -> None:
    refuse_wishes_of_nodes(ClusterSpec())
    with pytest.raises(UserError, match=f"cluster.{next(iter(wish))}: is about the nodes of a cluster"):
        refuse_wishes_of_nodes(ClusterSpec(**wish))
