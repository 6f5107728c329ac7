"""Shape and mechanism of the model: every switch of the network and of the diffusion, with its meaning.

Presets and recipes (`trainer/presets.py`) only choose values here; there is one implementation behind them.
`validate()` refuses what cannot work, naming the key.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from model.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """Sliding window + dilation + global tokens; exact definition in `model/attention/pattern.py`."""

    heads: int = 4
    """Attention heads of a layer; they divide `model.width`."""
    window: int | list[int] = 128
    """Even W: W/2 steps to each side (W + 1 keys with the query itself). [left, right]: each side by itself."""
    dilation: str | list = "1"
    """Step of the window, by layer and head. Layers are separated by `|` and repeat; within a layer, the values
    separated by commas share the heads equally. "1" is a plain window; "1|2" alternates; "1|1,4" dilates half
    of the heads of every second layer. The same as a list: [1], [1, 2], [1, [1, 4]]."""
    global_tokens: str = "none"
    """none, `prefix:k` (the first k tokens of each document), `separators` (every end token of a source), `markers`
    (the first token of each source and of each target), or `positions:0,5,9`. Joined by `+`."""
    backend: str = "auto"
    """auto, flash_attn, torch_flash, cpu_band or reference. A name never falls back: it runs or is refused."""
    rope_base: float = 10000.0
    """Base of the rotary positions' wavelengths; larger for longer documents."""


@dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """Dropless token-choice mixture of experts in every layer's feed-forward."""

    experts: int = 8
    """Experts in each layer; 1 is a dense feed-forward."""
    top_k: int = 2
    """Experts that each token passes."""
    ffn: int = 1024
    """Hidden width of one expert."""
    gated: bool = True
    """Gated experts, w2(silu(w1 x) * w3 x); otherwise w2 gelu(w1 x)."""
    normalize: bool = True
    """Divide the chosen experts' weights by their sum."""
    jitter: float = 0.0
    """The router's input is multiplied by uniform noise in [1 - jitter, 1 + jitter] while training."""
    shared_ffn: int = 0
    """Hidden width of an expert that every token passes; 0 for none."""
    balance_weight: float = 0.01
    """Weight of the load-balancing loss, which is 1 where all experts are used equally. 0: off."""
    z_weight: float = 0.001
    """Weight of the router's z loss, which keeps its logits small. 0: off."""
    backend: str = "auto"
    """auto, cpu, grouped_mm, megablocks or reference. A name never falls back: it runs or is refused."""


