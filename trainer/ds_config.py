"""The only reader of the DeepSpeed JSON: micro-batch, accumulation, ZeRO, precision, clipping, offload.

DeepSpeed 0.19.8 ignores unknown top-level keys without a word (a misspelt `zero_optimization` trains without
ZeRO), clips at 1.0 when nothing is said about it, and trains some combinations wrongly. So the file is held
against a list of what is known to work, and what is changed on the way to the engine is said aloud
(`DSConfig.notices`). Every other setting of a run belongs to the run configuration (`trainer/config.py`); no
key exists on both sides.
"""

from __future__ import annotations

import copy
import difflib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from model.errors import ConfigError
from trainer.config import describe

SHIPPED = Path(__file__).resolve().parents[1] / "ds_configs"


class Count(NamedTuple):
    """A whole number of at least `least`, which may be written as 5e8."""

    least: int


_NUMBER = (int, float)
# Key -> type of its value, or the keys of its section.
_OFFLOAD = {"device": str, "pin_memory": bool}
KEYS: dict[str, type | tuple | Count | dict] = {
    "train_micro_batch_size_per_gpu": int,
    "gradient_accumulation_steps": int,
    "gradient_clipping": _NUMBER,
    "zero_optimization": {
        "stage": int,
        "contiguous_gradients": bool,
        "reduce_scatter": bool,
        "reduce_bucket_size": Count(1),
        "allgather_partitions": bool,
        "allgather_bucket_size": Count(1),
        "overlap_comm": bool,
        "round_robin_gradients": bool,
        "sub_group_size": Count(1),
        "stage3_prefetch_bucket_size": Count(0),
        "stage3_param_persistence_threshold": Count(0),
        "stage3_model_persistence_threshold": Count(0),
        "stage3_max_live_parameters": Count(0),
        "stage3_max_reuse_distance": Count(0),
        "offload_optimizer": _OFFLOAD,
    },
    "bf16": {"enabled": bool, "check_grad_overflow": bool},
    "fp16": {
        "enabled": bool,
        "loss_scale": _NUMBER,
        "initial_scale_power": Count(0),
        "loss_scale_window": Count(1),
        "hysteresis": Count(1),
        "consecutive_hysteresis": bool,
        "min_loss_scale": _NUMBER,
    },
    "communication_data_type": str,
    "wall_clock_breakdown": bool,
    "memory_breakdown": bool,
    "comms_logger": {"enabled": bool, "verbose": bool, "prof_all": bool, "debug": bool, "prof_ops": list},
    "flops_profiler": {
        "enabled": bool,
        "profile_step": Count(1),
        "module_depth": int,
        "top_modules": Count(1),
        "detailed": bool,
        "output_file": str,
    },
}

# DeepSpeed's keys that another place owns, and what to do instead.
FORBIDDEN = {
    "train_batch_size": "is derived: micro-batch x gradient_accumulation_steps x ranks. Remove it",
    "optimizer": "belongs to the run configuration: set optim.lr, optim.weight_decay there",
    "scheduler": "belongs to the run configuration: set optim.schedule and optim.warmup_steps there",
    "activation_checkpointing": "belongs to the run configuration: set train.activation_checkpointing there",
    "expert_parallel": "belongs to the run configuration: set train.expert_parallel_size there",
    "moe": "belongs to the run configuration: set model.moe there",
    "checkpoint": "belongs to the trainer, which writes and converts checkpoints itself. Remove it",
    "steps_per_print": "belongs to the run configuration: set train.log_every there",
    "tensorboard": "belongs to the trainer, which writes events into the run folder. Remove it",
    "wandb": "is not supported: metrics go to metrics.jsonl and TensorBoard. Remove it",
    "csv_monitor": "is not supported: metrics go to metrics.jsonl and TensorBoard. Remove it",
    "gradient_allreduce_op": "belongs to the trainer, which scales the loss for an average. Remove it",
    "prescale_gradients": "belongs to the trainer, which scales the loss itself. Remove it",
    "gradient_predivide_factor": "belongs to the trainer, which scales the loss itself. Remove it",
    "seed": "belongs to the run configuration: set train.seed there",
    "bfloat16": 'is an old name that DeepSpeed no longer honours: write "bf16": {"enabled": true}',
    "amp": 'is not supported: write "bf16": {"enabled": true}',
    "torch_autocast": 'is not supported: write "bf16": {"enabled": true}',
    "data_types": "is not supported: bf16 or fp16 decides the precision of gradients. Remove it",
    "sparse_attention": "belongs to the run configuration: set model.attention there",
    "compile": "is not supported. Remove it",
    "elasticity": "was removed from DeepSpeed; convert the checkpoint to change the number of ranks",
    "zero_allow_untested_optimizer": "is not needed: ZeRO supports the trainer's optimizer. Remove it",
}

