"""Generate texts with a trained model: for documents, for a prompt, into gaps, or from nothing.

    python tools/generate.py runs/tiny --split test --limit 40
    python tools/generate.py my_model --input my_documents.jsonl --output my_summaries.jsonl --processes 8
    python tools/generate.py my_model --prompt "A document in one line." --temperature 0.5
    python tools/generate.py my_model --fill gapped.jsonl        # <gap:12> in a target stands for 12 tokens to write
    python tools/generate.py my_model --unconditional 10

The model is a finished run, an exported model or a Hugging Face folder. Writes JSON lines: document, text, ended, and
the source and reference that are known (with --fill: document, text, fills, source, gapped). Interrupted, it goes on
where it stopped when started again with the same options; texts that were made otherwise are left alone unless
--replace is given.

The noise of a text depends on --seed, its document's number and which candidate it is. Which other documents are
computed with it changes roundings, and so, rarely, a token; with --deterministic nothing does: texts are the same for
a seed whatever --batch and --processes, on the same kind of machine.

Exit codes: 0 done; 80 the command line or the model's configuration asks for something that cannot work; 81 documents
are missing or faulty; 83 out of memory; 84 there is no model, or it is damaged; 1 a defect of this program.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse
import dataclasses
import json
from contextlib import nullcontext
from itertools import islice

import torch
from tqdm import tqdm

from model.errors import ConfigError
from model.sampling import COMPAT, GRIDS, SOLVERS
from tools.command import run
from tools.generating.asked import Asked, Documents, Gapped, Nothing, Prompt
from tools.generating.identity import check as check_output
from tools.generating.identity import digest, resume
from tools.generating.writer import Writer, written
from trainer.config import RunConfig, SampleConfig
from trainer.data.config import DataConfig
from trainer.data.vocabulary import Vocabulary
from trainer.errors import CheckpointError, DataError
from trainer.export import inference_dtype, model_folder, read_description, weight_files
from trainer.parser import Parser

FIELDS = ("source_field", "target_field", "text_field")
"""Keys of `data`, and options, that name the fields of records."""


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a finished run's folder, an exported model's, or a Hugging Face one")
    what = parser.add_argument_group("what to generate for (default: --split test)").add_mutually_exclusive_group()
    what.add_argument("--split", choices=("test", "valid"), help="of the run's data")
    what.add_argument("--input", metavar="WHERE", help="documents: file (JSON lines, Parquet), folder, glob or hub "
                      "name, with the fields that the run was trained on (or "
                      "--source_field, ...); targets may be missing")
    what.add_argument("--prompt", metavar="TEXT", help="one source; prints the text, and keeps it with --output only")
    what.add_argument("--fill", metavar="WHERE", help="documents whose targets have gaps, such as <gap:12>")
    what.add_argument("--unconditional", type=int, metavar="N", help="N texts without source, of a model that was "
                      "trained with model.diffusion.source_dropout")
    more = parser.add_argument_group("of these")
    more.add_argument("--texts_only", action="store_true", help="with --unconditional: the model was trained on texts "
                      "that have no source")
    more.add_argument("--limit", type=int, default=0, metavar="N",
                      help="only N documents, spread evenly over the data set (default: all)")
    for name in FIELDS:
        more.add_argument(f"--{name}", metavar="NAME", help="in the records of --input and --fill (default: the one of "
                          f"all corpora in the run's data.train; where they differ, its data.{name})")
    more.add_argument("--output", type=Path, help="JSON lines (default: in the folder `generations` of the model's or "
                      "run's folder, by the split's or the input's name)")
    more.add_argument("--replace", action="store_true", help="remove texts in the output that another model, other "
                      "documents or other settings made (default: refuse)")
    more.add_argument("--trace", action="store_true",
                      help="also write trace.json beside the output: the first document's text after every step")
    more.add_argument("--cache_dir", metavar="DIR", help="for tokenized documents (default: the run's data.cache_dir)")
    how = parser.add_argument_group("how (default: as the run's configuration says)")
    how.add_argument("--solver", choices=(*SOLVERS, COMPAT))
    how.add_argument("--steps", type=int, help="noise levels that are visited")
    how.add_argument("--grid", choices=GRIDS, help="where those levels lie: evenly in this")
    how.add_argument("--temperature", type=float, help="below 1 sharpens each prediction, which must be "
                     "of tokens (model.diffusion.loss = cross_entropy)")
    how.add_argument("--end_temperature", type=float, help="the same for the chance that a text ends: below 1 texts "
                     "that the model is unsure of end early, others more to the point")
    how.add_argument("--guidance", type=float, help="scale of classifier-free guidance; 1 is none")
    how.add_argument("--candidates", type=int, metavar="N",
                     help="of N texts for each source, the one that minimum Bayes risk chooses")
    how.add_argument("--clamp", action=argparse.BooleanOptionalAction, default=None,
                     help="round each prediction to its nearest token")
    how.add_argument("--seed", type=int)
    where = parser.add_argument_group("where")
    where.add_argument("--batch", type=int, default=8, metavar="N", help="documents at a time (default: 8)")
    where.add_argument("--processes", type=int, default=1, metavar="N",
                       help="that share the documents, the cores and the GPUs (default: 1)")
    where.add_argument("--deterministic", action="store_true", help="one document at a time, on one thread of each "
                       "process, with kernels that always give the same bits: slower")
    where.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    where.add_argument("--dtype", choices=("auto", "bf16", "fp32"), default="auto",
                       help="of weights and activations (default: auto, bf16 on a GPU that computes in it, else fp32)")
    return parser


def main() -> None:
    args = build_parser().parse_args()
    check(args)
    folder = model_folder(args.model)
    config, vocabulary = read_description(folder)
    how = chosen_sampling(config, args)
    if args.trace and how.solver == COMPAT:
        raise ConfigError("--trace", f"does not apply to --solver {COMPAT}, which keeps no trace of its steps")
    args.dtype = inference_dtype(args.dtype, args.device)
    writer = Writer(folder, args.device, args.dtype, how.settings(), how.candidates, args.deterministic)
    output = args.output or (None if args.prompt is not None else default_output(args))
    known = facts(folder, how, args) if output else {}
    if output and not args.replace:
        check_output(output, known)  # before the documents are tokenized, which may take long
    asked = open_asked(config, vocabulary, args)
    done = resume(output, {**known, "documents": asked.digest}, replace=args.replace) if output else set()
    left = [number for number in asked.numbers if number not in done]
    tasks = (asked.task(number) for number in left)
    parts = iter(lambda: list(islice(tasks, 1 if args.deterministic else args.batch)), [])
    with (output.open("a") if output else nullcontext(sys.stdout)) as file, tqdm(
            desc="generating", total=len(asked.numbers), initial=len(done), unit="document",
            disable=output is None) as progress:
        for records in written(writer, parts, args.processes):
            for record in records:
                record |= asked.known(record["document"])
                print(json.dumps(record, ensure_ascii=False) if output else record["text"], file=file, flush=True)
                progress.update()
    if args.trace:
        record = writer.emergence(asked.task(asked.numbers[0]))
        output.with_name("trace.json").write_text(json.dumps(record, ensure_ascii=False, indent=1) + "\n")
    if output:
        print(f"{len(asked.numbers)} texts in {output}")


def check(args: argparse.Namespace) -> None:
    """Refuses options that do not go together, and numbers that mean nothing. Sets what is generated for by default."""
    if all(value is None for value in (args.split, args.input, args.prompt, args.fill, args.unconditional)):
        args.split = "test"
    for name in ("batch", "processes", "unconditional"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ConfigError(f"--{name}", f"must be at least 1, not {getattr(args, name)}")
    if args.limit < 0:
        raise ConfigError("--limit", f"must be 0 (all) or positive, not {args.limit}")
    if args.fill and args.candidates not in (None, 1):
        raise ConfigError("--candidates", "does not apply to --fill, which writes one text into each gap")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device", "is cuda, but PyTorch finds no such device here: leave it out")
    if args.trace and (args.fill or (args.prompt is not None and not args.output)):
        raise ConfigError("--trace", "does not apply to --fill, and with --prompt needs --output, beside which it lies")
    if args.texts_only and args.unconditional is None:
        raise ConfigError("--texts_only", "only applies to --unconditional")
    for name in FIELDS:
        if getattr(args, name) is not None and not (args.input or args.fill):
            raise ConfigError(f"--{name}", "only applies to documents of your own: --input and --fill")
    if args.limit and (args.prompt is not None or args.unconditional is not None):
        raise ConfigError("--limit", "only applies to documents: --split, --input and --fill")


def chosen_sampling(config: RunConfig, args: argparse.Namespace) -> SampleConfig:
    """The run's way of sampling with that of the command line in its place; ConfigError where it cannot be."""
    given = {field.name: getattr(args, field.name, None) for field in dataclasses.fields(SampleConfig)}
    chosen = dataclasses.replace(config.sample, **{name: value for name, value in given.items() if value is not None})
    if args.fill:
        chosen = dataclasses.replace(chosen, candidates=1)
    dataclasses.replace(config, sample=chosen).validate()
    return chosen


