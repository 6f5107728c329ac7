"""The only module that talks to DeepSpeed's engine: optimizer, step, ZeRO partitions, saving and loading."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import deepspeed
import torch
from torch import Tensor

from model.diffusion_lm import DiffusionLM, LossReport
from model.moe.parallel import whole_state
from trainer.config import OptimConfig, RunConfig, recomputed_layers
from trainer.ds_config import DSConfig
from trainer.errors import CheckpointError
from trainer.kernels import DTYPES
from trainer.launch import Ranks
from trainer.parameter_groups import parameter_groups
from trainer.randomness import random_states, restore_random_states
from trainer.snapshot import Files, HostCopies, RecordingEngine

TAG = "engine"
"""DeepSpeed's sub-folder inside a checkpoint."""


def learning_rate(optim: OptimConfig, step: int, steps: int) -> float:
    """Learning rate of 0-based `step`: linear warm-up, then the schedule. A pure function: nothing to resume."""
    if step < optim.warmup_steps:
        return optim.lr * (step + 1) / optim.warmup_steps
    done = (step - optim.warmup_steps) / max(1, steps - 1 - optim.warmup_steps)
    if optim.schedule == "constant":
        return optim.lr
    if optim.schedule == "linear":
        height = 1 - done
    elif optim.schedule == "cosine":
        height = 0.5 * (1 + math.cos(math.pi * done))
    else:  # wsd
        left = (steps - 1 - step) / max(1.0, optim.decay_fraction * steps)
        height = min(1.0, left)
    return optim.lr * (optim.min_lr_ratio + (1 - optim.min_lr_ratio) * height)


def update_average(averages: list[Tensor], parts: list[Tensor], decay: float) -> None:
    """average = decay * average + (1 - decay) * part, in place."""
    for average, part in zip(averages, parts, strict=True):
        average.lerp_(part.detach(), 1 - decay)


def rank_file(rank: int) -> str:
    """Where a checkpoint keeps what DeepSpeed does not know of a rank."""
    return f"rank{rank:05d}.pt"


