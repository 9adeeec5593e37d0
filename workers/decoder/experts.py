"""A layer's Mixture of Experts. T tokens, C model width, F feed-forward width, E experts, k chosen a token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from workers.decoder import ops
from workers.decoder.config import ExpertsConfig
from workers.decoder.feedforward import FeedForward, inner_values
from workers.decoder.router import choose_experts
from workers.decoder.tensors import Tensors
from workers.decoder.weight import ExpertBank, Weight
from workers.parallel.dispatch import Dispatcher

# Is told each MoE layer's index and what its router says of the step's tokens, [T, E], in the order of the layers.
RouterListener = Callable[[int, Tensor], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Banks:
    """A slot for each expert held. Biases are [slots, 2F] and [slots, C], None where experts have none."""

    gate_up: ExpertBank
    gate_up_bias: Tensor | None
    down: ExpertBank
    down_bias: Tensor | None


class Experts:
    """A router and the experts that this rank holds. How tokens reach experts is the dispatcher's business.

    The shared network is no expert: each rank has its own and runs it for its own tokens.
    """

    def __init__(
        self,
        config: ExpertsConfig,
        *,
        router: Weight,
        router_bias: Tensor | None,
        correction: Tensor | None,
        gate_up: ExpertBank,
        gate_up_bias: Tensor | None,
        down: ExpertBank,
        down_bias: Tensor | None,
        shared: FeedForward | None,
        shared_gate: Weight | None,
    ) -> None:
        assert gate_up.experts == down.experts
        assert config.expert.gated
        self.config = config
        self.router = router  # [E, C]
        self.router_bias = router_bias
        self.correction = correction  # [E]
        self.gate_up = gate_up  # [slots, 2F, C]
        self.gate_up_bias = gate_up_bias  # [slots, 2F]
        self.down = down  # [slots, C, F]
        self.down_bias = down_bias  # [slots, C]
        self.shared = shared
        self.shared_gate = shared_gate  # [1, C]

    @classmethod
    def load(cls, config: ExpertsConfig, hidden_width: int, tensors: Tensors, held: Sequence[int] | None) -> Experts:
        """`held`: the expert of each slot; None: all, in order. Only those are read."""
        router = config.router
        banks = _read_banks(config, hidden_width, tensors, range(router.num_experts) if held is None else held)
        return cls(
            config,
            router=tensors.unquantized().weight(hidden_width, ("router.weight", router.num_experts)),
            router_bias=tensors.vector("router.bias", router.num_experts) if router.bias else None,
            correction=tensors.vector("router.correction", router.num_experts) if router.correction_bias else None,
            gate_up=banks.gate_up,
            gate_up_bias=banks.gate_up_bias,
            down=banks.down,
            down_bias=banks.down_bias,
            shared=None
            if config.shared is None
            else FeedForward.load(config.shared, hidden_width, tensors.under("shared")),
            shared_gate=tensors.unquantized().weight(hidden_width, ("shared_gate.weight", 1))
            if config.shared_gate
            else None,
        )

    def hold(self, held: Sequence[int], hidden_width: int, tensors: Tensors) -> None:
        """Have these experts, one a slot, instead of those that were held, which are freed before any is read.

        If it raises, there are none.
        """
        if tuple(held) == self.gate_up.experts:
            return
        for experts in ((), held):
            banks = _read_banks(self.config, hidden_width, tensors, experts)
            self.gate_up, self.gate_up_bias = banks.gate_up, banks.gate_up_bias
            self.down, self.down_bias = banks.down, banks.down_bias

    def __call__(self, x: Tensor, layer: int, dispatcher: Dispatcher, listener: RouterListener | None = None) -> Tensor:
        """x [T, C] -> [T, C]."""
        logits = ops.linear(x, self.router, self.router_bias)  # [T, E]
        if listener is not None:
            listener(layer, logits)
        ids, weights = choose_experts(logits, self.config.router, self.correction)
        routed = dispatcher.run(layer, self.config.router.num_experts, x, ids, weights, self.compute)
        if self.shared is None:
            return routed
        shared = self.shared(x)
        if self.shared_gate is not None:
            shared = shared * ops.sigmoid(ops.linear(x, self.shared_gate))  # [T, 1]
        return routed + shared

    def compute(self, x: Tensor, rows_per_slot: Tensor) -> Tensor:
        """x [N, C], sorted by slot, each row through its slot's expert -> [N, C]."""
        inner = inner_values(ops.grouped_linear(x, self.gate_up, rows_per_slot, self.gate_up_bias), self.config.expert)
        return ops.grouped_linear(inner, self.down, rows_per_slot, self.down_bias)


def _read_banks(config: ExpertsConfig, hidden_width: int, tensors: Tensors, experts: Sequence[int]) -> _Banks:
    width, dtype, device = config.expert.width, tensors.dtype, tensors.device
    for expert in experts:
        tensors.check(f"experts.{expert}.gate.weight", width, hidden_width)
    gate_up = ops.new_bank(experts, 2 * width, hidden_width, dtype=dtype, device=device)
    down = ops.new_bank(experts, hidden_width, width, dtype=dtype, device=device)
    biases: list[tuple[Tensor, Tensor]] = []
    for slot, expert in enumerate(experts):
        own = tensors.under(f"experts.{expert}")
        gate_up.put(slot, 0, own.matrix("gate.weight", width, hidden_width))
        gate_up.put(slot, width, own.matrix("up.weight", width, hidden_width))
        down.put(slot, 0, own.matrix("down.weight", hidden_width, width))
        if config.expert.bias:
            into = own.vectors(("gate.bias", width), ("up.bias", width))
            biases.append((into, own.vector("down.bias", hidden_width)))
    return _Banks(
        gate_up=gate_up,
        gate_up_bias=torch.stack([into for into, _ in biases]) if biases else None,
        down=down,
        down_bias=torch.stack([out for _, out in biases]) if biases else None,
    )
