"""Mixture of experts against a dense gated feed-forward of the same active FLOPs, forward and backward; then what
ranks that share the experts among them send each other.

    python benchmarks/moe.py

On one CPU thread, fp32, in one process, the contenders taking turns so that the machine's mood meets all of
them. The layer's time includes router, sorting, gathering, and both auxiliary losses. Times are medians of CPU
time. The allocator is told to keep freed memory, as
the trainer tells it: otherwise both sides mostly measure page faults.

What is sent is counted in real exchanges between processes of this machine, for one layer, forward and backward, a
mean over ranks; the least would be sent if a token with several experts on one rank went there once.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F

from benchmarks.report import Report, parser
from benchmarks.timing import take_turns
from model.allocator import keep_freed_memory
from model.config import MoEConfig
from model.moe.backends import choose_backend
from model.moe.layer import MoELayer
from model.moe.parallel import ExpertGroup, ShardedExperts, rows_to_other_ranks

CASES = [  # tokens, width, ffn, top-k, experts
    (4096, 512, 1024, 2, (8, 32)),
    (4096, 512, 1024, 1, (8, 32)),
    (1500, 192, 256, 2, (4, 8)),
    (1500, 192, 384, 2, (4, 8)),
]
EXCHANGES = [  # tokens of a rank, width, ffn, top-k, experts, ranks
    (1024, 256, 256, 2, 8, 2),
    (1024, 256, 256, 2, 8, 4),
]


def dense_step(tokens: int, width: int, ffn: int) -> Callable[[], object]:
    """One forward and backward of silu(x w1) * (x w3) w2."""
    x = torch.randn(tokens, width, requires_grad=True)
    w1, w2, w3 = ((torch.randn(ffn, width) * width ** -0.5).requires_grad_() for _ in range(3))
    grad = torch.randn(tokens, width)
    return lambda: torch.autograd.grad((F.silu(x @ w1.t()) * (x @ w3.t())) @ w2, (x, w1, w2, w3), grad)


def moe_step(tokens: int, width: int, config: MoEConfig) -> Callable[[], object]:
    """One forward and backward of the layer and its losses, for tokens of four packed rows."""
    layer = MoELayer(width, config)
    layer.init_weights(seed=0, layer_index=0)
    x = torch.randn(tokens, width, requires_grad=True)
    row = torch.arange(tokens) * 4 // tokens
    grads = [torch.randn(tokens, width), torch.ones(()), torch.ones(())]

    def step() -> object:
        y, aux = layer(x, row, 4)
        return torch.autograd.grad([y, aux.balance_sum, aux.z_sum], [x, *layer.parameters()], grads)
    return step


def exchange(rank: int, tokens: int, width: int, ffn: int, top_k: int, experts: int, ranks: int, folder: str) -> None:
    """One rank of one layer with its experts divided; the first writes down the megabytes sent, and the least."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    group = ExpertGroup(ranks, rank)
    group.process_group = torch.distributed.group.WORLD
    layer = MoELayer(width, MoEConfig(experts=experts, top_k=top_k, ffn=ffn))
    layer.experts = ShardedExperts(experts, width, ffn, group)
    layer.init_weights(seed=0, layer_index=0)
    torch.manual_seed(rank)
    x = torch.randn(tokens, width, requires_grad=True)
    y, aux = layer(x, torch.zeros(tokens, dtype=torch.int64), 1)
    torch.autograd.grad(y.sum(), [x, *layer.parameters()])
    least, sent = rows_to_other_ranks(aux.expert_index_Tk, experts, group).tolist()
    total = torch.tensor([group.sent_bytes, group.sent_bytes * least / sent]) / ranks / 1e6
    torch.distributed.all_reduce(total)
    if rank == 0:
        torch.save(total, f"{folder}/sent")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def exchanged(case: tuple[int, ...]) -> list[float]:
    """Megabytes that a rank sends, and the least."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(exchange, (*case, folder), nprocs=case[-1])
        return torch.load(f"{folder}/sent").tolist()


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--backend", default="auto")
    options.add_argument("--repeats", type=int, default=7)
    options.add_argument("--most_tokens", type=int, default=4096, help="leave out shapes with more (default: 4096)")
    arguments = options.parse_args()
    keep_freed_memory()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    report = Report("moe", __doc__)
    rows = []
    for tokens, width, ffn, top_k, experts in CASES:
        if tokens > arguments.most_tokens:
            continue
        configs = {e: MoEConfig(experts=e, top_k=top_k, ffn=ffn, backend=arguments.backend) for e in experts}
        backend, _ = choose_backend(arguments.backend, "cpu", torch.float32, width, ffn)
        times = take_turns({"dense": dense_step(tokens, width, top_k * ffn)}
                           | {str(e): moe_step(tokens, width, config) for e, config in configs.items()},
                           arguments.repeats)
        for e in experts:
            report.row(f"{tokens}.{width}.{ffn}.{top_k}.{e}", f"{e} experts, top-{top_k}, {tokens:,} tokens, {width} "
                       f"wide, {ffn} hidden: speed, of the dense one's", times.ratio("dense", str(e)))
            rows.append([f"{tokens:,}", f"{width}", f"{ffn}", f"{top_k}", f"{e}", backend,
                         *(f"{1e3 * times.seconds(name).value:.1f} ms" for name in ("dense", str(e)))])
    report.table("Forward and backward", ["tokens", "width", "ffn", "top-k", "experts", "backend", "dense", "experts'"],
                 rows)
    sent = [[*map(str, case), *(f"{megabytes:.2f} MB" for megabytes in exchanged(case))] for case in EXCHANGES]
    report.table("What a rank sends", ["tokens", "width", "ffn", "top-k", "experts", "ranks", "sent", "least"], sent)
    report.write(arguments.json)


if __name__ == "__main__":
    main()
