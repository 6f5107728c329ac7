"""The run configuration: everything about a run that the DeepSpeed JSON does not own.

What a key means stands below it; `describe` reads those texts for the command line's help. How the values
come together is `trainer/config_load.py`.
"""

from __future__ import annotations

import ast
import inspect
import json
import re
import textwrap
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from functools import cache
from itertools import pairwise
from threading import Lock
from typing import NamedTuple, get_type_hints

from model.attention.pattern import layer_patterns
from model.config import ModelConfig
from model.errors import ConfigError
from model.sampling import SamplerSettings
from trainer.data.config import DataConfig
from trainer.profiling import step_range


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW, its learning rate over the run, and the average of the weights."""

    lr: float = 1e-3
    """The highest learning rate, reached at the end of the warm-up."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.98])
    """Decay of AdamW's first and second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.01
    """Decoupled weight decay, on matrices only: not on norms, biases and embeddings."""
    warmup_steps: int = 100
    """Steps over which the learning rate rises linearly from 0; a shorter run ends before its highest."""
    schedule: str = "cosine"
    """After the warm-up: constant; linear or cosine, falling to `min_lr_ratio` at the last step; or wsd,
    constant and then falling linearly over the last `decay_fraction` of the steps."""
    decay_fraction: float = 0.2
    """Share of all steps over which wsd falls. Only with schedule = wsd."""
    min_lr_ratio: float = 0.1
    """The last step's learning rate, as a share of `lr`."""
    ema_decay: float = 0.999
    """Decay per step of the average of the weights that evaluation and sampling use. 0: none."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Length of the run, what it does how often, and how it uses the machine. A cadence of 0 means never."""

    steps: int = 1000
    """Optimizer steps of the whole run; the learning rate's schedule is stretched over them."""
    seed: int = 0
    """Decides the initial weights, the order of the data, noise and dropout, whatever the number of ranks."""
    log_every: int = 10
    """Steps between lines of metrics; steps in between do not wait for the device."""
    eval_every: int = 200
    """Steps between evaluations on `data.valid`."""
    sample_every: int = 500
    """Steps between generations for documents of `data.valid`."""
    save_every: int = 200
    """Steps between checkpoints. The last step, a signal and the time limit save as well."""
    keep_last: int = 2
    """Newest checkpoints to keep. 0: all."""
    keep_every: int = 0
    """Checkpoints at multiples of this many steps are kept for good."""
    async_save: bool = True
    """Write checkpoints while training goes on, from a copy of the state in host memory. false: wait for them."""
    max_skipped: int = 10
    """A step whose loss or gradient is not finite, or whose loss is a spike, is skipped on all ranks. After this many
    in a row the run saves and ends with exit code 82."""
    spike_limit: float = 20.0
    """A loss more than this many standard deviations (estimated from the median absolute deviation, at least 1 % of
    the median) above the median of the last 128 applied steps is a spike. 0: no loss is."""
    hang_minutes: float = 10.0
    """A rank without progress for so long ends with exit code 90, its stacks in `logs/` and the ranks that hold it up
    named. 0: never."""
    max_minutes: float = 0.0
    """After this much time, counted from this process's start, the run saves, says so and ends early with
    exit code 0; a restart continues it. The learning rate's schedule does not change. 0: no limit."""
    deterministic: bool = False
    """Use only kernels that give the same bits every time, at some cost. On a CPU with one thread a rank
    (OMP_NUM_THREADS=1) all do."""
    activation_checkpointing: str = "none"
    """Layers that are computed again in the backward pass instead of keeping their inner activations: none, all, or
    every:n (the last of each n layers)."""
    profile_steps: str = ""
    """First and last step, such as 20-22, of which the first rank writes a trace to `profile/`. Empty: none."""
    profile_memory: bool = False
    """With the trace, write how CUDA memory was used in these steps."""
    expert_parallel_size: int = 1
    """Ranks that hold the experts of every layer among them, each an equal part, and send each other their tokens.
    Divides `model.moe.experts` and the number of ranks. 1: every rank holds all experts."""


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Cross-entropy on held-out documents, at fixed noise levels."""

    documents: int = 64
    """Documents of `data.valid` to evaluate; fewer if it has fewer."""
    noise_levels: int = 10
    """Levels of noise, at the middles of as many equal slices of time."""


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """How text is generated, while training and by default afterwards."""

    solver: str = "dpmpp2m_sde"
    """ddim (the same as dpmpp1: first order), dpmpp2m (second order, multistep), dpmpp2m_sde (the same with fresh
    noise) or ancestral. diffuseq_v2_compat repeats what DiffuSeq-v2 calls DPM-Solver++; it samples wrongly
    and is only for comparisons, with model.network = bert."""
    steps: int = 20
    """Noise levels that are visited, with one call of the network each (two with guidance)."""
    grid: str = "time"
    """Where those levels lie: evenly in the schedule's `time`, or evenly in `log_snr` between its ends. The same
    for schedule = log_snr."""
    temperature: float = 1.0
    """Divides the logits of every prediction; below 1 sharpens it. Must be 1 with model.diffusion.loss = mse, where
    embeddings are predicted."""
    end_temperature: float = 1.0
    """The same for the chance that a text ends at a token, which decides how long texts are. At the temperature of the
    words, texts of which a model knows little end early. Must be 1 unless model.diffusion.loss_over = text."""
    guidance: float = 1.0
    """Scale of classifier-free guidance: above 1 moves each prediction away from that without a source. 1: none.
    Only for a model trained with model.diffusion.source_dropout."""
    candidates: int = 1
    """Texts generated for each source, of which the one with the highest mean BLEU against the others is taken
    (minimum Bayes risk). In cached conditioning they share one pass over the source."""
    clamp: bool = False
    """Round every prediction to its nearest token before the next step."""
    documents: int = 8
    """Documents of `data.valid` to generate for while training."""
    seed: int = 0
    """Decides the noise that generation starts from and adds."""

    def settings(self) -> SamplerSettings:
        """Those of the sampler itself."""
        return SamplerSettings(**{field.name: getattr(self, field.name) for field in fields(SamplerSettings)})


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything about a run that the DeepSpeed JSON does not own."""

    preset: str = ""
    """Name of the preset that the values started from. Only given at the top of a file or by --preset."""
    recipe: str = ""
    """Name of the recipe on top of it. Only given at the top of a file or by --recipe."""
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)

    def validate(self) -> None:
        """Refuses impossible values with ConfigError. What depends on the ranks is checked at their start."""
        def need(ok: bool, key: str, problem: str) -> None:
            if not ok:
                raise ConfigError(key, problem)

        o, t, s = self.optim, self.train, self.sample
        self.data.validate()
        # A tokenizer that is still to be read may differ from data.vocab_size; the rest can be checked now.
        replace(self.model, vocab_size=self.model.vocab_size or self.data.vocab_size).validate()
        layer_patterns(self.model)
        need(self.model.diffusion.conditioning == "cached" or self.data.draws_per_source == 1,
             "data.draws_per_source", f"is {self.data.draws_per_source}, but in joint conditioning a source "
             "has one noised copy: set it to 1, or model.diffusion.conditioning to cached")
        longest = self.data.longest_document()
        need(self.model.network != "bert" or longest <= self.model.max_positions, "model.max_positions",
             f"is {self.model.max_positions}, but a document may have {longest} tokens: raise it, or lower "
             "data.max_source_tokens")
        positive = {"optim.lr": o.lr, "optim.eps": o.eps, "train.steps": t.steps,
                    "train.log_every": t.log_every, "train.max_skipped": t.max_skipped,
                    "train.expert_parallel_size": t.expert_parallel_size,
                    "sample.steps": s.steps, "sample.candidates": s.candidates,
                    "sample.temperature": s.temperature, "sample.end_temperature": s.end_temperature,
                    "eval.documents": self.eval.documents,
                    "eval.noise_levels": self.eval.noise_levels, "sample.documents": s.documents}
        for key, value in positive.items():
            need(value > 0, key, f"must be positive, not {value}")
        step_range(t.profile_steps)
        recomputed_layers(t.activation_checkpointing, self.model.layers)
        need(bool(t.profile_steps) or not t.profile_memory, "train.profile_memory",
             "is recorded in the steps of train.profile_steps: set these as well")
        not_negative = {"optim.weight_decay": o.weight_decay, "optim.warmup_steps": o.warmup_steps,
                        "train.seed": t.seed, "sample.seed": s.seed, "sample.guidance": s.guidance,
                        "train.eval_every": t.eval_every,
                        "train.sample_every": t.sample_every, "train.save_every": t.save_every,
                        "train.keep_last": t.keep_last, "train.keep_every": t.keep_every,
                        "train.max_minutes": t.max_minutes, "train.spike_limit": t.spike_limit,
                        "train.hang_minutes": t.hang_minutes}
        for key, value in not_negative.items():
            need(value >= 0, key, f"must be 0 or positive, not {value}")
        for key, value in (("train.seed", t.seed), ("sample.seed", s.seed)):
            need(value < 2**63, key, f"must be below 2^63, not {value}")
        need(len(o.betas) == 2 and all(0 <= beta < 1 for beta in o.betas), "optim.betas",
             f"must be two numbers in [0, 1), not {o.betas}")
        need(0 <= o.ema_decay < 1, "optim.ema_decay", f"must lie in [0, 1), not {o.ema_decay}")
        need(0 <= o.min_lr_ratio <= 1, "optim.min_lr_ratio", f"must lie in [0, 1], not {o.min_lr_ratio}")
        need(0 < o.decay_fraction <= 1, "optim.decay_fraction", f"must lie in (0, 1], not {o.decay_fraction}")
        schedules = ("constant", "linear", "cosine", "wsd")
        need(o.schedule in schedules, "optim.schedule", f"is '{o.schedule}', must be one of {', '.join(schedules)}")
        s.settings().check(self.model)

    def check_device(self, device: str) -> None:
        """Refuses, with ConfigError, what this kind of device ("cpu" or "cuda") cannot do."""
        if device == "cpu" and self.train.profile_memory:
            raise ConfigError("train.profile_memory", "records CUDA memory, and this run is on a CPU: set it to false")


