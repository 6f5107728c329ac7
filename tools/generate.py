"""Generate a target for every source of a data set with a trained model.

    python tools/generate.py runs/tiny-long_doc --split test --limit 40
    python tools/generate.py runs/tiny-long_doc --input my_documents.jsonl --output my_summaries.jsonl

Writes JSON lines: document, text, ended, and the source and reference that the data set has. Interrupted, it goes on
where it stopped. The noise of a text depends on --seed, its document's number and which candidate it is.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse
import dataclasses
import json

import torch
from tqdm import tqdm

from model.allocator import keep_freed_memory
from model.errors import ConfigError
from model.sampling import GRIDS, SOLVERS
from tools.command import run
from trainer.config import RunConfig, SampleConfig
from trainer.data.evaluation import evaluation_samples
from trainer.data.prepare import PreparedData, prepare
from trainer.errors import DataError
from trainer.export import model_folder, read_model
from trainer.generate import emergence, generate
from trainer.parser import Parser


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a finished run's folder, or an exported model's")
    what = parser.add_argument_group("what to generate for")
    what.add_argument("--split", choices=("test", "valid"), default="test", help="of the run's data (default: test)")
    what.add_argument("--input", help="documents instead of a split: file, folder, glob or hub name")
    what.add_argument("--limit", type=int, default=0, metavar="N",
                      help="only N documents, spread evenly over the data set (default: all)")
    what.add_argument("--output", type=Path, help="JSON lines (default: generations/SPLIT.jsonl in the run's folder)")
    what.add_argument("--trace", action="store_true",
                      help="also write trace.json beside the output: the first document's text after every step")
    how = parser.add_argument_group("how (default: as the run's configuration says)")
    how.add_argument("--solver", choices=SOLVERS)
    how.add_argument("--steps", type=int, help="noise levels that are visited")
    how.add_argument("--grid", choices=GRIDS, help="where those levels lie: evenly in this")
    how.add_argument("--temperature", type=float, help="below 1 sharpens each prediction")
    how.add_argument("--guidance", type=float, help="scale of classifier-free guidance; 1 is none")
    how.add_argument("--candidates", type=int, metavar="N",
                     help="of N texts for each source, the one that minimum Bayes risk chooses")
    how.add_argument("--clamp", action=argparse.BooleanOptionalAction, default=None,
                     help="round each prediction to its nearest token")
    how.add_argument("--seed", type=int)
    how.add_argument("--batch", type=int, default=8, metavar="N", help="documents at a time (default: 8)")
    how.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser


def main() -> None:
    args = build_parser().parse_args()
    keep_freed_memory()
    folder = model_folder(args.model)
    model, vocabulary, trained_as = read_model(folder, args.device)
    how = chosen_sampling(trained_as, args)
    settings = how.settings()
    data = open_documents(trained_as, vocabulary.path, args)
    output = args.output or args.model / "generations" / f"{args.split}.jsonl"
    samples = data.samples("test", draws=1)
    chosen = evaluation_samples(len(samples), args.limit).tolist()
    done = resume(output, {"model": str(folder.absolute()), "settings": dataclasses.asdict(settings),
                           "candidates": how.candidates, "limit": args.limit, "input": args.input or args.split})
    cache = data.caches["test"]
    left = [(number, samples.source(number)) for number in chosen if number not in done]
    with output.open("a") as file:
        records = generate(model, vocabulary, left, samples.canvas_tokens, settings, device=torch.device(args.device),
                           candidates=how.candidates, documents_per_batch=args.batch)
        for record in tqdm(records, desc="generating", total=len(chosen), initial=len(done), unit="document"):
            document = samples.document_S[record["document"]]
            record["source"], record["reference"] = vocabulary.decode([cache.source(document), cache.target(document)])
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
            file.flush()
    if args.trace:
        first = (chosen[0], samples.source(chosen[0]))
        record = emergence(model, vocabulary, first, samples.canvas_tokens, settings, device=torch.device(args.device))
        output.with_name("trace.json").write_text(json.dumps(record, ensure_ascii=False, indent=1) + "\n")
    print(f"{len(chosen)} texts in {output}")


def chosen_sampling(config: RunConfig, args: argparse.Namespace) -> SampleConfig:
    """The run's way of sampling with that of the command line in its place; ConfigError where it cannot be."""
    given = {field.name: getattr(args, field.name, None) for field in dataclasses.fields(SampleConfig)}
    chosen = dataclasses.replace(config.sample, **{name: value for name, value in given.items() if value is not None})
    dataclasses.replace(config, sample=chosen).validate()
    return chosen


def open_documents(config: RunConfig, vocabulary: Path, args: argparse.Namespace) -> PreparedData:
    """The documents to generate for, as the split `test`."""
    where = args.input or getattr(config.data, args.split)
    if not where:
        raise DataError(f"the run has no data.{args.split}: give --input")
    data = dataclasses.replace(config.data, test=where, vocabulary=str(vocabulary))
    return prepare(data, splits=("test",), progress=True)


def resume(output: Path, facts: dict) -> set[int]:
    """Documents that `output` holds already; its half-written last line is dropped.

    What the file was made with is kept beside it, so that two ways of generating never share a file.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    made_with = output.with_suffix(".settings.json")
    lines = output.read_bytes().splitlines(keepends=True) if output.exists() else []
    if lines and (not made_with.exists() or json.loads(made_with.read_text()) != facts):
        raise ConfigError("--output", f"{output} was made with another model or other settings: remove it, or choose "
                          "another file")
    made_with.write_text(json.dumps(facts, indent=1) + "\n")
    if lines and not lines[-1].endswith(b"\n"):
        output.write_bytes(b"".join(lines := lines[:-1]))
    return {json.loads(line)["document"] for line in lines}


if __name__ == "__main__":
    run(main)