@dataclass(frozen=True, kw_only=True)
class DiffusionConfig:
    """Noise, prediction and loss. Equations: `docs/diffusion.md`."""

    schedule: str = "log_snr"
    """log_snr: the log signal-to-noise ratio falls linearly in t over `log_snr_range`; sqrt: DiffuSeq's; cosine;
    linear: DDPM's, in discrete steps."""
    steps: int = 0
    """T: time is discrete, with the noise levels of the original DiffuSeq's T steps of the schedule. 0: continuous
    time."""
    log_snr_range: list[float] | str = "auto"
    """[noisiest, cleanest] of log(alpha^2 / sigma^2). auto: where a token of this vocabulary and embedding width
    passes from unknown to known, log(2 ln V / E) - 1.3 with 2.5 to each side. Only with schedule = log_snr."""
    time_sampling: str = "stratified"
    """stratified: one draw in each of N equal slices of time over the N copies of the global batch; uniform: each
    copy by itself; adaptive: stratified over time warped so that the cross-entropy, as measured so far, rises by the
    same amount in every slice (CDCD's loss CDF); loss_second_moment: steps with large losses more often, each counting
    for less (DiffuSeq's lossaware; discrete time only)."""
    absorbing: float = 0.5
    """gamma: a target token is replaced by the absorbing vector with probability gamma * sigma_t. 0: plain
    Gaussian diffusion."""
    loss: str = "cross_entropy"
    """cross_entropy of the prediction, or mse between predicted and true embedding (with the cross-entropy of
    rounding the true embedding)."""
    loss_over: str = "text"
    """text: the loss is the mean over the tokens of all targets, their end tokens included; canvas: with the filler
    behind them, which then is predicted as any token; document: with the sources too. For the last two each document
    counts alike, however long."""
    embedding_noise: bool = False
    """Train on embeddings that are noised by the first step's sigma, those of sources as well; generation takes the
    exact ones. Only with discrete time."""
    terminal_loss: bool = False
    """Add the squared length of the signal that is left at the noisiest level. Only with loss = mse."""
    absorbing_norm: float = 0.0
    """Weight of the absorbing vector's length in the loss (DiffuSeq-v2: 0.01). Only with absorbing > 0."""
    conditioning: str = "cached"
    """cached: a source sees neither target nor time, so it is computed once for all steps and draws; joint:
    source and target see each other through the same window."""
    self_conditioning: float = 0.0
    """Probability of training with the model's own first estimate as a second input; 0 removes the input."""
    source_dropout: float = 0.0
    """Probability of training a sample without the content of its source, for classifier-free guidance
    (`sample.guidance`) and unconditional generation. 0: neither."""
    infilling: float = 0.0
    """Probability of training a sample with random parts of its target given and the gaps between them noised. Only
    with conditioning = joint, because what is given must see what it surrounds. 0: no infilling."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The denoiser: embeddings, local mixing, `layers` blocks of sparse attention and MoE, output head."""

    network: str = "sparse"
    """sparse: pre-norm blocks of rotary attention and experts, modulated by the noise level; bert: DiffuSeq's, a
    post-norm BERT encoder with learned positions and one dense feed-forward of width `moe.ffn`, whose output is
    compared with the embedding table itself."""
    vocab_size: int = 0
    """0: taken from the tokenizer."""
    embed_dim: int = 64
    """E, the width of the token embeddings that are diffused."""
    normalize_embeddings: bool = True
    """Scale every token's embedding to the length sqrt(E); otherwise their lengths are learned."""
    width: int = 256
    """D, the width of the network."""
    layers: int = 4
    """Blocks of attention and experts."""
    time_dim: int = 128
    """Width of the embedding of the noise level."""
    max_positions: int = 512
    """Longest document, in tokens. Only with network = bert, whose positions are learned."""
    dropout: float = 0.0
    """Share of the activations that are dropped while training, after the embeddings and after each attention and
    feed-forward. Only with network = bert."""
    input: str = "bayes"
    """bayes: the network is fed the embedding expected from the noisy one alone (context-free posterior); noisy:
    the noisy embedding itself, scaled to unit variance."""
    bayes_skip: bool = True
    """Add the context-free posterior's log-probabilities to the output logits, so that the network only learns
    what context adds."""
    local_mixing: int = 5
    """Width (odd) of a convolution over neighbouring inputs before the first layer; 0 for none."""
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    moe: MoEConfig = field(default_factory=MoEConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    pad_id: int = 3
    """Id of the filler behind a text; a run takes all three from its vocabulary."""
    eos_id: int = 2
    """Id of the token that ends a source and a target."""
    bos_id: int = 1
    """Id of the token that begins a source."""

    @property
    def head_dim(self) -> int:
        return self.width // self.attention.heads

    @property
    def last_block_of(self) -> str:
        """Whose final states the last block works out: "all", or only those of the "target", where a source is there
        to be read and nothing is asked of it."""
        d = self.diffusion
        targets_only = self.network == "sparse" and d.conditioning == "cached" and d.loss_over != "document"
        return "target" if targets_only else "all"

    def log_snr_range(self) -> tuple[float, float]:
        """(noisiest, cleanest) log-SNR of the log_snr schedule."""
        if self.diffusion.log_snr_range != "auto":
            low, high = self.diffusion.log_snr_range
            return float(low), float(high)
        centre = math.log(2 * math.log(self.vocab_size) / self.embed_dim) - 1.3
        return centre - 2.5, centre + 2.5

    def validate(self) -> None:
        """Refuses impossible values with ConfigError. The pattern's own strings are checked where they are parsed."""
        def need(ok: bool, key: str, problem: str) -> None:
            if not ok:
                raise ConfigError(key, problem)

        a, m, d = self.attention, self.moe, self.diffusion
        for key, value in (("model.embed_dim", self.embed_dim), ("model.width", self.width),
                           ("model.layers", self.layers), ("model.time_dim", self.time_dim),
                           ("model.attention.heads", a.heads), ("model.moe.experts", m.experts),
                           ("model.moe.ffn", m.ffn)):
            need(value > 0, key, f"must be positive, not {value}")
        need(self.vocab_size > 0, "model.vocab_size", "is not known: give a tokenizer or a positive number")
        need(self.width % a.heads == 0, "model.attention.heads",
             f"{a.heads} heads do not divide model.width = {self.width}: choose a number that does")
        need(self.head_dim % 8 == 0 or (a.backend == "reference" and self.head_dim % 2 == 0), "model.attention.heads",
             f"width {self.width} / {a.heads} heads gives head width {self.head_dim}; it must be a multiple of 8, or "
             "even with model.attention.backend = reference")
        need(self.time_dim % 2 == 0, "model.time_dim", f"must be even, not {self.time_dim}")
        need(1 <= m.top_k <= m.experts, "model.moe.top_k",
             f"{m.top_k} of {m.experts} experts: must lie between 1 and model.moe.experts")
        need(0 <= m.jitter < 1, "model.moe.jitter", f"must lie in [0, 1), not {m.jitter}")
        need(m.shared_ffn >= 0, "model.moe.shared_ffn", f"must be 0 or positive, not {m.shared_ffn}")
        for key, value in (("model.moe.balance_weight", m.balance_weight), ("model.moe.z_weight", m.z_weight)):
            need(value >= 0, key, f"must be 0 or positive, not {value}")
        need(a.rope_base > 0, "model.attention.rope_base", f"must be positive, not {a.rope_base}")
        need(self.local_mixing == 0 or (self.local_mixing > 0 and self.local_mixing % 2 == 1), "model.local_mixing",
             f"must be odd and positive, or 0 for none, not {self.local_mixing}")
        choices = {"model.network": (self.network, ("sparse", "bert")),
                   "model.input": (self.input, ("bayes", "noisy")),
                   "model.diffusion.schedule": (d.schedule, ("log_snr", "sqrt", "cosine", "linear")),
                   "model.diffusion.loss_over": (d.loss_over, ("text", "canvas", "document")),
                   "model.diffusion.time_sampling": (d.time_sampling, ("stratified", "uniform", "adaptive",
                                                                         "loss_second_moment")),
                   "model.diffusion.loss": (d.loss, ("cross_entropy", "mse")),
                   "model.diffusion.conditioning": (d.conditioning, ("cached", "joint"))}
        for key, (value, allowed) in choices.items():
            need(value in allowed, key, f"is '{value}', must be one of {', '.join(allowed)}")
        need(0 <= d.absorbing <= 1, "model.diffusion.absorbing", f"must lie in [0, 1], not {d.absorbing}")
        need(0 <= d.self_conditioning <= 1, "model.diffusion.self_conditioning",
             f"must lie in [0, 1], not {d.self_conditioning}")
        need(0 <= d.source_dropout < 1, "model.diffusion.source_dropout", f"must lie in [0, 1), not {d.source_dropout}")
        need(0 <= d.infilling <= 1, "model.diffusion.infilling", f"must lie in [0, 1], not {d.infilling}")
        need(d.infilling == 0 or d.conditioning == "joint", "model.diffusion.infilling",
             "needs model.diffusion.conditioning = joint: a cached source is a prefix that does not see its target")
        need(d.loss == "cross_entropy" or not self.bayes_skip, "model.diffusion.loss",
             "mse predicts an embedding, which has no logits for model.bayes_skip: set that to false")
        need(d.loss == "mse" or d.loss_over != "document", "model.diffusion.loss_over",
             "document compares predicted embeddings, sources' included: set model.diffusion.loss to mse")
        need(d.conditioning == "joint" or d.loss_over != "document", "model.diffusion.loss_over",
             "document trains on sources, which know of no noise level in cached conditioning: set "
             "model.diffusion.conditioning to joint")
        need(d.loss == "mse" or not d.terminal_loss, "model.diffusion.terminal_loss",
             "only applies to model.diffusion.loss = mse")
        need(d.absorbing_norm >= 0, "model.diffusion.absorbing_norm", f"must be 0 or positive, not {d.absorbing_norm}")
        need(d.absorbing > 0 or d.absorbing_norm == 0, "model.diffusion.absorbing_norm",
             "needs an absorbing vector: set model.diffusion.absorbing above 0, or this to 0")
        need(d.steps == 0 or d.steps >= 2, "model.diffusion.steps", f"must be 0 or at least 2, not {d.steps}")
        need(d.steps == 0 or d.schedule != "log_snr", "model.diffusion.steps",
             "log_snr is a schedule of continuous time: set this to 0, or the schedule to sqrt, cosine or linear")
        need(d.steps > 0 or d.schedule != "linear", "model.diffusion.schedule",
             "linear is defined for discrete time: set model.diffusion.steps, for instance to 2000")
        need(d.steps > 0 or not d.embedding_noise, "model.diffusion.embedding_noise",
             "is the noise of the first of model.diffusion.steps steps: set that, for instance to 2000")
        need(d.steps > 0 or d.time_sampling != "loss_second_moment", "model.diffusion.time_sampling",
             "loss_second_moment counts losses by step: set model.diffusion.steps, for instance to 2000")
        need(0 <= self.dropout < 1, "model.dropout", f"must lie in [0, 1), not {self.dropout}")
        if self.network == "bert":
            self._validate_bert(need)
        else:
            need(self.dropout == 0, "model.dropout", "only applies to model.network = bert")
        if d.log_snr_range != "auto":
            need(isinstance(d.log_snr_range, list) and len(d.log_snr_range) == 2
                 and d.log_snr_range[0] < d.log_snr_range[1], "model.diffusion.log_snr_range",
                 f"must be auto or [noisiest, cleanest] with noisiest < cleanest, not {d.log_snr_range}")
            need(d.schedule == "log_snr", "model.diffusion.log_snr_range",
                 f"only applies to schedule = log_snr, not {d.schedule}")

    def _validate_bert(self, need: Callable[[bool, str, str], None]) -> None:
        """What DiffuSeq's network has no place for."""
        d = self.diffusion
        need(self.max_positions > 0, "model.max_positions", f"must be positive, not {self.max_positions}")
        for key, value, only in (
                ("model.input", self.input, "noisy"), ("model.bayes_skip", self.bayes_skip, False),
                ("model.local_mixing", self.local_mixing, 0), ("model.moe.experts", self.moe.experts, 1),
                ("model.moe.gated", self.moe.gated, False), ("model.moe.shared_ffn", self.moe.shared_ffn, 0),
                ("model.moe.jitter", self.moe.jitter, 0), ("model.moe.balance_weight", self.moe.balance_weight, 0),
                ("model.moe.z_weight", self.moe.z_weight, 0), ("model.diffusion.loss", d.loss, "mse"),
                ("model.diffusion.conditioning", d.conditioning, "joint"),
                ("model.diffusion.self_conditioning", d.self_conditioning, 0)):
            need(value == only, key, f"is {value}, but model.network = bert only knows {only}: set it so, or choose "
                 "model.network = sparse")
        need(d.steps > 0, "model.diffusion.steps",
             "model.network = bert is told the time by the number of the step: set this, for instance to 2000")
