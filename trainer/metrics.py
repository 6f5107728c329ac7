"""What a run reports: sums gathered on the device without waiting for it, reduced over ranks when a line is due."""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar

from model.batch import PackedBatch
from model.diffusion.schedule import NoiseSchedule
from model.diffusion_lm import LossReport
from model.moe.parallel import ExpertGroup
from trainer.expert_traffic import count_traffic, traffic_line
from trainer.expert_use import NOISE_BINS, POSITION_BINS, ExpertUse

_DRAWN_BY_INDEX = ("cross_entropy_by_noise", "expert_variation_by_layer", "router_entropy_by_layer",
                   "dead_experts_by_layer")


class StepMetrics:
    """Accumulates loss reports between two lines of metrics.

    All sums are over this rank's share; `reduce` adds the ranks' shares and divides by the global counts. layers:
    those with experts, of which there may be none.
    """

    def __init__(self, schedule: NoiseSchedule, layers: int, experts: int, device: torch.device,
                 peak_flops: float | None, expert_group: ExpertGroup):
        self.schedule, self.layers, self.experts, self.device = schedule, layers, experts, device
        self.peak_flops, self.expert_group = peak_flops, expert_group
        self._reset()

    def _reset(self) -> None:
        self.terms: dict[str, torch.Tensor] = {}
        self.noise_sums = torch.zeros(2, NOISE_BINS, device=self.device)
        self.expert_use = ExpertUse(self.layers, self.experts, self.device)
        self.traffic = torch.zeros(3, dtype=torch.int64, device=self.device)
        self.loss = torch.zeros((), device=self.device)
        self.trained_tokens = self.tokens = self.steps = self.flops = 0
        self.began, self.elsewhere = time.perf_counter(), 0.0

    def add(self, report: LossReport, batch: PackedBatch, flops: int, sent_bytes: int) -> None:
        """One micro-batch of this rank, on the device, and what it cost: `model/flops.py`, and what was sent to
        other ranks' experts."""
        self.flops += flops
        if self.expert_group.size > 1:
            self.traffic += count_traffic(report, sent_bytes, self.experts, self.expert_group)
        self.loss += report.total.detach()
        for name, value in report.terms.items():
            self.terms[name] = self.terms.get(name, 0) + value
        low, high = self.schedule.low, self.schedule.high
        place = ((high - report.log_snr_M) / (high - low) * NOISE_BINS).long().clamp(0, NOISE_BINS - 1)
        self.noise_sums[0].index_add_(0, place, report.cross_entropy_M)
        self.noise_sums[1].index_add_(0, place, torch.ones_like(report.cross_entropy_M))
        if self.layers:
            self.expert_use.add(report, document_tenths(batch), place)

    def count(self, trained_tokens: int, tokens: int) -> None:
        """The global batch of one step."""
        self.steps += 1
        self.trained_tokens += trained_tokens
        self.tokens += tokens

    @contextmanager
    def clock_stopped(self) -> Iterator[None]:
        """Evaluation, sampling and saving inside the block do not count into the speed of training."""
        began = time.perf_counter()
        yield
        self.elsewhere += time.perf_counter() - began

    def reduce(self) -> dict:
        """Means since the last call, over all ranks. A collective."""
        names = list(self.terms)
        parts = [torch.stack([self.terms[name] for name in names]), self.noise_sums.flatten(),
                 self.expert_use.flat(), self.loss[None], self.traffic,
                 torch.tensor([self.flops / 1e12], device=self.device)]
        flat = torch.cat([part.double() for part in parts])
        torch.distributed.all_reduce(flat)
        sizes = [part.numel() for part in parts]
        terms, noise, expert_use, loss, traffic, teraflops = flat.cpu().split(sizes)
        seconds = time.perf_counter() - self.began - self.elsewhere
        line = {name: float(value) / self.steps for name, value in zip(names, terms, strict=True)}
        line = {"loss": float(loss) / self.steps, **line}
        sums, number = noise.view(2, NOISE_BINS)
        line |= {
            "cross_entropy_by_noise": [round(float(s / n), 5) if n else None
                                       for s, n in zip(sums, number, strict=True)],
            **(self.expert_use.summary(expert_use, self.tokens) if self.layers else {}),
            "tokens_per_s": self.tokens / seconds,
            "trained_tokens_per_s": self.trained_tokens / seconds,
            "tflops_per_s": float(teraflops) / seconds,
            "memory_gb": peak_memory_gb(self.device),
        }
        ranks = torch.distributed.get_world_size()
        if self.peak_flops is not None:
            line["mfu"] = 1e12 * line["tflops_per_s"] / (ranks * self.peak_flops)
        if self.expert_group.size > 1:
            line |= traffic_line(traffic, self.steps, ranks)
        self._reset()
        return line


def document_tenths(batch: PackedBatch) -> torch.Tensor:
    """In which tenth of its document (source and target together) each token lies: int64 [T] from 0 to 9."""
    length_D = torch.zeros(batch.documents, dtype=torch.int64, device=batch.position_T.device)
    length_D.scatter_reduce_(0, batch.document_T, batch.position_T + 1, "amax")
    return batch.position_T * POSITION_BINS // length_D[batch.document_T]


def peak_memory_gb(device: torch.device) -> float:
    """Peak so far of this process: allocated on the GPU, or resident on the host."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


class MetricsLog:
    """metrics.jsonl (one line an event, flushed at once) and TensorBoard events; only the first rank writes.

    Lines of steps after `resumed_at` are dropped: an interrupted run repeats those steps.
    """

    def __init__(self, run_dir: Path, resumed_at: int, active: bool):
        self.active = active
        if not active:
            return
        path = run_dir / "metrics.jsonl"
        kept = [line for line in path.read_text().splitlines(keepends=True)
                if line.endswith("\n") and json.loads(line)["step"] <= resumed_at] if path.exists() else []
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(kept))
        temporary.rename(path)
        self.file = path.open("a")
        # Not SummaryWriter: its thread ends on a full disk, and the next call waits for it for ever.
        (run_dir / "tb").mkdir(exist_ok=True)
        self.board = EventsWriter(str(run_dir / "tb" / "events"))
        if resumed_at:
            self.board.write_event(Event(wall_time=time.time(), step=resumed_at + 1,
                                         session_log=SessionLog(status=SessionLog.START)))

    def write(self, kind: str, step: int, values: dict) -> None:
        """kind: train, eval, samples or event."""
        if not self.active:
            return
        self.file.write(json.dumps({"kind": kind, "step": step, **values}, ensure_ascii=False) + "\n")
        self.file.flush()
        for name, value in values.items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                self._draw(f"{kind}/{name}", value, step)
            elif name in _DRAWN_BY_INDEX:
                for index, part in enumerate(value):
                    if part is not None:
                        self._draw(f"{kind}/{name}/{index}", part, step)
        self.board.flush()

    def _draw(self, tag: str, value: float, step: int) -> None:
        self.board.write_event(Event(wall_time=time.time(), step=step, summary=scalar(tag, value)))

    def close(self) -> None:
        if self.active:
            self.file.close()
            self.board.close()
