"""Score generated texts beside trivial baselines: the source's first words and the greedy extractive oracle.

    python tools/evaluate.py runs/tiny-long_doc/generations/test.jsonl

Reads the JSON lines that tools/generate.py writes; prints a table and keeps it beside them as .scores.md and
.scores.json.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse
import json

from tools.command import run
from tools.scoring import baselines, median_words, score, to_json, to_markdown
from trainer.errors import DataError

_FIELDS = ("text", "source", "reference")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("generations", type=Path, help="JSON lines with text, source and reference")
    parser.add_argument("--lead_words", type=int, default=0, metavar="N",
                        help="length of the first-words baseline (default: the references' median)")
    return parser


def read(path: Path) -> list[dict]:
    """The records of a file; DataError names the line that is none."""
    records = []
    try:
        lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")  # not at U+2028, which texts may hold
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    for number, line in enumerate(lines, 1):
        try:
            records.append({field: json.loads(line)[field] for field in _FIELDS})
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise DataError(f"{path}:{number}: needs a JSON object with {', '.join(_FIELDS)} ({error!r})") from error
    if not records:
        raise DataError(f"{path} holds no texts")
    return records


def main() -> None:
    args = build_parser().parse_args()
    texts, sources, references = zip(*(record.values() for record in read(args.generations)), strict=True)
    systems = {"model": score(texts, references),
               **baselines(sources, references, args.lead_words or median_words(references))}
    table = to_markdown(systems)
    args.generations.with_suffix(".scores.md").write_text(table)
    args.generations.with_suffix(".scores.json").write_text(to_json(systems))
    print(table)


if __name__ == "__main__":
    run(main)
