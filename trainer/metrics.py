"""What a run reports: sums gathered on the device without waiting for it, reduced over ranks when a line is due."""

from __future__ import annotations

import json
import os
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
from trainer.errors import storage_failure
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
        self.sums = self._zeros()
        self.sums["experts"] = ExpertUse(self.layers, self.experts, self.device).flat()
        self.trained_tokens = self.tokens = self.steps = self.flops = 0
        self.drop()
        self.began, self.elsewhere = time.perf_counter(), 0.0

    def _zeros(self) -> dict[str, torch.Tensor]:
        return {"traffic": torch.zeros(3, dtype=torch.int64, device=self.device),
                "noise": torch.zeros(2, NOISE_BINS, device=self.device), "loss": torch.zeros((), device=self.device)}

    def add(self, report: LossReport, batch: PackedBatch, flops: int, sent_bytes: int) -> None:
        """One micro-batch of this rank, on the device, and what it cost: `model/flops.py`, and what was sent to
        other ranks' experts."""
        self.step_flops += flops
        sums = self.step_sums
        if self.expert_group.size > 1:
            sums["traffic"] += count_traffic(report, sent_bytes, self.experts, self.expert_group)
        sums["loss"] += report.total.detach()
        for name, value in report.terms.items():
            sums[f"term:{name}"] = sums.get(f"term:{name}", 0) + value.float()
        low, high = self.schedule.low, self.schedule.high
        place = ((high - report.log_snr_M) / (high - low) * NOISE_BINS).long().clamp(0, NOISE_BINS - 1)
        sums["noise"][0].index_add_(0, place, report.cross_entropy_M)
        sums["noise"][1].index_add_(0, place, torch.ones_like(report.cross_entropy_M))
        if self.layers:
            self.step_use.add(report, document_tenths(batch), place)

    @property
    def step_loss(self) -> torch.Tensor:
        """This rank's share of the loss of the step in progress."""
        return self.step_sums["loss"]

    def count(self, trained_tokens: int, tokens: int) -> None:
        """The global batch of one step, which was applied."""
        self.step_sums["experts"] = self.step_use.flat()
        self.sums = {name: self.sums.get(name, 0) + value for name, value in self.step_sums.items()}
        self.flops += self.step_flops
        self.steps += 1
        self.trained_tokens += trained_tokens
        self.tokens += tokens
        self.drop()

    def drop(self) -> None:
        """Forgets the micro-batches since the last step: it was skipped."""
        self.step_sums, self.step_flops = self._zeros(), 0
        self.step_use = ExpertUse(self.layers, self.experts, self.device)

    @contextmanager
    def clock_stopped(self) -> Iterator[None]:
        """Evaluation, sampling and saving inside the block do not count into the speed of training."""
        began = time.perf_counter()
        yield
        self.elsewhere += time.perf_counter() - began

    def reduce(self) -> dict:
        """Means since the last call, over all ranks; at least one step must have been counted. A collective."""
        names = [name for name in self.sums if name.startswith("term:")]
        parts = [torch.stack([self.sums[name] for name in names]), self.sums["noise"].flatten(), self.sums["experts"],
                 self.sums["loss"][None], self.sums["traffic"],
                 torch.tensor([self.flops / 1e12], device=self.device)]
        flat = torch.cat([part.double() for part in parts])
        torch.distributed.all_reduce(flat)
        sizes = [part.numel() for part in parts]
        terms, noise, expert_use, loss, traffic, teraflops = flat.cpu().split(sizes)
        seconds = time.perf_counter() - self.began - self.elsewhere
        line = {name.removeprefix("term:"): float(value) / self.steps
                for name, value in zip(names, terms, strict=True)}
        line = {"loss": float(loss) / self.steps, **line}
        sums, number = noise.view(2, NOISE_BINS)
        line |= {
            "cross_entropy_by_noise": [round(float(s / n), 5) if n else None
                                       for s, n in zip(sums, number, strict=True)],
            **(self.step_use.summary(expert_use) if self.layers else {}),
            "tokens": self.tokens,
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
    """metrics.jsonl (one line an event, written at once) and TensorBoard events; only the first rank writes.

    Lines of steps after `resumed_at` are dropped: an interrupted run repeats those steps. Lines that a full disk does
    not take are kept for later; TensorBoard's events of that time are lost. resumed_kinds: of the lines that are kept
    of that very step.
    """

    def __init__(self, run_dir: Path, resumed_at: int, active: bool):
        self.active = active
        if not active:
            return
        path = run_dir / "metrics.jsonl"
        kept = [line for line in path.read_text().splitlines(keepends=True)
                if line.endswith("\n") and json.loads(line)["step"] <= resumed_at] if path.exists() else []
        self.resumed_kinds = {line["kind"] for line in map(json.loads, kept) if line["step"] == resumed_at}
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(kept))
        temporary.rename(path)
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND)
        self._waiting = b""
        (run_dir / "tb").mkdir(exist_ok=True)
        self._board_path, self._board = run_dir / "tb" / "events", None
        if resumed_at:
            self._to_board([Event(wall_time=time.time(), step=resumed_at + 1,
                                  session_log=SessionLog(status=SessionLog.START))])

    def write(self, kind: str, step: int, values: dict) -> None:
        """kind: train, eval, samples or event."""
        if not self.active:
            return
        self._waiting += (json.dumps({"kind": kind, "step": step, **values}, ensure_ascii=False) + "\n").encode()
        with _unless_full():
            while self._waiting:
                self._waiting = self._waiting[os.write(self._file, self._waiting):]
        shown = {f"{kind}/{name}": value for name, value in values.items()
                 if isinstance(value, int | float) and not isinstance(value, bool)}
        shown |= {f"{kind}/{name}/{index}": part for name in _DRAWN_BY_INDEX
                  for index, part in enumerate(values.get(name, ())) if part is not None}
        if shown:
            self._to_board([Event(wall_time=time.time(), step=step, summary=scalar(tag, value))
                            for tag, value in shown.items()])

    def _to_board(self, events: list[Event]) -> None:
        with _unless_full():
            # Not SummaryWriter: its thread ends on a full disk, and the next call waits for it for ever.
            board, self._board = self._board or EventsWriter(str(self._board_path)), None
            for event in events:
                board.write_event(event)
            board.flush()
            self._board = board  # otherwise its last record may be torn, and a new file is begun

    def close(self) -> None:
        """After the last line; raises OSError if lines are still waiting for room."""
        if not self.active:
            return
        while self._waiting:
            self._waiting = self._waiting[os.write(self._file, self._waiting):]
        os.close(self._file)
        if self._board is not None:
            self._board.close()


@contextmanager
def _unless_full() -> Iterator[None]:
    """Passes over an OSError that says that the disk took no more."""
    try:
        yield
    except OSError as error:
        if storage_failure(error) is None:
            raise
