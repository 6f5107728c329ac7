"""What ranks that share the experts among them send each other, beside the least they could send."""

from __future__ import annotations

import torch
from torch import Tensor

from model.diffusion_lm import LossReport
from model.moe.parallel import ExpertGroup, rows_to_other_ranks


def count_traffic(report: LossReport, sent_bytes: int, experts: int, group: ExpertGroup) -> Tensor:
    """int64 [3] of one micro-batch of this rank, to be added up over micro-batches and ranks: rows that had to go to
    other ranks at least, rows that went (`rows_to_other_ranks`), and bytes sent for all of it."""
    rows = sum(rows_to_other_ranks(aux.expert_index_Tk, experts, group) for aux in report.experts)
    return torch.cat((rows, rows.new_full((1,), sent_bytes)))


def traffic_line(counts: Tensor, steps: int, ranks: int) -> dict[str, float]:
    """What a line of metrics says of `steps` steps, from their counts over all ranks (on the host): megabytes a step,
    a mean over ranks."""
    least, went, sent_bytes = counts.tolist()
    megabytes = sent_bytes / 1e6 / steps / ranks
    return {"expert_traffic_mb": megabytes, "expert_traffic_minimum_mb": least / max(1.0, went) * megabytes}
