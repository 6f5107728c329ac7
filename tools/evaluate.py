"""Score generated texts beside trivial baselines: a copy of the source, its first words, and an extractive oracle.

    python tools/evaluate.py runs/tiny/generations/test.jsonl
    python tools/evaluate.py runs/a/generations/test.jsonl runs/b/generations/test.jsonl   # side by side
    python tools/evaluate.py answers.jsonl --task answers                                  # with exact match and F1

Reads JSON lines with `text`, `source` and `reference` (a string, or a list where several are right), as
tools/generate.py writes them; prints a table and keeps it beside each file as .scores.md and .scores.json. Several
files must be about the same documents; the differences from the first are then printed with their intervals.

Exit codes: 0 scored; 80 the command line asks for something that cannot work; 81 a file is missing or faulty; 1 a
defect of this program.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse
import json

from tqdm import tqdm

from model.errors import ConfigError
from tools.command import run, writing
from tools.scoring.baselines import baselines, median_words
from tools.scoring.bootstrap import RESAMPLES, difference
from tools.scoring.columns import COLUMNS
from tools.scoring.embeddings import Encoder
from tools.scoring.systems import TASKS, Scores, score, to_json, to_markdown
from trainer.errors import DataError
from trainer.parser import Parser

_FIELDS = ("text", "source", "reference")


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("generations", type=Path, nargs="+", help="JSON lines with text, source and reference")
    parser.add_argument("--task", choices=TASKS, default="text", help="answers: also exact match and F1; labels: also "
                        "accuracy; both without case, punctuation and articles (default: text)")
    parser.add_argument("--lead_words", type=int, default=0, metavar="N",
                        help="length of the first-words baseline (default: the references' median)")
    parser.add_argument("--embedding_model", type=Path, metavar="DIR", help="a text encoder on disk, as Hugging Face "
                        "keeps them: adds the cosine of output and reference")
    parser.add_argument("--resamples", type=int, default=RESAMPLES, metavar="N",
                        help=f"bootstrap resamples behind the 95 %% intervals (default: {RESAMPLES})")
    return parser


def read(path: Path) -> list[dict]:
    """The records of a file, references as lists; DataError names the line that is none."""
    records = []
    try:
        lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")  # not at U+2028, which texts may hold
    except IsADirectoryError:
        raise DataError(f"{path} is a folder: give a file of texts, such as {path}/generations/test.jsonl") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    for number, line in enumerate(lines, 1):
        try:
            record = {field: json.loads(line)[field] for field in _FIELDS}
        except (json.JSONDecodeError, TypeError):
            raise DataError(f"{path}:{number}: needs a JSON object with {', '.join(_FIELDS)}") from None
        except KeyError as error:
            raise DataError(f"{path}:{number}: has no {error}: needs {', '.join(_FIELDS)}, as tools/generate.py "
                            "writes them") from None
        if isinstance(record["reference"], str):
            record["reference"] = [record["reference"]]
        if not isinstance(record["reference"], list) or not all(
                isinstance(text, str) for text in (record["text"], record["source"], *record["reference"])):
            raise DataError(f"{path}:{number}: text, source and reference must be strings, or reference a list of some")
        if not record["reference"]:
            raise DataError(f"{path}:{number}: has an empty list of references: give one at least")
        records.append(record)
    if not records:
        raise DataError(f"{path} holds no texts")
    return records


def read_all(paths: list[Path]) -> dict[Path, list[dict]]:
    """The records of all files; DataError where they are not about the same documents."""
    files = {path: read(path) for path in paths}
    first = files[paths[0]]
    for path, records in files.items():
        if [record["reference"] for record in records] != [record["reference"] for record in first]:
            raise DataError(f"{path} has other references than {paths[0]}: generate both for the same documents, in "
                            "the same order")
    return files


def differences(systems: dict[str, Scores], resamples: int) -> str:
    """Each system's lead over the first one, as a Markdown table."""
    (first, base), *others = systems.items()
    names = [name for name in COLUMNS if name in base.by_document]
    rows = [(f"against {first}", *(COLUMNS[name] for name in names)), ("---", *["---:"] * len(names))]
    for system, each in others:
        found = [difference(each.by_document[name], base.by_document[name], resamples) for name in names]
        rows.append((system, *(f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]" for mean, low, high in found)))
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def main() -> None:
    args = build_parser().parse_args()
    for name, least in (("resamples", 1), ("lead_words", 0)):
        if getattr(args, name) < least:
            raise ConfigError(f"--{name}", f"must be at least {least}, not {getattr(args, name)}")
    files = read_all(args.generations)
    encoder = Encoder(args.embedding_model) if args.embedding_model else None
    records = files[args.generations[0]]
    sources, references = [each["source"] for each in records], [each["reference"] for each in records]
    words = args.lead_words or median_words([alternatives[0] for alternatives in references])
    texts = {str(path): [each["text"] for each in found] for path, found in files.items()}
    texts |= baselines(sources, references, words)
    scores = {name: score(each, references, task=args.task, encoder=encoder, resamples=args.resamples)
              for name, each in tqdm(texts.items(), desc="scoring", unit="system", leave=False)}
    trivial = {name: found for name, found in scores.items() if name not in map(str, files)}
    by_file = {path: {"model": scores[str(path)], **trivial} for path in files}
    if len(files) == 1:
        print(to_markdown(by_file[args.generations[0]]))
    else:
        print(to_markdown(scores))
        print(differences({name: scores[name] for name in map(str, files)}, args.resamples))
    for path, own in by_file.items():
        for ending, text in ((".scores.md", to_markdown(own)), (".scores.json", to_json(own))):
            with writing("generations", path.with_suffix(ending)):
                path.with_suffix(ending).write_text(text)


if __name__ == "__main__":
    run(main)
