"""A layer's Mixture of Experts. T tokens, C model width, F feed-forward width, E experts, k chosen a token."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from workers.decoder import ops
from workers.decoder.config import ExpertsConfig
from workers.decoder.router import choose_experts
from workers.decoder.tensors import Tensors
from workers.decoder.weight import ExpertBank, Weight
from workers.parallel.dispatch import Dispatcher


class Experts:
    """A router and the experts that this rank holds. How tokens reach experts is the dispatcher's business."""

    def __init__(
        self,
        config: ExpertsConfig,
        router: Weight,
        router_bias: Tensor | None,
        correction: Tensor | None,
        gate_up: ExpertBank,
        down: ExpertBank,
    ) -> None:
        assert gate_up.experts == down.experts
        self.config = config
        self.router = router  # [E, C]
        self.router_bias = router_bias
        self.correction = correction  # [E]
        self.gate_up = gate_up  # [slots, 2F, C]
        self.down = down  # [slots, C, F]

    @classmethod
    def load(cls, config: ExpertsConfig, hidden_width: int, tensors: Tensors, held: Sequence[int] | None) -> Experts:
        """`held`: the expert of each slot; None: all, in order. Only those are read."""
        router, width = config.router, config.expert.width
        experts = range(router.num_experts) if held is None else held
        dtype, device = tensors.dtype, tensors.device
        for expert in experts:
            tensors.check(f"experts.{expert}.gate.weight", width, hidden_width)
        gate_up = ops.new_bank(experts, 2 * width, hidden_width, dtype=dtype, device=device)
        down = ops.new_bank(experts, hidden_width, width, dtype=dtype, device=device)
        for slot, expert in enumerate(experts):
            own = tensors.under(f"experts.{expert}")
            gate_up.put(slot, 0, own.matrix("gate.weight", width, hidden_width))
            gate_up.put(slot, width, own.matrix("up.weight", width, hidden_width))
            down.put(slot, 0, own.matrix("down.weight", hidden_width, width))
        return cls(
            config,
            tensors.unquantized().weight(hidden_width, ("router.weight", router.num_experts)),
            tensors.vector("router.bias", router.num_experts) if router.bias else None,
            tensors.vector("router.correction", router.num_experts) if router.correction_bias else None,
            gate_up,
            down,
        )

    def __call__(self, x: Tensor, layer: int, dispatcher: Dispatcher) -> Tensor:
        """x [T, C] -> [T, C]."""
        logits = ops.linear(x, self.router, self.router_bias)  # [T, E]
        ids, weights = choose_experts(logits, self.config.router, self.correction)
        return dispatcher.run(layer, self.config.router.num_experts, x, ids, weights, self.compute)

    def compute(self, x: Tensor, rows_per_slot: Tensor) -> Tensor:
        """x [N, C], sorted by slot, each row through its slot's expert -> [N, C]."""
        inner = ops.act_mul(ops.grouped_linear(x, self.gate_up, rows_per_slot), self.config.expert.activation)
        return ops.grouped_linear(inner, self.down, rows_per_slot)