_CLIPPING = 1.0


@dataclass(frozen=True, kw_only=True)
class DSConfig:
    """A checked DeepSpeed JSON.

    `notices` are the lines to be logged once: every value that was filled in or changed, and why.
    """

    path: Path
    micro_batch: int
    """Packed rows of a rank in one forward and backward pass."""
    accumulation: int
    """Micro-batches of a rank in one optimizer step."""
    zero_stage: int
    """1, 2 or 3."""
    precision: str
    """fp32, bf16 or fp16: parameters and activations; the optimizer's copy is always fp32."""
    clipping: float
    """Largest global gradient norm; 0: no clipping."""
    offload_optimizer: bool
    """The optimizer's state lives in host memory, and its step runs there."""
    notices: tuple[str, ...]
    values: dict
    """The whole file, with the values above written out."""

    def rows_per_step(self, world: int) -> int:
        """Packed rows in one optimizer step of all ranks."""
        return self.micro_batch * self.accumulation * world

    def check_device(self, device: str) -> None:
        """Refuses, with ConfigError, what this kind of device ("cpu" or "cuda") cannot run."""
        if device == "cpu" and self.precision == "fp16":
            raise ConfigError("fp16", "cannot train on a CPU: enable bf16 instead, or neither for fp32 "
                              f"({self.path})")
        if device == "cpu" and self.offload_optimizer:
            raise ConfigError("zero_optimization.offload_optimizer", "has no use on a CPU, where the state "
                              f"is in host memory already: remove it ({self.path})")

    def notices_on(self, device: str) -> tuple[str, ...]:
        """What to say aloud about running this on a kind of device."""
        if device == "cpu" and self.precision == "bf16":
            return (*self.notices, "bf16 is slow on most CPUs; ds_configs/cpu_zero2.json trains in fp32")
        return self.notices

    def for_engine(self, world: int, device: str) -> dict:
        """A fresh dictionary for `deepspeed.initialize(config=...)` on `world` ranks."""
        self.check_device(device)
        return {**copy.deepcopy(self.values), "train_batch_size": self.rows_per_step(world)}


def load_ds_config(path: str | Path) -> DSConfig:
    """Reads and checks a DeepSpeed JSON; every problem is a ConfigError that names the file and the key."""
    path = Path(path)
    if not path.is_file() and not path.is_absolute() and (SHIPPED.parent / path).is_file():
        path = SHIPPED.parent / path  # as data is: from the current folder, then from the repository
    if not path.is_file():
        shipped = ", ".join(sorted(f"{SHIPPED.name}/{file.name}" for file in SHIPPED.glob("*.json")))
        raise ConfigError("--ds_config", f"there is no file {path}; shipped: {shipped}")
    values = read_json(path, "--ds_config")
    _check_keys(values, KEYS, path)
    return resolve(values, path)


def read_json(path: Path, option: str) -> dict:
    """The JSON object in a file that was given by the command line's `option`, which errors name. A key that
    is given twice is refused."""
    def pairs(items: list[tuple[str, object]]) -> dict:
        keys = [key for key, _ in items]
        for key in keys:
            if keys.count(key) > 1:
                raise ConfigError(key, f"is given twice in {path}: keep one")
        return dict(items)

    try:
        values = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=pairs)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(option, f"cannot read {path} ({error})") from error
    except json.JSONDecodeError as error:
        raise ConfigError(option, f"{path}, line {error.lineno}, column {error.colno}: not JSON "
                          f"({error.msg}); comments and trailing commas are not allowed") from error
    if not isinstance(values, dict):
        raise ConfigError(option, f"{path} must hold one JSON object, not {type(values).__name__}")
    return values


