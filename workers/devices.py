"""What this machine has for decoders to run on, and what a cluster's GPUs have.

torch is loaded where GPUs are asked for: those who only count processors, such as an index's shards, do without.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

PROBE_S = 120.0


def num_cpus() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0))


def num_gpus() -> int:
    import torch

    return torch.cuda.device_count()


def memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def gpu_bytes() -> int | None:
    """The memory of this machine's first GPU; None where there is none."""
    import torch

    return torch.cuda.mem_get_info(0)[1] if torch.cuda.is_available() else None


def cluster_gpu_bytes(labels: Mapping[str, str]) -> int | None:
    """The memory of a GPU of the Ray that is connected; None where none was free in time, or it can't be told.

    `labels`: rules as of Ray's label selectors, for the node that has it.
    """
    import ray
    from ray.exceptions import RayError

    probe = ray.remote(num_gpus=1, num_cpus=0, label_selector=dict(labels))(gpu_bytes).remote()
    try:
        found: int | None = ray.get(probe, timeout=PROBE_S)
    except (RayError, TimeoutError):
        ray.cancel(probe, force=True)
        return None
    return found
