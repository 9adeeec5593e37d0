"""One node of a Ray, started by itself so that it can be put into namespaces of its own: lives as long as its stdin.

python ray_node.py GCS_ADDRESS OWN_ADDRESS NAME NUM_CPUS SOCKETS -> prints the node's id when it is up.
"""

from __future__ import annotations

import sys

from ray._private.node import Node
from ray._private.parameter import RayParams

from jobs.ray_session import _few_processes


def main(gcs_address: str, own_address: str, name: str, num_cpus: str, sockets: str) -> None:
    with _few_processes():
        node = Node(
            RayParams(
                gcs_address=gcs_address,
                node_ip_address=own_address,
                node_manager_port=0,
                num_cpus=int(num_cpus),
                num_gpus=0,
                object_store_memory=80 << 20,
                min_worker_port=0,
                max_worker_port=0,
                include_log_monitor=False,
                labels={"pool": name},
                # Nodes that start side by side would take the same names for these.
                plasma_store_socket_name=f"{sockets}/plasma",
                raylet_socket_name=f"{sockets}/raylet",
            ),
            head=False,
            shutdown_at_exit=True,
            spawn_reaper=True,
        )
    print(node.node_id, flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main(*sys.argv[1:])