def recomputed_layers(policy: str, layers: int) -> frozenset[int]:
    """Layers, from 0 on, that `train.activation_checkpointing` chooses; ConfigError if it is none of its forms."""
    if policy in ("none", "all"):
        return frozenset(range(layers) if policy == "all" else ())
    match = re.fullmatch(r"every:([1-9]\d*)", policy)
    if match is None or int(match[1]) > layers:
        raise ConfigError("train.activation_checkpointing", f"is '{policy}', must be none, all or every:n with n from "
                          f"1 to model.layers = {layers}")
    return frozenset(range(int(match[1]) - 1, layers, int(match[1])))


class Key(NamedTuple):
    """One leaf of the run configuration."""

    name: str
    type: str
    default: object
    doc: str


def describe(config: object | None = None, prefix: str = "") -> Iterator[Key]:
    """Every leaf in order, with the value it has in `config` (a RunConfig with all defaults if None)."""
    config = RunConfig() if config is None else config
    docs, hints = _field_docs(type(config)), get_type_hints(type(config))
    for item in fields(config):
        value = getattr(config, item.name)
        if is_dataclass(hints[item.name]):
            yield from describe(value, f"{prefix}{item.name}.")
        else:
            yield Key(prefix + item.name, item.type, value, docs.get(item.name, ""))


