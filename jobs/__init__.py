"""What was asked for: specification, plan, state, record and report of a job. Knows no torch.

`jobs.run(...)`, `jobs.JobResult` and `jobs.WarmReplicas` are `jobs.client`'s, loaded when they are first asked for.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jobs.client import JobResult, run
    from jobs.warm import WarmReplicas

__all__ = ["JobResult", "WarmReplicas", "run"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        import jobs.client

        return getattr(jobs.client, name)
    raise AttributeError(f"module 'jobs' has no attribute {name!r}")
