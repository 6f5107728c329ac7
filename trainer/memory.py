"""How much memory a rank needs: states by ZeRO's rules, activations from the shapes that backward keeps."""

from __future__ import annotations

from model.config import ModelConfig
from trainer.config import RunConfig, recomputed_layers
from trainer.ds_config import DSConfig

_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


def memory_per_rank(run: RunConfig, ds: DSConfig, world: int, parameters: int, experts: int,
                    share: float | None = None) -> dict[str, float]:
    """Part -> bytes on the device of each of `world` ranks; with CPU offload the optimizer's parts are the host's.

    experts: how many of the `parameters` are routed experts'. Of those a rank holds its share only, and ZeRO
    partitions that over the ranks with the same share: the partitions are as large as without expert parallelism.
    Activations are those of evenly used experts. share: of target tokens in a row, that of `target_share` if None.
    """
    size = _BYTES[ds.precision]
    shard = parameters / world
    held = parameters - experts + experts / run.train.expert_parallel_size
    where = " (host)" if ds.offload_optimizer else ""
    tokens = ds.micro_batch * run.data.row_tokens
    targets = tokens * (target_share(run) if share is None else share)
    return {
        "parameters": size * (shard if ds.zero_stage == 3 else held),
        "gradients": size * (held if ds.zero_stage == 1 else shard),
        f"fp32 copy{where}": 4 * shard,
        f"Adam moments{where}": 8 * shard,
        f"averaged weights{where}": 4 * shard if run.optim.ema_decay > 0 else 0,
        "activations": activation_bytes(run.model, tokens, targets, size,
                                        recomputed_layers(run.train.activation_checkpointing, run.model.layers)),
        "backward's own": working_bytes(run.model, tokens, targets, size,
                                        recomputed_layers(run.train.activation_checkpointing, run.model.layers)),
    }


def target_share(run: RunConfig) -> float:
    """Share of target tokens in rows of the longest documents."""
    data = run.data
    targets = data.draws_per_source * data.max_target_tokens
    source = min(data.row_tokens - targets, data.max_source_tokens or data.row_tokens)
    return targets / (targets + source)


def activation_bytes(model: ModelConfig, tokens: float, targets: float, size: int,
                     recomputed: frozenset[int] = frozenset()) -> float:
    """What a forward pass of `tokens` tokens, `targets` of them noised, keeps for its backward pass.

    size: bytes of an activation. recomputed: blocks under activation checkpointing, each of which keeps its input and,
    while it is computed again, its own activations.
    """
    width = model.width
    blocks = _block_bytes(model, tokens, targets, size)
    inputs = model.embed_dim * (2 if model.diffusion.self_conditioning > 0 else 1)
    if model.network == "sparse":
        stem = tokens * max(model.local_mixing, 1) * inputs * size
    else:
        stem = tokens * (inputs + 3 * width) * size
    kept, again = _kept_bytes(model, tokens, blocks, size, recomputed)
    # The posterior's softmax, and logits with their softmax; rounding keeps none.
    distributions = (targets if model.input == "bayes" else 0) + 2 * _predicted(model, targets)
    return sum(kept) + again + stem + distributions * _distribution_bytes(model)


def working_bytes(model: ModelConfig, tokens: float, targets: float, size: int,
                  recomputed: frozenset[int] = frozenset()) -> float:
    """The most that the backward pass holds besides gradients of parameters and all that `activation_bytes` counts:
    logits with their gradient, or gradients of one block's feed-forward, when later blocks are free."""
    blocks = _block_bytes(model, tokens, targets, size)
    kept, again = _kept_bytes(model, tokens, blocks, size, recomputed)
    passing = [tokens] * (model.layers - 1) + [_last_tokens(model, tokens, targets)]
    own = []
    for index, count in enumerate(passing):
        unused = sum(kept[index + 1:]) + again - (blocks[index] if index in recomputed else 0)
        own.append(count * (_experts_width(model) + 2 * model.width) * size - unused)
    return max(2 * _predicted(model, targets) * _distribution_bytes(model), *own)


def _kept_bytes(model: ModelConfig, tokens: float, blocks: list[float], size: int,
                recomputed: frozenset[int]) -> tuple[list[float], float]:
    """What each block keeps until it is its turn in the backward pass, under activation checkpointing its input; and
    the most that a block worked out again then keeps."""
    kept = [tokens * model.width * size if index in recomputed else block for index, block in enumerate(blocks)]
    return kept, max((blocks[index] for index in recomputed), default=0)


def _block_bytes(model: ModelConfig, tokens: float, targets: float, size: int) -> list[float]:
    """What each block keeps."""
    width = model.width
    if model.network == "bert":
        # q, k, v, attention's output, two norms' inputs and outputs, and the feed-forward before and after its GELU;
        # what was dropped, in a byte each.
        return [tokens * ((8 * width + 2 * model.moe.ffn) * size + (2 * width if model.dropout > 0 else 0))
                ] * model.layers
    # The first norm's input and output before and after modulation, k and v as projected, k after rotation.
    answering = 6 * width
    # q as projected and after rotation, attention's output, the second norm, then the experts.
    asking = 7 * width + _experts_width(model)
    last = tokens * answering + _last_tokens(model, tokens, targets) * asking
    return [*[tokens * (answering + asking) * size] * (model.layers - 1), last * size]


def _experts_width(model: ModelConfig) -> int:
    """Numbers of a token in a feed-forward: the experts' sorted inputs, hidden products and outputs."""
    moe = model.moe
    return moe.top_k * 2 * model.width + (2 if moe.gated else 1) * (moe.top_k * moe.ffn + moe.shared_ffn)


def _last_tokens(model: ModelConfig, tokens: float, targets: float) -> float:
    """Tokens that the last block works out."""
    return targets if model.last_block_of == "target" else tokens


def _predicted(model: ModelConfig, targets: float) -> float:
    """Tokens of which the loss holds a distribution over the vocabulary."""
    return targets if model.diffusion.loss == "cross_entropy" else 0


def _distribution_bytes(model: ModelConfig) -> int:
    """Of one token: in fp32."""
    return 4 * model.vocab_size
