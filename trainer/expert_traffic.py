"""What ranks that share the experts among them send each other, beside the least they could send."""

from __future__ import annotations

import torch
from torch import Tensor

from model.diffusion_lm import LossReport
from model.moe.parallel import ExpertGroup, rows_to_other_ranks


class ExpertTraffic:
    """This rank's counts since it was made; `flat` of all ranks, added up, go to `summary`."""

    def __init__(self, group: ExpertGroup, experts: int, device: torch.device):
        self.group, self.experts, self.device = group, experts, device
        self.rows = torch.zeros(2, dtype=torch.int64, device=device)
        self.sent_bytes = 0

    def add(self, report: LossReport, sent_bytes: int) -> None:
        """One micro-batch, and what it made this rank send."""
        if self.group.size > 1:
            self.sent_bytes += sent_bytes
            for aux in report.experts:
                self.rows += rows_to_other_ranks(aux.expert_index_Tk, self.experts, self.group)

    def flat(self) -> Tensor:
        """fp64 [3]."""
        return torch.cat((self.rows.double(), torch.tensor([self.sent_bytes], dtype=torch.float64, device=self.device)))

    def summary(self, flat: Tensor, steps: int, ranks: int) -> dict:
        """What a line of metrics says of `steps` steps, from the sum over ranks of `flat` (on the host): megabytes a
        step, a mean over ranks. Nothing where every rank has all experts."""
        if self.group.size == 1:
            return {}
        least, sent, sent_bytes = flat.tolist()
        megabytes = sent_bytes / 1e6 / steps / ranks
        return {"expert_traffic_mb": megabytes, "expert_traffic_minimum_mb": megabytes * least / max(1.0, sent)}