_PARSING = Lock()  # Python 3.11 fails now and then where two threads parse at a time (SystemError from ast)


@cache
def _field_docs(cls: type) -> dict[str, str]:
    """Field name -> the string literal that stands below the field in the class's source."""
    with _PARSING:
        body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0].body
    return {name.target.id: inspect.cleandoc(text.value.value).replace("\n", " ")
            for name, text in pairwise(body)
            if isinstance(name, ast.AnnAssign) and isinstance(text, ast.Expr)
            and isinstance(text.value, ast.Constant) and isinstance(text.value.value, str)}


def to_dict(config: RunConfig) -> dict:
    """Plain nested dictionary, ready for JSON; `config_load.from_dict` reads it back."""
    return asdict(config)


def to_toml(config: RunConfig) -> str:
    """Every value as a TOML file that, given to --config, resolves to the same configuration."""
    def section(values: dict, name: str) -> Iterator[str]:
        # JSON's notation of strings, numbers, booleans and lists is valid TOML.
        yield from (f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in values.items()
                    if not isinstance(value, dict))
        for key, value in values.items():
            if isinstance(value, dict):
                yield from ("", f"[{name}{key}]")
                yield from section(value, f"{name}{key}.")

    return "\n".join(section(to_dict(config), "")) + "\n"
