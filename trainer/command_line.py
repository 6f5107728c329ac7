"""The command line of `trainer/run.py`."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from model.errors import ConfigError
from trainer.config import RunConfig, describe
from trainer.config_load import load
from trainer.data.config import DataConfig
from trainer.ds_config import DSConfig, load_ds_config
from trainer.errors import ExitCode
from trainer.parser import Parser
from trainer.presets import DEFAULT_PRESET, PRESETS, RECIPES

_EXAMPLES = """\
examples:
  two processes on a CPU, the demonstration's size:
    deepspeed --num_gpus 2 trainer/run.py --ds_config ds_configs/cpu_zero2.json --preset tiny
  what would be trained, without training it:
    python trainer/run.py --ds_config ds_configs/zero2.json --preset base --dry_run
  your own documents, and a longer run:
    deepspeed trainer/run.py --ds_config ds_configs/zero2.json --preset base \\
        --set data.train=my/train.jsonl.gz --set data.valid=my/valid.jsonl.gz --set train.steps=100000
"""


class _RunParser(Parser):
    def error(self, message: str) -> NoReturn:
        option = message.partition("unrecognized arguments: --")[2].partition(" ")[0].partition("=")[0]
        keys = [key.name for key in describe() if option and option in (key.name, key.name.rpartition(".")[2])]
        super().error(f"{message}; did you mean --set {min(keys, key=len)}=…?" if keys else message)


class _HelpConfig(argparse.Action):
    """Prints every key of the run configuration and ends the program."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        for key in describe():
            print(f"{key.name}: {key.type} = {key.default!r}")
            if key.doc:
                print(textwrap.fill(key.doc, 100, initial_indent="    ", subsequent_indent="    "))
        print("\nThe values are those before any preset and recipe; --dry_run prints what a run would use.")
        parser.exit(ExitCode.FINISHED)


def build_parser() -> argparse.ArgumentParser:
    """The parser; it raises ConfigError for a command line that it refuses."""
    parser = _RunParser(prog="trainer/run.py", epilog=_EXAMPLES, allow_abbrev=False,
                     description="Train a diffusion language model for long documents.",
                     formatter_class=argparse.RawDescriptionHelpFormatter)

    config = parser.add_argument_group("configuration: preset < recipe < --config < --set")
    config.add_argument("--ds_config", required=True, type=Path, metavar="FILE",
                        help="DeepSpeed JSON: micro-batch, accumulation, ZeRO, precision, clipping, offload")
    config.add_argument("--preset", default="", choices=PRESETS,
                        help=f"size (default: as the file says, else {DEFAULT_PRESET})")
    config.add_argument("--recipe", default="", choices=RECIPES,
                        help="mechanisms (default: as the file says, else the preset's own)")
    config.add_argument("--config", type=Path, metavar="FILE", help="run configuration, .toml or .json")
    config.add_argument("--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE",
                        help="one value, such as train.steps=100; may be repeated")
    config.add_argument("--help_config", action=_HelpConfig, nargs=0, help="print every key with its meaning")

    run = parser.add_argument_group("run")
    run.add_argument("--run_dir", type=Path, metavar="DIR",
                     help="folder for everything that the run writes (default: runs/PRESET-RECIPE)")
    run.add_argument("--resume", default="auto", metavar="auto|none|CHECKPOINT",
                     help="auto: the newest whole checkpoint in the run folder, if there is one; none: start "
                     "anew; or a checkpoint's folder, to begin with: the same command again goes on with what the "
                     "run has saved since (default: auto)")
    run.add_argument("--init_from", type=Path, metavar="FOLDER",
                     help="start from the weights of this finished run or exported model, at step 0 with a "
                     "fresh optimizer; not read where there is a checkpoint to resume from")
    run.add_argument("--dry_run", action="store_true",
                     help="print the resolved configuration, sizes, FLOPs, reach, kernels and memory per rank, then "
                     "stop; needs no GPU and opens no document. WORLD_SIZE=N before the command: for N ranks")
    run.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # passed by the deepspeed launcher
    return parser


def _not_another_corpus(data: DataConfig) -> None:
    """Evaluation on the bundled documents would say nothing of a model that is trained on others."""
    bundled = DataConfig()
    for split in ("valid", "test"):
        if data.train != bundled.train and getattr(data, split) == getattr(bundled, split):
            raise ConfigError(f"data.{split}", "still names the bundled documents, but data.train names others: name "
                              f"yours, or set data.{split}= for none")


def parse(argv: Sequence[str] | None = None) -> tuple[argparse.Namespace, RunConfig, DSConfig]:
    """The arguments with `run_dir` filled in, and both configurations, checked; ConfigError if they fail."""
    args = build_parser().parse_args(argv)
    config = load(args.preset, args.recipe, args.config, args.overrides)
    _not_another_corpus(config.data)
    if args.run_dir is None:
        args.run_dir = Path("runs") / f"{config.preset}-{config.recipe}"
    return args, config, load_ds_config(args.ds_config)
