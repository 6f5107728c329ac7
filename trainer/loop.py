"""One training run, from resolved configuration to exported model. Reads from top to bottom."""

from __future__ import annotations

import json
import math
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TextIO

import torch
from tqdm import tqdm

from model.batch import PackedBatch
from model.diffusion_lm import BatchPlan, DiffusionLM, NoiseDraw
from model.flops import training_flops
from model.moe.parallel import ExpertGroup
from trainer.checkpoint import Saver
from trainer.config import RunConfig
from trainer.data.evaluation import evaluation_samples
from trainer.data.loader import PackedLoader, StepInfo
from trainer.data.prepare import prepare
from trainer.ds_config import DSConfig
from trainer.engine import Engine
from trainer.errors import NumericalError, storage_failure
from trainer.evaluate import evaluate, summary, table
from trainer.exchange import Report, exchange
from trainer.expert_parallel import shard_experts
from trainer.expert_use import StarvationWatch, warning
from trainer.export import load_weights, model_folder, write_model
from trainer.generate import generate
from trainer.guard import Guard, Trouble
from trainer.hardware import peak_flops, use_deterministic_kernels
from trainer.launch import Ranks
from trainer.metrics import MetricsLog, StepMetrics
from trainer.profiling import Profiler, step_range
from trainer.randomness import at_learned_times, learned_times, training_draw
from trainer.run_folder import RunFolder, check_model, check_vocabulary, model_facts, on_first_rank
from trainer.saving import Saving
from trainer.signals import StopRequest, StopRequested
from trainer.topology import check_same, topology
from trainer.watchdog import Watchdog, slowest


