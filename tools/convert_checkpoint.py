"""Convert a checkpoint: to a model, a Hugging Face folder, one file, another topology, DeepSpeed's layout; and back.

    python tools/convert_checkpoint.py runs/mine MODEL --format model            # what generate.py and --init_from read
    python tools/convert_checkpoint.py runs/mine FOLDER --format huggingface     # what transformers' AutoModel loads
    python tools/convert_checkpoint.py runs/mine one.safetensors --format safetensors --dtype bf16 --weights trained
    python tools/convert_checkpoint.py runs/mine/checkpoints/step-00001000 TO --format checkpoint \\
        --world 16 --expert_parallel_size 8 --zero_stage 2                       # then: trainer/run.py --resume TO ...
    python tools/convert_checkpoint.py runs/mine TO --format universal           # DeepSpeed's, with the average beside
    python tools/convert_checkpoint.py dense_model TO --format model --upcycle 8 --top_k 2
    python tools/convert_checkpoint.py diffuseq/ema_0.9999_050000.pt TO.safetensors --format safetensors

FROM is a run (its newest whole checkpoint), a checkpoint, a universal checkpoint, an exported model, a Hugging Face
folder that was made here, or a .pt file of the original DiffuSeq with its training_args.json. TO must not exist; it
appears whole or not at all. Every tensor of FROM is used exactly once and every tensor of TO made exactly once, or
nothing is written. Only open checkpoints from people you trust: PyTorch's files can run programs.

Exit codes: 0 converted; 80 the command line asks for something that cannot work; 84 FROM is damaged, not whole or no
checkpoint; 81 the vocabulary cannot be read; 1 a defect of this program.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse
import os

from model.errors import ConfigError
from tools.command import run
from trainer.parser import Parser

_OPTIONS = {
    "safetensors": ("dtype", "weights", "embeddings"),
    "model": ("dtype", "weights", "embeddings", "vocabulary", "upcycle", "top_k", "noise", "seed"),
    "huggingface": ("dtype", "weights", "embeddings", "vocabulary", "upcycle", "top_k", "noise", "seed", "shard_gb"),
    "checkpoint": ("world", "expert_parallel_size", "zero_stage"),
    "universal": (),
}
"""Which options go with which format."""


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, metavar="FROM")
    parser.add_argument("target", type=Path, metavar="TO")
    parser.add_argument("--format", choices=_OPTIONS, required=True,
                        help="safetensors: all weights in one file; model: a folder with configuration and vocabulary; "
                             "huggingface: the same with code, tokenizer and model card, for transformers; "
                             "checkpoint: a training state to resume from; universal: DeepSpeed's form of one "
                             "(for other tools; docs/conversion.md)")
    weights = parser.add_argument_group("safetensors, model and huggingface")
    weights.add_argument("--dtype", choices=("fp32", "bf16"), help="of the weights (default: fp32)")
    weights.add_argument("--weights", choices=("average", "trained"),
                         help="of a training state (default: average, if the run kept one)")
    weights.add_argument("--embeddings", choices=("live", "averaged"),
                         help="which of the original DiffuSeq's two tables (default: live, as it does itself)")
    weights.add_argument("--vocabulary", type=Path, metavar="FILE",
                         help="model, huggingface: sentencepiece model (default: the one that the run keeps)")
    weights.add_argument("--shard_gb", type=float, metavar="GB", help="huggingface: the most that a file of weights "
                         "holds; a larger tensor has one of its own (default: 5)")
    more = parser.add_argument_group("model, huggingface: from a dense one to a mixture of experts")
    more.add_argument("--upcycle", type=int, metavar="EXPERTS", help="copies of each feed-forward; the function is at "
                      "first the same")
    more.add_argument("--top_k", type=int, metavar="K", help="experts for each token (default: 2)")
    more.add_argument("--noise", type=float, metavar="X", help="make the copies differ by noise of X times the "
                      "weights' standard deviation (default: 0)")
    more.add_argument("--seed", type=int, help="of the routers and the noise (default: 0)")
    spread = parser.add_argument_group("checkpoint (default: as it is, or 1, 1 and 1 from a universal one)")
    spread.add_argument("--world", type=int, metavar="N", help="ranks")
    spread.add_argument("--expert_parallel_size", type=int, metavar="S", help="ranks that share the experts")
    spread.add_argument("--zero_stage", type=int, choices=(1, 2, 3), help="of ZeRO")
    return parser


def main() -> None:
    args = build_parser().parse_args()
    _check(args)
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # nothing here needs a GPU
    from tools.conversion.convert import convert  # after the help and the refusals, which need not wait for DeepSpeed
    print(convert(args))


def _check(args: argparse.Namespace) -> None:
    """Refuses options that the format has no use for."""
    for names in _OPTIONS.values():
        for name in names:
            if getattr(args, name) is not None and name not in _OPTIONS[args.format]:
                where = ", ".join(form for form, theirs in _OPTIONS.items() if name in theirs)
                raise ConfigError(f"--{name}", f"only applies to --format {where}")
    for name in ("top_k", "noise", "seed"):
        if getattr(args, name) is not None and args.upcycle is None:
            raise ConfigError(f"--{name}", "only applies to --upcycle")
    for name, least in (("world", 1), ("expert_parallel_size", 1), ("upcycle", 2), ("top_k", 1), ("noise", 0)):
        if getattr(args, name) is not None and getattr(args, name) < least:
            raise ConfigError(f"--{name}", f"must be at least {least}, not {getattr(args, name)}")
    if args.shard_gb is not None and args.shard_gb <= 0:
        raise ConfigError("--shard_gb", f"must be positive, not {args.shard_gb}")


if __name__ == "__main__":
    run(main)