class Engine:
    """A DiffusionLM under ZeRO, with the average of its weights.

    The average (EMA) is kept beside the fp32 partitions that ZeRO updates, in their layout: each rank averages only
    what it owns, and whatever converts those partitions can convert the average.
    """

    def __init__(self, model: DiffusionLM, run: RunConfig, ds: DSConfig, ranks: Ranks):
        self.run, self.ranks, self.zero_stage = run, ranks, ds.zero_stage
        self.dtype = DTYPES[ds.precision]
        model.denoiser.recompute = recomputed_layers(run.train.activation_checkpointing, run.model.layers)
        self._own = list(model.parameters(recurse=False))
        self.engine, self.optimizer, _, _ = deepspeed.initialize(
            model=model, optimizer=self._adamw(model, ds), config=ds.for_engine(ranks.world, ranks.device.type))
        self.model: DiffusionLM = self.engine.module
        self._shares = ranks.world * ds.accumulation
        self.ema = [part.detach().clone() for part in self._masters()] if run.optim.ema_decay > 0 else []
        self.updates = 0
        self._copies = HostCopies()

    def _adamw(self, model: DiffusionLM, ds: DSConfig) -> torch.optim.Optimizer:
        optim = self.run.optim
        groups = parameter_groups(model, optim.weight_decay)
        settings = {"lr": optim.lr, "betas": tuple(optim.betas), "eps": optim.eps}
        if ds.offload_optimizer:
            from deepspeed.ops.adam import DeepSpeedCPUAdam
            return DeepSpeedCPUAdam(groups, adamw_mode=True, **settings)
        return torch.optim.AdamW(groups, fused=True, **settings)

    def forward(self, *inputs) -> LossReport:
        """The loss of one micro-batch."""
        return self.engine(*inputs)

    def backward(self, report: LossReport) -> None:
        """Gradients of one micro-batch. The model's total is its share of the global loss; DeepSpeed averages over
        ranks and accumulation, so the share is scaled up by as much beforehand."""
        self.engine.backward(report.total * self._shares)

    def accumulate(self, last: bool) -> None:
        """After a micro-batch that is not the step's last: lets DeepSpeed count it without an update."""
        if not last:
            self.engine.step()

    def update(self, step: int, discard: bool = False) -> float | None:
        """Clips, updates the weights and their average. Returns the learning rate used.

        None if nothing was updated: because of `discard`, or because the gradient norm is not finite. The weights,
        the optimizer's state and the average are then as before, and the gradients are gone.
        """
        rate = learning_rate(self.run.optim, step, self.run.train.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        with self._invalid_norm() if discard else nullcontext():
            self.engine.step()
        if not self.engine.was_step_applied():
            return None
        self.updates += 1
        if self.ema:
            # The average of few weights is short at first, so that it soon forgets the initial ones.
            decay = min(self.run.optim.ema_decay, (1 + self.updates) / (10 + self.updates))
            update_average(self.ema, self._masters(), decay)
        return rate

    @contextmanager
    def _invalid_norm(self) -> Iterator[None]:
        """Makes the optimizer drop the step as it does by itself when the gradient norm is not finite, which it shows
        as -1: it offers no other way to give accumulated gradients up."""
        invalid = torch.tensor(-1.0, device=self.ranks.device)
        name, norm = (("_get_norm_groups", [invalid]) if self.zero_stage == 3 else ("scaled_global_norm", invalid))
        setattr(self.optimizer, name, lambda: norm)
        try:
            yield
        finally:
            delattr(self.optimizer, name)

    @property
    def gradient_norm(self) -> float:
        """Global norm before clipping, of the last step; infinite if that was not applied."""
        return float(self.engine.get_global_grad_norm())

    @contextmanager
    def averaged_weights(self) -> Iterator[DiffusionLM]:
        """The model in evaluation mode with the averaged weights in place of the trained ones."""
        if self.ema:
            self._publish(self.ema)
        self.model.eval()
        try:
            # Parameters of submodules are gathered by DeepSpeed's hooks, those of the model itself only in forward.
            with deepspeed.zero.GatheredParameters(self._own, enabled=self.zero_stage == 3):
                yield self.model
        finally:
            self.model.train()
            if self.ema:
                self._publish(self._masters())

    def full_state(self) -> dict[str, Tensor]:
        """All averaged weights of the model, whole and with all experts, on every rank's CPU; to be called inside
        `averaged_weights`, which has gathered the model's own parameters."""
        own = {id(parameter) for parameter in self._own}
        rest = [parameter for parameter in self.model.parameters() if id(parameter) not in own]
        with deepspeed.zero.GatheredParameters(rest, enabled=self.zero_stage == 3):
            state = whole_state(self.model, self.model.state_dict())
            return {name: value.detach().cpu().clone() for name, value in state.items()}

    def _masters(self) -> list[Tensor]:
        """This rank's flat fp32 partitions, one a parameter group (stage 1, 2) or sub-group (stage 3)."""
        if self.zero_stage == 3:
            return self.optimizer.fp32_partitioned_groups_flat
        return self.optimizer.single_partition_of_fp32_groups

    def _publish(self, parts: list[Tensor]) -> None:
        """Makes the model compute with `parts` instead of the fp32 partitions, which stay as they are."""
        optimizer = self.optimizer
        masters = self._masters()
        held = [master.data for master in masters]
        for master, part in zip(masters, parts, strict=True):
            master.data = part
        if self.zero_stage == 3:
            # As in DeepSpeed's own step: small parameters stay gathered between steps and are gathered anew.
            optimizer._partition_all_parameters()
            for index in range(len(masters)):
                optimizer._reassign_or_swap_out_partitioned_parameters(index)
            if optimizer.persistent_parameters:
                optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)
        else:
            optimizer.update_lp_params()
        for master, data in zip(masters, held, strict=True):
            master.data = data

    def state_files(self, copies: bool) -> Files:
        """This rank's files of a checkpoint: ZeRO's state, its average, its random numbers. A collective.

        copies: as copies in host memory, which training on does not change and the next call overwrites; otherwise
        the state itself.
        """
        if not copies:
            return self._record(lambda name, state: state, own_storage=True)
        files = self._record(self._copies.take, own_storage=False)
        self._copies.finish()
        return files

    def reserve_copies(self) -> None:
        """Begins to make the memory for the copies of `state_files`, in the background. A collective. To be called
        after a first update, which gives the optimizer its state, and before the first copies are taken."""
        self._copies.reserve(self._record(lambda name, state: state, own_storage=False))

    def _record(self, keep: Callable[[str, object], object], own_storage: bool) -> Files:
        # DeepSpeed names files by their path under a folder that need not exist.
        root = Path("/checkpoint")
        recording = RecordingEngine(root, keep, own_storage)
        engine = self.engine
        held, engine.checkpoint_engine = engine.checkpoint_engine, recording
        engine._copy_recovery_script = lambda save_path: None  # it cannot read experts
        try:
            engine.save_checkpoint(str(root), tag=TAG, save_latest=False)
        finally:
            engine.checkpoint_engine = held
        recording.save({"ema": self.ema, "updates": self.updates, "random": random_states(self.ranks.device)},
                       str(root / rank_file(self.ranks.rank)))
        return recording.files

    def load(self, folder: Path) -> bool:
        """Restores what a checkpoint of `state_files` holds, on the same topology. Returns whether it held an average
        where one is kept; otherwise that begins anew, with the weights."""
        own = [{name: value for name, value in group.items() if name != "params"}
               for group in self.optimizer.param_groups]
        clipping = self.optimizer.clip_grad
        path, _ = self.engine.load_checkpoint(str(folder), tag=TAG)
        if path is None:
            raise CheckpointError(f"{folder}: DeepSpeed could not load its state; see its message above")
        # With the state came the checkpoint's weight decay and betas and, in stages 1 and 2, its clipping.
        for group, settings in zip(self.optimizer.param_groups, own, strict=True):
            group.update(settings)
        self.optimizer.clip_grad = clipping
        state = torch.load(folder / rank_file(self.ranks.rank), map_location="cpu", weights_only=True)
        anew = bool(self.ema) and not state["ema"]
        self.updates = 0 if anew else state["updates"]
        if self.ema:
            for average, part in zip(self.ema, self._masters() if anew else state["ema"], strict=True):
                average.copy_(part.detach())
        restore_random_states(state["random"], self.ranks.device)
        return not anew