class TrainingRun:
    """Builds data, model and engine, resumes, and trains. All methods are collectives."""

    def __init__(self, run: RunConfig, ds: DSConfig, folder: RunFolder, ranks: Ranks, stop: StopRequest,
                 watchdog: Watchdog):
        self.ds, self.folder, self.ranks, self.stop, self.watchdog = ds, folder, ranks, stop, watchdog
        if run.train.deterministic:
            use_deterministic_kernels()
        with stop.at_once():
            self.data = prepare(run.data, splits=("train", "valid"), progress=True)
        watchdog.start()  # not earlier: ranks may wait long for the one that prepares
        self.vocabulary = vocabulary = self.data.vocabulary
        self.run = run = replace(run, model=replace(
            run.model, vocab_size=vocabulary.size, pad_id=vocabulary.pad_id, eos_id=vocabulary.eos_id,
            bos_id=vocabulary.bos_id))
        run.model.validate()
        samples = self.data.samples("train")
        self.say(f"training documents: {samples.describe()}")
        self.loader = PackedLoader(samples, rows_per_micro_batch=ds.micro_batch, accumulation=ds.accumulation,
                                   rank=ranks.rank, world=ranks.world, seed=run.train.seed,
                                   lookahead=run.data.lookahead, prefetch=run.data.prefetch,
                                   source_dropout=run.model.diffusion.source_dropout,
                                   infilling=run.model.diffusion.infilling)
        model = DiffusionLM(run.model)
        self.model_facts = model_facts(run, model)
        shards = run.train.expert_parallel_size
        self.expert_group = ExpertGroup(shards, ranks.rank % shards)
        if shards > 1:
            shard_experts(model, self.expert_group)
        model.init_weights(run.train.seed)
        model.prior_count_V.copy_(torch.from_numpy(samples.canvas_counts()))
        watchdog.beat("resume", 0)
        found = folder.checkpoint(ranks, self.say)
        if found is None and folder.init_from is not None:
            origin = model_folder(folder.init_from)
            check_vocabulary(origin, None, [origin], vocabulary)
            load_weights(model, origin)
        self.times = learned_times(run.model.diffusion)
        self.engine = Engine(model, run, ds, ranks)
        self.model = self.engine.model
        self.guard = Guard(run.train.spike_limit)
        watchdog.beat("resume", 0)
        self.step = self._resume(found)
        if ranks.first:
            folder.keep_vocabulary(vocabulary.path)  # once it is known to be that of the checkpoint
            stop.watch_folder(folder.path)
        self.log = MetricsLog(folder.path, self.step, active=ranks.first)
        self.saving = Saving(folder.path, Saver(folder.path, ranks, run.train.keep_last, run.train.keep_every),
                             self.engine, run.train, self.step, self.log, self.say, watchdog)
        moe_layers = run.model.layers if run.model.network == "sparse" else 0
        self.metrics = StepMetrics(self.model.schedule, moe_layers, run.model.moe.experts, ranks.device,
                                   peak_flops(ranks.device, self.engine.dtype), self.expert_group)
        self.starvation = StarvationWatch()
        self.profiler = Profiler(step_range(run.train.profile_steps if ranks.first else ""), run.train.profile_memory,
                                 folder.path)
        self.seconds_W, self.logged_at = [0.0] * ranks.world, self.step
        self.stopping = False

    def train(self) -> bool:
        """Trains to the last step or until asked to stop. Returns whether the run is finished, which takes the last
        step's evaluation and samples as well."""
        run, last = self.run.train, self.run.train.steps
        self.stopping = self.stop.agreed(self.ranks.control)
        with tqdm(total=last, initial=self.step, desc="training", unit="step", disable=not self.ranks.first,
                  dynamic_ncols=True, mininterval=1.0 if sys.stderr.isatty() else 15.0) as bar:
            missing = self._interludes(self._missed(), bar)
            for info, micro_batches in self.loader.stream(self.step, self._planned):
                if self.step >= last or self.stopping:
                    break
                save = self._train_step(info, micro_batches)
                bar.update()
                if self._due(run.log_every):
                    self._log(info, bar)
                with self.metrics.clock_stopped():
                    missing = self._interludes(self._due_interludes(), bar)
                    if (save or self._due(run.save_every)) and self.step < last and not self.stopping:
                        self.saving.begin(self.step, self._facts())
                    self.saving.after_step()
                if self.guard.in_a_row >= run.max_skipped:
                    self._give_up()
        self.saving.settle(self.step, self._facts())
        finished = self.step >= last and not missing
        if finished:
            self._export()
        self.log.write("event", self.step, {"event": "finished" if finished else f"stopped: {self.stop.reason}"})
        self.log.close()
        self.watchdog.stop()
        if self.ranks.first:
            stopped = "stopped" if self.stop.by_file else "preempted"
            self.folder.mark("done" if finished else stopped, self.step, self.stop.reason)
        return finished

    def _planned(self, step: int, batch: PackedBatch) -> tuple[PackedBatch, BatchPlan, NoiseDraw]:
        """A micro-batch with its plan and noise, which take the CPU a good part of a GPU's time for the step."""
        plan = self.model.prepare(batch, device=self.ranks.device, dtype=self.engine.dtype)
        return batch, plan, training_draw(batch, self.run.model, self.run.train.seed, step)

    def _due(self, every: int) -> bool:
        return every > 0 and (self.step % every == 0 or self.step == self.run.train.steps)

    def _train_step(self, info: StepInfo, micro_batches: list) -> bool:
        """One step, after which `self.step` is one higher and `self.stopping` up to date. Returns whether a rank was
        asked to save."""
        device = self.ranks.device
        measured = torch.zeros((), dtype=torch.float64, device=device)
        self.watchdog.beat("train", self.step + 1)
        self.profiler.before(self.step + 1)
        seconds = 0.0
        for index, (batch, plan, draw) in enumerate(micro_batches):
            began = time.perf_counter()
            draw = draw if self.times is None else at_learned_times(draw, self.times)
            batch, plan, draw = batch.to(device), plan.to(device), draw.to(device)
            sent = self.expert_group.sent_bytes
            report = self.engine.forward(batch, plan, draw, info.loss_tokens, info.tokens, info.target_tokens)
            seconds += time.perf_counter() - began
            self.watchdog.beat("gradients", self.step + 1)
            self.engine.backward(report)
            self.metrics.add(report, batch, training_flops(self.run.model, plan, batch.sample_C.numel()),
                             self.expert_group.sent_bytes - sent)
            if self.times is not None:
                measured = measured + self.times.measure(batch, plan, draw, report)
            self.engine.accumulate(last=index == len(micro_batches) - 1)
        # The step's only wait for the device; the optimizer would wait here itself, for the norm.
        reports = exchange(Report(self.metrics.step_loss.item(), self.stop.wish, self.stop.take_save(), seconds),
                           self.ranks)
        self.seconds_W = [sum(pair) for pair in zip(self.seconds_W, (each.seconds for each in reports), strict=True)]
        applied = self._update(info, [each.loss for each in reports])
        if applied and self.times is not None:
            torch.distributed.all_reduce(measured)
            self.times.observe(measured)
        self.step += 1
        trace = self.profiler.after(self.step)
        if trace is not None:
            self.say(f"step {self.step}: profile written to {trace}")
        self.stopping = self.stop.agree(max(each.stop for each in reports))
        return any(each.save for each in reports)

    def _update(self, info: StepInfo, share_W: list[float]) -> bool:
        """Applies the step, or skips it on all ranks. Returns whether it was applied."""
        trouble = self.guard.judge(share_W)
        rate = self.engine.update(self.step, discard=trouble is not None)
        if rate is not None:
            self.guard.applied(sum(share_W))
            self.metrics.count(info.loss_tokens, info.tokens)
            self.rate = rate
            return True
        self.metrics.drop()
        if trouble is None and self.ds.precision == "fp16":
            return False  # its loss scaling steps down to where gradients fit
        # A gradient is the sum over ranks by the time it is looked at.
        trouble = trouble or Trouble("the gradient is not finite", list(range(self.ranks.world)))
        self.guard.skip()
        loss = sum(share_W)
        self.log.write("event", self.step + 1, {
            "event": "skipped", "reason": trouble.what, "ranks": trouble.ranks,
            "loss": loss if math.isfinite(loss) else None, "in_a_row": self.guard.in_a_row})
        self.say(f"step {self.step + 1}: skipped, {trouble.what} ({_named(trouble.ranks)})")
        return False

    def _give_up(self) -> None:
        self.saving.settle(self.step, self._facts())
        raise NumericalError(
            f"step {self.step}: {self.guard.in_a_row} steps in a row were skipped (train.max_skipped); metrics.jsonl "
            "says why, as events. Continue with another configuration, such as a lower optim.lr: in a new --run_dir, "
            "with --resume and a checkpoint's folder")

    def _log(self, info: StepInfo, bar: tqdm) -> None:
        mean_W = [seconds / (self.step - self.logged_at) for seconds in self.seconds_W]
        straggler = slowest(mean_W)
        if straggler is not None:
            own = mean_W[straggler]
            self.say(f"step {self.step}: rank {straggler} is slow: {own:.3f} s a step for its part")
            self.log.write("event", self.step, {"event": "straggler", "rank": straggler, "seconds": round(own, 4)})
        self.seconds_W, self.logged_at = [0.0] * self.ranks.world, self.step
        if self.metrics.steps == 0:  # all steps since the last line were skipped
            return
        line = self.metrics.reduce()
        norm = self.engine.gradient_norm
        line |= {"lr": self.rate, "gradient_norm": norm if math.isfinite(norm) else None, "epoch": info.epoch,
                 "skipped": self.guard.skipped, "seconds": self.folder.seconds(),
                 "cpu_seconds": round(time.process_time(), 2)}
        self.log.write("train", self.step, line)
        if self.metrics.layers and (starving := self.starvation.notice(line["expert_tokens"])):
            self.log.write("event", self.step, {"event": "experts starve", "layer_and_expert": starving})
            self.say(f"step {self.step}: {warning(starving)}", file=sys.stderr)
        shown = {"loss": line["loss"], "ce": line["cross_entropy"], "gnorm": norm}
        bar.set_postfix({name: f"{value:.3f}" for name, value in shown.items()} | {
            "tok/s": f"{line['tokens_per_s']:,.0f}"})

    def _due_interludes(self) -> list[str]:
        """Which interludes are due after this step, by the kind of their lines of metrics."""
        every = {"eval": self.run.train.eval_every, "samples": self.run.train.sample_every}
        return [kind for kind in every if self._due(every[kind])]

    def _missed(self) -> list[str]:
        """Those of the last step that an earlier start was stopped in; those of other steps are given up."""
        if self.step != self.run.train.steps:
            return []
        done = on_first_rank(self.ranks, lambda: self.log.resumed_kinds)
        return [kind for kind in self._due_interludes() if kind not in done]

    def _interludes(self, kinds: list[str], bar: tqdm) -> list[str]:
        """Evaluation and samples; a request to stop abandons them. Returns those that were not done."""
        missing = list(kinds)
        if self.stopping:
            return missing
        try:
            if "eval" in kinds:
                bar.set_description("evaluating")
                self._evaluate()
                missing.remove("eval")
            if "samples" in kinds:
                bar.set_description("generating")
                self._show_samples()
                missing.remove("samples")
        except StopRequested:
            self.stopping = True
            self.say(f"step {self.step}: evaluation abandoned ({self.stop.reason})")
        bar.set_description("training", refresh=False)
        return missing

    def _between(self, phase: str) -> None:
        """Between two parts of an evaluation or of sampling: a sign of life, and a look for requests to stop."""
        self.watchdog.beat(phase, self.step)
        self.stop.check(self.ranks.control)

    def _evaluate(self) -> None:
        run = self.run
        if "valid" not in self.data.caches:
            return
        with self.engine.averaged_weights() as model:
            result = evaluate(model, self.data, "valid", documents=run.eval.documents,
                              levels=run.eval.noise_levels, seed=run.train.seed, dtype=self.engine.dtype,
                              ranks=self.ranks, between=lambda: self._between("evaluate"))
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
                                    samples.canvas_tokens, run.sample.settings(), device=self.ranks.device,
                                    candidates=run.sample.candidates,
                                    between=lambda: self._between("sample")))
        gathered: list[list[dict]] = [[] for _ in range(self.ranks.world)]
        torch.distributed.all_gather_object(gathered, records)
        texts = {record["document"]: record for part in gathered for record in part}
        if self.ranks.first:
            references = self.vocabulary.decode([samples.segment(n).canvas for n in sorted(texts)])
            records = [{**texts[n], "reference": reference}
                       for n, reference in zip(sorted(texts), references, strict=True)]
            self._write_samples("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
            self.log.write("samples", self.step, {"documents": sorted(texts)})
            self.say(f"step {self.step}: sample: {records[0]['text'][:300]!r}")

    def _write_samples(self, text: str) -> None:
        path = self.folder.path / "samples" / f"step-{self.step:08d}.jsonl"
        try:
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
        except OSError as error:
            if storage_failure(error) is None:
                raise
            self.say(f"warning: {path} could not be written: {storage_failure(error)}")

    def _facts(self) -> dict:
        """What a checkpoint's manifest says beside its files."""
        facts = {"topology": topology(self.run, self.ds, self.ranks.world), "guard": self.guard.state(),
                 "rows_done": self.loader.first_row(self.step), "vocabulary": self.vocabulary.digest,
                 **self.model_facts}
        if self.continuation is not None:
            facts["continuation"] = self.continuation
        return facts if self.times is None else facts | {"time_sampling": self.times.state()}

    def _resume(self, found: tuple[Path, dict] | None) -> int:
        """Loads the checkpoint that was found, of `RunFolder.checkpoint`; the step to go on with."""
        self.continuation = None
        if found is None:
            return 0
        path, manifest = found
        self.continuation = manifest.get("continuation")
        check_same(path, manifest["topology"], topology(self.run, self.ds, self.ranks.world))
        check_vocabulary(path, manifest.get("vocabulary"), [path / "config", path.parents[1] / "config"],
                         self.vocabulary)
        check_model(path, manifest, self.model_facts, self.say)
        if not self.engine.load(path):
            self.say(f"{path} holds no average of the weights: it begins anew, with the weights")
        self.loader.resume(manifest["step"], manifest["rows_done"])
        if self.times is not None:
            self._resume_times(path, manifest)
        self.guard.load(manifest["guard"])
        if self.guard.in_a_row >= self.run.train.max_skipped:
            self.guard.in_a_row = 0  # the run ended for that; whoever starts it again gives it as many chances again
        if self.ranks.first:
            self.folder.keep_origin()
        self.say(f"resumed from {path}")
        return manifest["step"]

    def _resume_times(self, path: Path, manifest: dict) -> None:
        here = self.model_facts["model"]
        saved = manifest.get("model", here)
        depends = ("model.diffusion.time_sampling", "model.diffusion.steps")
        if "time_sampling" in manifest and all(saved[key] == here[key] for key in depends):
            self.times.load(manifest["time_sampling"])
        else:
            self.say(f"{path} has not learnt which times to draw by {depends[0]} = {here[depends[0]]!r}: that begins "
                     "anew")

    def _export(self) -> None:
        self.watchdog.beat("export", self.step)
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


def _named(ranks: list[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"
