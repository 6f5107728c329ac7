"""One training run, from resolved configuration to exported model. Reads from top to bottom."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from dataclasses import replace
from typing import TextIO

import torch
from tqdm import tqdm

from model.batch import PackedBatch
from model.diffusion.loss_second_moment import LossSecondMoment
from model.diffusion_lm import BatchPlan, DiffusionLM
from model.flops import training_flops
from model.moe.parallel import ExpertGroup
from trainer import checkpoint
from trainer.config import RunConfig
from trainer.data.evaluation import evaluation_samples
from trainer.data.loader import PackedLoader, StepInfo
from trainer.data.prepare import prepare
from trainer.ds_config import DSConfig
from trainer.engine import Engine
from trainer.errors import NumericalError
from trainer.evaluate import evaluate, summary, table
from trainer.expert_parallel import shard_experts
from trainer.expert_use import StarvationWatch, warning
from trainer.export import load_weights, model_folder, write_model
from trainer.generate import generate, sampler_settings
from trainer.hardware import peak_flops
from trainer.launch import Ranks
from trainer.metrics import MetricsLog, StepMetrics
from trainer.randomness import training_draw
from trainer.run_folder import RunFolder
from trainer.signals import StopRequest
from trainer.topology import check_same, topology


class TrainingRun:
    """Builds data, model and engine, resumes, and trains. All methods are collectives."""

    def __init__(self, run: RunConfig, ds: DSConfig, folder: RunFolder, ranks: Ranks, stop: StopRequest):
        self.ds, self.folder, self.ranks, self.stop = ds, folder, ranks, stop
        if run.train.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS refuses to be deterministic without
            torch.use_deterministic_algorithms(True)
        self.data = prepare(run.data, splits=("train", "valid"), progress=True)
        self.vocabulary = vocabulary = self.data.vocabulary
        self.run = run = replace(run, model=replace(
            run.model, vocab_size=vocabulary.size, pad_id=vocabulary.pad_id, eos_id=vocabulary.eos_id,
            bos_id=vocabulary.bos_id))
        run.model.validate()
        samples = self.data.samples("train")
        self.say(f"training documents: {samples.describe()}")
        self.loader = PackedLoader(samples, rows_per_micro_batch=ds.micro_batch, accumulation=ds.accumulation,
                                   rank=ranks.rank, world=ranks.world, seed=run.train.seed,
                                   lookahead=run.data.lookahead, prefetch=run.data.prefetch)
        model = DiffusionLM(run.model)
        shards = run.train.expert_parallel_size
        self.expert_group = ExpertGroup(shards, ranks.rank % shards)
        if shards > 1:
            shard_experts(model, self.expert_group)
        model.init_weights(run.train.seed)
        model.prior_count_V.copy_(torch.from_numpy(samples.canvas_counts()))
        if folder.init_from is not None:
            load_weights(model, model_folder(folder.init_from))
        d = run.model.diffusion
        self.times = LossSecondMoment(d.steps) if d.time_sampling == "loss_second_moment" else None
        self.engine = Engine(model, run, ds, ranks)
        self.model = self.engine.model
        self.step = self.resumed_at = self._resume()
        self.log = MetricsLog(folder.path, self.step, active=ranks.first)
        moe_layers = run.model.layers if run.model.network == "sparse" else 0
        self.metrics = StepMetrics(self.model.schedule, moe_layers, run.model.moe.experts, ranks.device,
                                   peak_flops(ranks.device, self.engine.dtype), self.expert_group)
        self.starvation = StarvationWatch()

    def train(self) -> bool:
        """Trains to the last step or until asked to stop. Returns whether the run is finished."""
        run, last = self.run.train, self.run.train.steps
        with tqdm(total=last, initial=self.step, desc="training", unit="step", disable=not self.ranks.first,
                  dynamic_ncols=True, mininterval=1.0 if sys.stderr.isatty() else 15.0) as bar:
            for info, micro_batches in self.loader.stream(self.step, self._planned):
                if self.step >= last or self.stop.agreed(self.ranks.control):
                    break
                rate = self._train_step(info, micro_batches)
                self.step += 1
                bar.update()
                if self._due(run.log_every):
                    self._log(info, rate, bar)
                with self.metrics.clock_stopped():
                    if self._due(run.eval_every):
                        self._evaluate()
                    if self._due(run.sample_every):
                        self._show_samples()
                    if self._due(run.save_every) and self.step < last:
                        self.save()
        if self.step > self.resumed_at:
            self.save()
        finished = self.step >= last
        if finished:
            self._export()
        self.log.write("event", self.step, {"event": "finished" if finished else f"stopped: {self.stop.reason}"})
        self.log.close()
        if self.ranks.first:
            self.folder.mark("done" if finished else "preempted", self.step, self.stop.reason)
        return finished

    def _due(self, every: int) -> bool:
        return every > 0 and (self.step % every == 0 or self.step == self.run.train.steps)

    def _train_step(self, info: StepInfo, micro_batches: list) -> float:
        seed, device = self.run.train.seed, self.ranks.device
        measured = torch.zeros((), dtype=torch.float64, device=device)
        for index, (batch, plan) in enumerate(micro_batches):
            plan = plan.to(device)
            draw = training_draw(batch, self.run.model, seed, self.step, self.times).to(device)
            batch = batch.to(device)
            sent = self.expert_group.sent_bytes
            report = self.engine.forward_backward(batch, plan, draw, info.loss_tokens, info.tokens)
            self._check_finite(report.total)
            self.metrics.add(report, batch, training_flops(self.run.model, plan, batch.sample_C.numel()),
                             self.expert_group.sent_bytes - sent)
            if self.times is not None:
                measured = measured + self.times.measure(batch, plan, draw, report)
            self.engine.accumulate(last=index == len(micro_batches) - 1)
        rate = self.engine.update(self.step)
        if self.times is not None:
            torch.distributed.all_reduce(measured)
            self.times.observe(measured)
        self.metrics.count(info.loss_tokens, info.tokens)
        return rate

    def _planned(self, batch: PackedBatch) -> tuple[PackedBatch, BatchPlan]:
        """A micro-batch with its plan, which takes the CPU a good part of a GPU's time for the step."""
        return batch, self.model.prepare(batch, device=self.ranks.device, dtype=self.engine.dtype)

    def _check_finite(self, total: torch.Tensor) -> None:
        """Before the update, so that the weights stay as they are. DeepSpeed's step waits for the device anyway."""
        bad = torch.tensor([not math.isfinite(total.item())], dtype=torch.uint8)
        torch.distributed.all_reduce(bad, op=torch.distributed.ReduceOp.MAX, group=self.ranks.control)
        if bad.item():
            raise NumericalError(f"step {self.step}: the loss is not finite. The newest checkpoint is from before; "
                                 "resume with a lower optim.lr or a longer optim.warmup_steps")

    def _log(self, info: StepInfo, rate: float, bar: tqdm) -> None:
        line = self.metrics.reduce()
        line |= {"lr": rate, "gradient_norm": self.engine.gradient_norm, "epoch": info.epoch,
                 "seconds": self.folder.seconds()}
        self.log.write("train", self.step, line)
        if self.metrics.layers and (starving := self.starvation.notice(line["expert_tokens"])):
            self.log.write("event", self.step, {"event": "experts starve", "layer_and_expert": starving})
            self.say(f"step {self.step}: {warning(starving)}", file=sys.stderr)
        shown = {"loss": line["loss"], "ce": line["cross_entropy"], "gnorm": line["gradient_norm"]}
        bar.set_postfix({name: f"{value:.3f}" for name, value in shown.items()} | {
            "tok/s": f"{line['tokens_per_s']:,.0f}"})

    def _evaluate(self) -> None:
        run = self.run
        if "valid" not in self.data.caches:
            return
        with self.engine.averaged_weights() as model:
            result = evaluate(model, self.data, "valid", documents=run.eval.documents,
                              levels=run.eval.noise_levels, seed=run.train.seed, dtype=self.engine.dtype,
                              ranks=self.ranks)
        self.log.write("eval", self.step, result)
        self.say(f"step {self.step}: {summary(result)}")
        if self.step == run.train.steps:
            self.say(table(result))

    def _show_samples(self) -> None:
        """Generates for the first validation documents, spread over the ranks, with the averaged weights."""
        run = self.run
        if "valid" not in self.data.caches:
            return
        samples = self.data.samples("valid")
        chosen = evaluation_samples(len(samples), run.sample.documents).tolist()
        # Every rank generates equally many (some twice), because under ZeRO-3 a forward pass is a collective.
        mine = [chosen[(self.ranks.rank + turn * self.ranks.world) % len(chosen)]
                for turn in range(-(-len(chosen) // self.ranks.world))]
        with self.engine.averaged_weights() as model:
            records = list(generate(model, self.vocabulary, [(n, samples.source(n)) for n in mine],
                                    samples.canvas_tokens, sampler_settings(run.sample), device=self.ranks.device))
        gathered: list[list[dict]] = [[] for _ in range(self.ranks.world)]
        torch.distributed.all_gather_object(gathered, records)
        texts = {record["document"]: record for part in gathered for record in part}
        if self.ranks.first:
            references = self.vocabulary.decode([samples.segment(n).canvas for n in sorted(texts)])
            records = [{**texts[n], "reference": reference}
                       for n, reference in zip(sorted(texts), references, strict=True)]
            path = self.folder.path / "samples" / f"step-{self.step:08d}.jsonl"
            path.parent.mkdir(exist_ok=True)
            path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
            self.say(f"step {self.step}: sample: {records[0]['text'][:300]!r}")

    def save(self) -> None:
        facts = {"topology": topology(self.run, self.ds, self.ranks.world),
                 "rows_done": self.loader.first_row(self.step)}
        if self.times is not None:
            facts["time_sampling"] = self.times.state()
        started = time.perf_counter()
        path = checkpoint.save(self.folder.path, self.step, facts, self.engine.save, self.ranks,
                               self.run.train.keep_last, self.run.train.keep_every)
        seconds = time.perf_counter() - started
        self.log.write("event", self.step, {"event": "saved", "path": str(path), "save_seconds": round(seconds, 3)})

    def _resume(self) -> int:
        found = self.folder.checkpoint(self.say)
        if found is None:
            return 0
        path, manifest = found
        check_same(path, manifest["topology"], topology(self.run, self.ds, self.ranks.world))
        self.engine.load(path)
        self.loader.resume(manifest["step"], manifest["rows_done"])
        if self.times is not None:
            self.times.load(manifest["time_sampling"])
        self.say(f"resumed from {path}")
        return manifest["step"]

    def _export(self) -> None:
        with self.engine.averaged_weights():
            state = self.engine.full_state()
        if self.ranks.first:
            write_model(self.folder.path / "model", self.run, state, self.vocabulary.path,
                        {"step": self.step, "weights": "averaged" if self.engine.ema else "last"})
        torch.distributed.barrier()

    def say(self, text: str, file: TextIO | None = None) -> None:
        """Prints a line on the first rank, above the progress bar; to the standard output if no file is given."""
        if self.ranks.first:
            tqdm.write(text, file=file or sys.stdout)
            (file or sys.stdout).flush()
