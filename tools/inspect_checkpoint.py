"""Say what is in a checkpoint, whether it is whole and healthy, and how two of them differ.

    python tools/inspect_checkpoint.py runs/mine                                   # its newest whole checkpoint
    python tools/inspect_checkpoint.py runs/mine/checkpoints/step-00001000 --tensors
    python tools/inspect_checkpoint.py one_model --diff another_model

Reads runs, checkpoints, universal checkpoints, exported models and the original DiffuSeq's. Every file of a checkpoint
is held against its checksum, and every tensor is looked through for NaN and infinity. Only open checkpoints from people
you trust: PyTorch's files can run programs.

Exit codes: 0 whole and healthy (with --diff: equal); 82 some tensor has NaN or infinity; 84 damaged, not whole or no
checkpoint; 3 with --diff: they differ; 80 the command line cannot work; 1 a defect of this program.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse
import os

from tools.command import run
from trainer.errors import NumericalError
from trainer.parser import Parser

_DIFFERENT = 3


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, metavar="CHECKPOINT")
    parser.add_argument("--tensors", action="store_true", help="a line for every tensor: shape and root mean square")
    parser.add_argument("--diff", type=Path, metavar="OTHER", help="compare with another one, tensor by tensor")
    return parser


def main() -> None:
    args = build_parser().parse_args()
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # nothing here needs a GPU
    from tools.conversion.convert import open_source  # after the help, which need not wait for DeepSpeed
    from tools.conversion.inspect import differences, health, summary

    source = open_source(args.path)
    if args.diff is None:
        print(summary(args.path, source))
        figures, sick = health(source, args.tensors)
        print(figures)
        if sick:
            raise NumericalError(f"NaN or infinity in {len(sick)} tensors: {', '.join(sick[:5])}")
        return
    found = differences(source, open_source(args.diff))
    print("\n".join(found) or f"{args.path} and {args.diff} hold the same tensors")
    if found:
        sys.exit(_DIFFERENT)


if __name__ == "__main__":
    run(main)
