"""Prepare a corpus for training: tokenized shards and a vocabulary in one folder, which data.* can name.

    python tools/prepare_data.py --train my/articles/*.jsonl.gz --valid_percent 2 --test_percent 2 --out prepared
    python tools/prepare_data.py --train papers.parquet --src body --trg conclusion --vocab_size 16384 --out prepared
    python tools/prepare_data.py --recipe arxiv --duplicates near --out prepared
    deepspeed trainer/run.py --ds_config ds_configs/zero2.json --config prepared/data.toml

Training tokenizes by itself what data.train names. This tool is for corpora that are large, used by many runs or by
nodes that share a disk, or that hold duplicates; and it says how long the documents are before anything is trained.

What it does, in order: finds duplicates and divides the documents among the splits; trains a sentencepiece vocabulary
on the training documents (or takes --vocabulary); tokenizes; counts. The result depends on the documents and the
options, not on the number of processes. Interrupted, it goes on where it was when started again with the same options.

    OUT/train, valid, test    tokenized shards             OUT/vocabulary.model    the vocabulary
    OUT/statistics.json       lengths, what was left out   OUT/lengths.svg         the lengths, drawn
    OUT/data.toml             the lines for a run's configuration

A document's copies are found by the text without case and spacing; one of them stays: in test rather than in valid
rather than in train. Documents with the same source never go to different splits when splits are taken by percentage.

On several machines:  mpirun -n 33 python tools/prepare_data.py ...   (mpi4py; the first rank reads and writes, the
others tokenize; the vocabulary and OUT must lie on a disk that all share)

Exit codes: 0 done; 80 the command line asks for something that cannot work; 81 documents are missing or faulty; 1 a
defect of this program.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse
import json

from model.errors import ConfigError
from tools.command import run
from tools.preparing.folder import STATISTICS, fill, is_finished, made_with, settings
from tools.preparing.lengths import table
from tools.preparing.recipes import RECIPES
from tools.preparing.selection import Selection
from trainer.data.config import DataConfig
from trainer.data.corpus import find_corpus
from trainer.data.files import build_once
from trainer.data.prepare import CONFIGURATION, SPLITS
from trainer.data.workers import Workers, local_workers, mpi_workers, under_mpi
from trainer.parser import Parser

_DEFAULTS = DataConfig()


def build_parser() -> argparse.ArgumentParser:
    recipes = "\n".join(f"  {name:<13} {recipe.mapping}\n" + "".join(
        f"  {'':<13} {split}: {hub}\n" for split, hub in recipe.hub.items()) for name, recipe in RECIPES.items())
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                    epilog=f"recipes:\n{recipes}")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the folder to make")
    what = parser.add_argument_group("documents: JSON lines or Parquet (files, folders, globs), or one hub name")
    for split in SPLITS:
        what.add_argument(f"--{split}", nargs="+", default=[], metavar="WHERE")
    what.add_argument("--recipe", choices=RECIPES, help="a known data set (below), from the hub or the files given")
    what.add_argument("--valid_percent", type=float, default=0.0, metavar="P",
                      help="take P %% of the training documents for the valid split")
    what.add_argument("--test_percent", type=float, default=0.0, metavar="P", help="the same for the test split")
    how = parser.add_argument_group("fields of a record")
    how.add_argument("--src", default=_DEFAULTS.source_field, help="the text that is given (default: %(default)s)")
    how.add_argument("--trg", default=_DEFAULTS.target_field, help="the text to generate (default: %(default)s)")
    how.add_argument("--text", default=_DEFAULTS.text_field, help="the only text of a document (default: %(default)s)")
    same = parser.add_argument_group("duplicates")
    same.add_argument("--duplicates", choices=("keep", "exact", "near"), default="exact",
                      help="which are left out; near needs the package datasketch (default: exact)")
    same.add_argument("--similarity", type=float, default=0.8, metavar="J", help="share of common word 5-grams "
                      "(Jaccard) from which documents are near duplicates (default: 0.8)")
    words = parser.add_argument_group("vocabulary and limits")
    words.add_argument("--vocabulary", default="train", metavar="FILE",
                       help="a sentencepiece model (default: one is trained)")
    words.add_argument("--vocab_size", type=int, default=_DEFAULTS.vocab_size, metavar="N",
                       help="pieces to train (default: %(default)s)")
    words.add_argument("--max_source_tokens", type=int, default=_DEFAULTS.max_source_tokens, metavar="N",
                       help="limit of training, to count what it cuts; nothing is cut here (default: %(default)s)")
    words.add_argument("--max_target_tokens", type=int, default=_DEFAULTS.max_target_tokens, metavar="N",
                       help="(default: %(default)s)")
    parser.add_argument("--workers", type=int, default=0, metavar="N", help="processes (default: one for each core)")
    parser.add_argument("--cache_dir", default=_DEFAULTS.cache_dir, metavar="DIR", help="for data sets from the hub "
                        "(default: %(default)s)")
    return parser


def main() -> None:
    if under_mpi():
        with mpi_workers() as workers:
            if workers is not None:
                prepare(build_parser().parse_args(), workers)
        return
    args = build_parser().parse_args()
    if args.workers < 0:
        raise ConfigError("--workers", f"must be 0 (one for each core) or positive, not {args.workers}")
    with local_workers(args.workers) as workers:
        prepare(args, workers)


def config_of(args: argparse.Namespace) -> DataConfig:
    """The command line as a configuration of training."""
    given = {split: getattr(args, split) for split in SPLITS}
    if args.recipe and not any(given.values()):
        given = {split: [name] for split, name in RECIPES[args.recipe].hub.items()}
    if not given.get("train"):
        raise ConfigError("--train", "is missing: give files, folders, globs or a hub name"
                          + (f" ({args.recipe} is not on the hub)" if args.recipe else ""))
    where = {split: parts[0] if len(parts) == 1 else parts for split, parts in given.items()}
    config = DataConfig(train=where["train"], valid=where.get("valid", ""), test=where.get("test", ""),
                        source_field=args.src, target_field=args.trg, text_field=args.text, vocabulary=args.vocabulary,
                        vocab_size=args.vocab_size, max_source_tokens=args.max_source_tokens,
                        max_target_tokens=args.max_target_tokens, cache_dir=args.cache_dir, workers=args.workers,
                        row_tokens=args.max_source_tokens + args.max_target_tokens)
    config.validate()
    return config


def selection_of(args: argparse.Namespace, config: DataConfig) -> Selection:
    """The rules of the command line, checked."""
    shares = {"valid": args.valid_percent / 100, "test": args.test_percent / 100}
    for split, share in shares.items():
        if share and getattr(config, split):
            raise ConfigError(f"--{split}_percent", f"and --{split} exclude each other: the split comes from one place")
    selection = Selection(args.duplicates, args.similarity, (shares["valid"], shares["test"]))
    selection.check()
    return selection


def prepare(args: argparse.Namespace, workers: Workers) -> None:
    """Makes the folder, or finds it finished. Raises ConfigError and DataError."""
    config = config_of(args)
    selection = selection_of(args, config)
    reader = RECIPES[args.recipe] if args.recipe else None
    corpora = {split: find_corpus(corpus, split, config.cache_dir, f"--{split}", reader)
               for split in SPLITS for corpus in config.corpora(split).values()}
    final = args.out.absolute()
    for folder in (final, final.with_name(f"{final.name}.partial")):
        if folder.exists() and made_with(folder) != settings(corpora, selection, config):
            raise ConfigError("--out", f"{folder} was not made from these documents with these options: remove it, or "
                              "choose another folder")
    try:
        build_once(final, is_finished, lambda folder: fill(folder, final, corpora, selection, config, workers),
                   resumable=True)
    except OSError as error:  # documents that cannot be read are DataErrors
        raise ConfigError("--out", f"{args.out} cannot be written: {error.strerror or error}") from error
    facts = json.loads((final / STATISTICS).read_text())
    print(f"left out: {facts['exact_duplicates']:,} exact and {facts['near_duplicates']:,} near duplicates")
    print(table(facts["splits"], config))
    print(f"in {args.out}; for training, give --config {args.out / CONFIGURATION} or take over its lines:")
    print((final / CONFIGURATION).read_text(), end="")


if __name__ == "__main__":
    run(main)
