"""The documents of a grid's data sets: found, brought into the form that a run reads, and what is known about them."""

from __future__ import annotations

import json
import random
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from tools.ablating.grid import DataSet
from tools.command import writing
from tools.scoring import facts
from tools.scoring.baselines import baselines, median_words
from trainer.data import records
from trainer.data.evaluation import evaluation_samples
from trainer.errors import DataError

ROOT = Path(__file__).resolve().parents[2]
SPLITS = ("train", "valid", "test")
TEST = "documents.json"
"""Name of what `Test.read` reads."""


class Document(NamedTuple):
    """One line of a set, as a model is given it. asked: the facts that the source states, where the form is that."""

    source: str
    target: str
    asked: facts.Facts


@dataclass(frozen=True)
class Test:
    """What is written for: sources that differ, the references of each, their facts if they are such, and what trivial
    systems write, by name."""

    sources: list[str]
    references: list[list[str]]
    asked: list[facts.Facts]
    trivial: dict[str, list[str]]

    @classmethod
    def read(cls, folder: Path) -> Test:
        """What `prepare` wrote."""
        return cls(**json.loads((folder / TEST).read_text()))


def find(name: str, data: DataSet, root: Path | None) -> dict[str, Path]:
    """The file of each split; DataError says what is missing and where it can be had."""
    folder = data.folder or name
    places = [place / folder for place in (root, ROOT / "data") if place is not None]
    for place in places:
        files = {split: next((path for ending in (".jsonl.gz", ".jsonl")
                              if (path := place / f"{split}{ending}").is_file()), None) for split in SPLITS}
        if all(files.values()):
            return files
    where = f" It can be had from {data.origin}." if data.origin else ""
    raise DataError(f"data.{name}: no train, valid and test (.jsonl.gz or .jsonl, with src and trg) in "
                    f"{' or '.join(map(str, places))}.{where} Put it in a folder and name the folder above with --data"
                    + ("" if root else ", or leave the set out with --sets"))


def read(path: Path, form: str) -> list[Document]:
    """The documents of a file; DataError where it is damaged or empty, or names the line that is none."""
    found = []
    for block in records.json_blocks(path):
        for source, target in zip(*records.documents(block, _Lines(form)), strict=True):
            asked = facts.facts(source) if form == "facts" else []
            found.append(Document(facts.source_text(asked), facts.words(target), asked) if asked
                         else Document(source, target, asked))
    return found


@dataclass(frozen=True)
class _Lines:
    """How lines are read (`Reader`): src and trg, and in the form "facts" a source that states some."""

    form: str
    paired = True

    def document(self, record: object, place: str) -> tuple[str, str]:
        texts = [record.get(name) if isinstance(record, dict) else None for name in ("src", "trg")]
        if not all(isinstance(text, str) for text in texts):
            raise DataError(f"{place}: needs a JSON object with src and trg, both strings")
        if self.form == "facts" and not facts.facts(texts[0]):
            raise DataError(f"{place}: its source has no name[value]: leave out form = \"facts\"")
        return texts[0], texts[1]


def prepare(name: str, data: DataSet, root: Path | None, limit: int, out: Path) -> dict[str, str]:
    """Writes what the runs on a set need to the folder `out`: its splits, and what `Test.read` gives back. Returns the
    settings `data.*` of its runs."""
    splits = {split: read(path, data.form) for split, path in find(name, data, root).items()}
    grouped: dict[str, list[Document]] = defaultdict(list)
    for document in splits["test"]:
        grouped[document.source].append(document)
    groups = list(grouped.values())
    chosen = [groups[place] for place in evaluation_samples(len(groups), limit)]
    splits["test"] = [each[0] for each in chosen]
    sources, references = [each[0].source for each in chosen], [[one.target for one in each] for each in chosen]
    drawn = random.Random(0).choices(splits["train"], k=len(chosen))
    trivial = {"random training target": [each.target for each in drawn]}
    asked = [each[0].asked for each in chosen] if data.form == "facts" else []
    if asked:
        known = [(each.asked, each.target) for each in splits["train"]]
        trivial["nearest training facts' sentence"] = facts.nearest(asked, known)
    else:
        trivial |= baselines(sources, references, median_words([each[0] for each in references]))
    with writing("--out", out):
        out.mkdir(parents=True, exist_ok=True)
        for split, held in splits.items():
            _write(out / f"{split}.jsonl", "".join(
                json.dumps({"src": each.source, "trg": each.target}) + "\n" for each in held))
        _write(out / TEST, json.dumps(asdict(Test(sources, references, asked, trivial))))
    return {f"data.{split}": str(out / f"{split}.jsonl") for split in SPLITS}


def _write(path: Path, text: str) -> None:
    """Leaves a file that holds the text already as it is: runs find their tokens by its date."""
    if not path.exists() or path.read_text() != text:
        path.write_text(text)