def open_asked(config: RunConfig, vocabulary: Vocabulary, args: argparse.Namespace) -> Asked:
    """What to generate for."""
    data = dataclasses.replace(config.data, vocabulary=str(vocabulary.path),
                               cache_dir=args.cache_dir or config.data.cache_dir,
                               **(asked_fields(config.data, args) if args.input or args.fill else {}))
    config = dataclasses.replace(config, data=data)
    if args.prompt is not None:
        return Prompt(config, vocabulary, args.prompt)
    if args.fill:
        return Gapped(config, vocabulary, args.fill, args.limit)
    if args.unconditional is not None:
        return Nothing(config, vocabulary, args.unconditional, args.texts_only)
    if args.input:
        config = dataclasses.replace(config, data=dataclasses.replace(data, test=args.input))
        return Documents(config, "test", args.limit, targets_needed=False)
    if not getattr(data, args.split):
        raise DataError(f"the run has no data.{args.split}: give --input")
    return Documents(config, args.split, args.limit, targets_needed=True)


def asked_fields(data: DataConfig, args: argparse.Namespace) -> dict[str, str]:
    """Names of the fields of documents that the command line names, by key of `data`: given there, or those of the
    training corpora, which may have them in tables of their own."""
    names = {}
    for name in FIELDS:
        trained = {getattr(corpus, name) for corpus in data.corpora("train").values()}
        names[name] = getattr(args, name) or (trained.pop() if len(trained) == 1 else getattr(data, name))
    return names


def facts(folder: Path, how: SampleConfig, args: argparse.Namespace) -> dict:
    """All that the texts depend on, apart from the documents, ready for JSON."""
    try:
        weights = digest(weight_files(folder))
    except OSError as error:
        raise CheckpointError(f"{folder}: its weights cannot be read: {error}") from error
    return {"model": str(folder.absolute()), "weights": weights, "settings": dataclasses.asdict(how.settings()),
            "candidates": how.candidates, "deterministic": args.deterministic, "dtype": args.dtype,
            "limit": args.limit, "asked": {name: getattr(args, name) for name in
                                            ("split", "input", "prompt", "fill", "unconditional", "texts_only")}}


def default_output(args: argparse.Namespace) -> Path:
    """In the run's or model's own folder."""
    name = args.split or "unconditional"
    if where := args.input or args.fill:
        name = Path(where).name.partition(".")[0].replace("*", "") or "input"
    return args.model / "generations" / f"{name}.jsonl"


if __name__ == "__main__":
    run(main)