def _check_keys(section: dict, known: dict, path: Path, prefix: str = "") -> None:
    for key, value in section.items():
        dotted = prefix + key
        if key not in known:
            if not prefix and key in FORBIDDEN:
                raise ConfigError(dotted, f"{FORBIDDEN[key]} ({path})")
            raise ConfigError(dotted, f"is not a supported key of {path}; {_hint(key, known, prefix)}")
        expected = known[key]
        if value == "auto":
            raise ConfigError(dotted, f'is "auto", which nothing here fills in: write the value ({path})')
        if isinstance(expected, dict):
            if not isinstance(value, dict):
                raise ConfigError(dotted, f"must be an object, not {json.dumps(value)} ({path})")
            _check_keys(value, expected, path, dotted + ".")
        elif isinstance(expected, Count):
            if isinstance(value, bool) or not isinstance(value, _NUMBER) or not (
                    math.isfinite(value) and value == int(value) >= expected.least):
                raise ConfigError(dotted, f"must be a whole number of at least {expected.least}, not "
                                  f"{json.dumps(value)} ({path})")
        elif not isinstance(value, expected) or (isinstance(value, bool) and expected is not bool):
            name = "a number" if expected is _NUMBER else f"of type {expected.__name__}"
            raise ConfigError(dotted, f"must be {name}, not {json.dumps(value)} ({path})")


def _hint(key: str, known: dict, prefix: str) -> str:
    """What to do about an unknown key: one of the run configuration, misspelt, or neither."""
    ours = [item.name for item in describe()]
    owners = ([name for name in ours if name.startswith(f"{key}.")]
              or [name for name in ours if key in (name, name.rpartition(".")[2])])
    if owners:
        return f"it belongs to the run configuration (--config or --set): {', '.join(owners[:3])}"
    close = difflib.get_close_matches(key, known, n=1)
    return f"did you mean {prefix}{close[0]}?" if close else f"known here: {', '.join(sorted(known))}"


def resolve(values: dict, path: Path) -> DSConfig:
    """Fills in what a DeepSpeed JSON leaves out; ConfigError, which names `path`, for what cannot work."""
    def need(ok: bool, key: str, problem: str) -> None:
        if not ok:
            raise ConfigError(key, f"{problem} ({path})")

    values = copy.deepcopy(values)
    notices = []
    micro_batch = values.get("train_micro_batch_size_per_gpu", 0)
    need(micro_batch > 0, "train_micro_batch_size_per_gpu",
         "must be given, and positive: the packed rows of a rank in one pass")
    accumulation = values.setdefault("gradient_accumulation_steps", 1)
    need(accumulation > 0, "gradient_accumulation_steps", f"must be positive, not {accumulation}")

    enabled = [name for name in ("bf16", "fp16") if values.get(name, {}).get("enabled", False)]
    need(len(enabled) < 2, "fp16", "and bf16 are both enabled: keep bf16")
    precision = enabled[0] if enabled else "fp32"
    for key in ("loss_scale", "min_loss_scale"):
        scale = values.get("fp16", {}).get(key, 0)
        need(math.isfinite(scale) and scale >= 0, f"fp16.{key}", f"must be 0 or positive, not {scale}")
    need(values.get("bf16", {}).get("check_grad_overflow", True), "bf16.check_grad_overflow",
         "is false, but steps with bad gradients are skipped through it: remove it")

    zero = values.setdefault("zero_optimization", {})
    stage = zero.setdefault("stage", 0)
    need(0 <= stage <= 3, "zero_optimization.stage", f"must be 1, 2 or 3, not {stage}")
    if stage == 0:
        stage = zero["stage"] = 1
        notices.append("zero_optimization.stage 0 -> 1: at stage 0 every rank clips by the norm of its own "
                       "experts, and bf16 takes an optimizer step before the first batch")

    offload = zero.get("offload_optimizer", {}).get("device", "none")
    need(offload in ("none", "cpu"), "zero_optimization.offload_optimizer.device",
         f"is '{offload}', must be none or cpu")
    need(offload == "none" or stage < 3, "zero_optimization.offload_optimizer",
         "is not supported in ZeRO stage 3 with experts; use stage 2, as in ds_configs/zero2_offload.json")

    if "gradient_clipping" not in values:
        values["gradient_clipping"] = _CLIPPING
        notices.append(f"gradient_clipping = {_CLIPPING}: DeepSpeed's own default; write 0 for none")
    clipping = float(values["gradient_clipping"])
    need(math.isfinite(clipping) and clipping >= 0, "gradient_clipping",
         f"must be 0 or positive, not {clipping}")

    communication = values.get("communication_data_type", "fp32")
    need(communication in ("fp32", "bf16", "fp16"), "communication_data_type",
         f"is '{communication}', must be fp32, bf16 or fp16")

    return DSConfig(path=path, micro_batch=micro_batch, accumulation=accumulation, zero_stage=stage,
                    precision=precision, clipping=clipping, offload_optimizer=offload == "cpu",
                    notices=tuple(notices), values=values)
