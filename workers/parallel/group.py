"""How the ranks of one gang find each other and exchange tensors: torch.distributed, gloo on CPU and NCCL on CUDA.

The store that they meet through lives with the coordinator, never in a rank, so that any rank may die without taking
the meeting place along. It serves one gang of one generation: whoever is late belongs to no gang.

A rank that is blocked in an exchange can't be freed from within; it is the coordinator that notices a dead or silent
rank, and ends all of them (Ray kills the process). `EXCHANGE_S` only ends what nobody watches any more.

R ranks, C columns.
"""

from __future__ import annotations

import contextlib
import fcntl
import ipaddress
import os
import pickle
import socket
import struct
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.errors import JobError
from workers.parallel.seat import Seat

MEETING_S = 900.0  # until the last rank has loaded its weights
EXCHANGE_S = 600.0  # of waiting within one exchange, for a rank that may be writing to a slow disk

_SIOCGIFADDR = 0x8915  # Linux's ioctl for an interface's address


class Rendezvous:
    """The coordinator's side: a store that listens on one interface of this machine alone, until it is closed."""

    def __init__(self, host: str) -> None:
        """OSError if `host` is no address of this machine's."""
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.create_server((host, 0), family=family)
        self.host, self.port = host, int(listener.getsockname()[1])
        self._store: Any = dist.TCPStore(  # type: ignore[attr-defined]
            host, self.port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
        )

    def seats(
        self, gang: str, nodes: Sequence[str], placement: dict[str, Any], *, calibrates: bool = False
    ) -> list[Seat]:
        """One a rank; `nodes` names each rank's."""
        return [
            Seat(
                host=self.host,
                port=self.port,
                gang=gang,
                rank=rank,
                nodes=tuple(nodes),
                placement=placement,
                calibrates=calibrates,
            )
            for rank in range(len(nodes))
        ]

    def close(self) -> None:
        self._store = None


class Gang:
    """A rank's side. Every method is a meeting of all ranks, who must call the same ones in the same order."""

    def __init__(self, seat: Seat, device: torch.device) -> None:
        """`device`: where the tensors lie that are exchanged."""
        self.rank, self.num_ranks, self.device = seat.rank, seat.num_ranks, device
        self._seat = seat

    def form(self) -> None:
        """Connect, before the first exchange: once this rank has loaded what it holds, as it waits for all others."""
        seat, patience = self._seat, timedelta(seconds=MEETING_S)
        tcp = dist.TCPStore(  # type: ignore[attr-defined]
            seat.host, seat.port, is_master=False, wait_for_workers=False, timeout=patience
        )
        store = dist.PrefixStore(seat.gang, tcp)  # type: ignore[attr-defined]
        store.set_timeout(patience)
        own = own_address(seat.host, seat.port)
        store.set(f"place/{seat.rank}", _loopback_identity())
        places = {bytes(store.get(f"place/{rank}")) for rank in range(seat.num_ranks)}
        _choose_interface("127.0.0.1" if len(places) == 1 else own, spans=len(places) > 1)
        dist.init_process_group(
            "nccl" if self.device.type == "cuda" else "gloo",
            store=store,
            rank=seat.rank,
            world_size=seat.num_ranks,
            timeout=timedelta(seconds=EXCHANGE_S),
        )

    def exchange(self, rows: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
        """rows [sum(sent), ...], the first sent[0] of them for rank 0 and so on -> [sum(received), ...], by sender."""
        out = rows.new_empty(sum(received), *rows.shape[1:])
        dist.all_to_all_single(out, rows.contiguous(), list(received), list(sent))
        return out

    def tell(self, values: Sequence[int]) -> list[list[int]]:
        """Every rank's `values`, as many each, by rank: an all-to-all, which costs less than a ring's all-gather."""
        mine = torch.tensor(list(values), dtype=torch.int64, device=self.device).repeat(self.num_ranks, 1)
        ones = [1] * self.num_ranks
        told: list[list[int]] = self.exchange(mine, ones, ones).tolist()
        return told

    def swap(self, things: Sequence[Any]) -> list[Any]:
        """things[r] goes to rank r -> what each rank sent here. Pickled: only between processes of one job."""
        payloads = [pickle.dumps(thing, protocol=pickle.HIGHEST_PROTOCOL) for thing in things]
        sizes = [row[self.rank] for row in self.tell([len(payload) for payload in payloads])]
        packed = torch.frombuffer(bytearray(b"".join(payloads)), dtype=torch.uint8).to(self.device)
        arrived = self.exchange(packed, [len(payload) for payload in payloads], sizes).cpu()
        return [pickle.loads(piece.numpy().tobytes()) for piece in torch.split(arrived, sizes)]


def own_address(host: str, port: int) -> str:
    """The address under which this machine is seen from `host`. Nothing is sent."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect((host, port))
        return str(probe.getsockname()[0])


def interface_of(address: str) -> str | None:
    """The name of the network interface that has this address; None where that can't be told."""
    if ":" in address:
        return _interface_of_ipv6(address)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):  # one without an address
                answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
                if socket.inet_ntoa(answer[20:24]) == address:
                    return name
    return None


def _interface_of_ipv6(address: str) -> str | None:
    """By Linux's table, whose lines begin with the address in hexadecimal and end with the interface's name."""
    table = Path("/proc/net/if_inet6")
    wanted = ipaddress.IPv6Address(address.partition("%")[0]).packed.hex()
    lines = table.read_text().splitlines() if table.exists() else []
    return next((line.split()[-1] for line in lines if line.startswith(wanted)), None)


def _choose_interface(address: str, *, spans: bool) -> None:
    """What gloo and NCCL are to bind; a person's own settings are left alone.

    Without one, gloo binds what the machine's own name means, which often is the loopback. JobError where none is found
    and the gang `spans` networks, which the loopback doesn't reach.
    """
    variables = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
    name = interface_of(address)
    if name is not None:
        for variable in variables:
            os.environ.setdefault(variable, name)
    elif spans and not any(variable in os.environ for variable in variables):
        raise JobError(
            f"no network interface of this node is known to have {address}, under which the others reach it; "
            f"name it in {' and '.join(variables)} where Ray is started"
        )


def _loopback_identity() -> str:
    """Equal for two processes exactly if 127.0.0.1 means the same to both: one kernel, one network namespace."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    space = Path("/proc/self/ns/net")
    kernel = boot.read_text().strip() if boot.exists() else socket.gethostname()
    return f"{kernel} {space.stat().st_ino if space.exists() else 0}"
