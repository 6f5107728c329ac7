"""Experts divided among ranks: every token travels to the ranks that hold its experts, and the outputs travel back.

A layer sends, forward: how many tokens each expert gets (E integers), the tokens ([N, D], each once for each of its
experts), their outputs. Backward: the gradients of both. Nothing is dropped or padded; rows for a rank's own experts
pass through the same call without leaving the rank.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from model.moe.dispatch import restore_order, scatter_to_experts, sort_by_expert
from model.moe.experts import Experts


class ExpertGroup:
    """`size` ranks that hold all experts of every layer among them; this process is number `rank` of them.

    process_group: theirs, in the order of their numbers; to be set before the first exchange. sent_bytes: what this
    rank has sent to the others so far.
    """

    def __init__(self, size: int, rank: int):
        self.size, self.rank = size, rank
        self.process_group: torch.distributed.ProcessGroup | None = None
        self.sent_bytes = 0

    def all_to_all(self, rows: Tensor, send: list[int], receive: list[int]) -> Tensor:
        """Sends the first send[0] rows to rank 0, the next send[1] to rank 1 and so on; returns the rows that came,
        in blocks of receive[0] from rank 0, receive[1] from rank 1 ... A collective."""
        received = rows.new_empty(sum(receive), *rows.shape[1:])
        torch.distributed.all_to_all_single(received, rows.contiguous(), receive, send, group=self.process_group)
        self.sent_bytes += (len(rows) - send[self.rank]) * rows[:1].numel() * rows.element_size()
        return received


class ShardedExperts(Experts):
    """This rank's part of `count` experts: group.rank r of S holds [r * count / S, (r + 1) * count / S).

    Called as `Experts` that holds all of them; the ranks of the group must call it together, and differentiate
    together, each with any number of tokens, also none.
    """

    def __init__(self, count: int, width: int, ffn: int, group: ExpertGroup, *, gated: bool = True,
                 backend: str = "auto"):
        super().__init__(count // group.size, width, ffn, gated=gated, backend=backend)
        self.group, self.held = group, count // group.size

    def init_weights(self, seed: int, layer_index: int, first: int = 0) -> None:
        super().init_weights(seed, layer_index, first + self.group.rank * self.held)

    def forward(self, x_ND: Tensor, counts_E: Tensor) -> Tensor:
        """x_ND: this rank's tokens sorted by expert; counts_E [count]: integer, how many of each of all experts.
        Returns y_ND in the same order."""
        group, size = self.group, self.group.size
        counts_SE = counts_E.view(size, self.held)
        arriving_SE = group.all_to_all(counts_SE, [1] * size, [1] * size)
        # The sizes of what is sent and received must be known to the host: the one wait for the device in a layer.
        send, receive = torch.stack((counts_SE.sum(1), arriving_SE.sum(1))).tolist()
        x_MD = _Exchange.apply(x_ND, group, send, receive)

        # Rows arrive sorted by rank, then expert; the backends want them sorted by expert.
        expert_M = torch.arange(self.held, device=x_MD.device).repeat(size).repeat_interleave(
            arriving_SE.flatten(), output_size=sum(receive))
        order = sort_by_expert(expert_M[:, None])
        y_MD = super().forward(scatter_to_experts(x_MD, order), arriving_SE.sum(0))
        return _Exchange.apply(restore_order(y_MD, order), group, receive, send)

    def part(self, whole_EFD: Tensor) -> Tensor:
        """The part of a weight of all experts that this rank holds."""
        return whole_EFD.narrow(0, self.group.rank * self.held, self.held)

    def gather(self, part_EFD: Tensor) -> Tensor:
        """The weight of all experts from the parts that the ranks of the group hold. A collective."""
        parts = [torch.empty_like(part_EFD) for _ in range(self.group.size)]
        torch.distributed.all_gather(parts, part_EFD.contiguous(), group=self.group.process_group)
        return torch.cat(parts)


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_ND, group, send, receive):
        ctx.group, ctx.send, ctx.receive = group, send, receive
        return group.all_to_all(x_ND, send, receive)

    @staticmethod
    def backward(ctx, grad_MD):
        return ctx.group.all_to_all(grad_MD, ctx.receive, ctx.send), None, None, None


def rows_to_other_ranks(expert_index_Tk: Tensor, experts: int, group: ExpertGroup) -> Tensor:
    """int64 [2]: how many rows of tokens must go to other ranks at least, were a token with several experts on one
    rank sent there once; and how many go, once for each expert."""
    holder_Tk = expert_index_Tk // (experts // group.size)
    visits_TS = torch.zeros(len(holder_Tk), group.size, dtype=torch.int64, device=holder_Tk.device)
    visits_TS.scatter_add_(1, holder_Tk, torch.ones_like(holder_Tk))
    visits_TS[:, group.rank] = 0
    return torch.stack((visits_TS.count_nonzero(), visits_TS.sum()))


def part_of_state(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A whole model's state with its experts cut down to those that `model` holds."""
    return state | {name: experts.part(state[name]) for name, experts in _sharded(model) if name in state}


def whole_state(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state of `model` with all experts in the place of those that it holds. A collective."""
    return state | {name: experts.gather(state[name]) for name, experts in _sharded(model)}


def _sharded(model: nn.Module) -> list[tuple[str, ShardedExperts]]:
    """(name of a weight, who holds it) for all weights of sharded experts."""
    return [(f"{prefix}.{name}", module) for prefix, module in model.named_modules()
            if isinstance(module, ShardedExperts) for name, _ in module.named_parameters()]
