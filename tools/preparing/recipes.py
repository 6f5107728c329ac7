"""Recipes: where the papers' data sets are on the Hugging Face hub, and how their records become documents."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from trainer.errors import DataError


@dataclass(frozen=True, repr=False)
class Recipe:
    """How to read a data set; a `trainer.data.records.Reader`."""

    name: str
    mapping: str
    """Which fields become source and target, for people."""
    needs: tuple[str, ...]
    """Fields at the top of a record."""
    convert: Callable[[dict], tuple[str, str] | None]
    """(source, target) of a record; None to leave it out."""
    hub: Mapping[str, str] = field(default_factory=dict)
    """Split -> name on the hub. A split that is missing is taken from the training documents."""
    paired: bool = True

    def __repr__(self) -> str:
        return f"recipe {self.name}: {self.mapping}"  # decides whether a preparation can be gone on with

    def document(self, record: object, place: str) -> tuple[str, str] | None:
        """(source, target) of a record, None for one to leave out; DataError for one that is of another form."""
        try:
            return self.convert(record)
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{place}: is not a record of {self.name}, which has {', '.join(self.needs)} "
                            f"({type(error).__name__}: {error})") from None

    def columns(self, names: Iterable[str], path: str) -> list[str]:
        """The fields that are read, of a file that has fields `names`; DataError where they are not there."""
        if not set(self.needs) <= set(names):
            raise DataError(f"{path}: is not {self.name}, which has fields {', '.join(self.needs)}; it has "
                            f"{', '.join(names)}")
        return list(self.needs)


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"a string was expected, not {type(value).__name__}")
    return value


def _arxiv(record: dict) -> tuple[str, str]:
    return _text(record["article"]), _text(record["abstract"])


def _hotpotqa(record: dict) -> tuple[str, str]:
    context = record["context"]
    paragraphs = [f"{title}\n{''.join(sentences)}" for title, sentences
                  in zip(context["title"], context["sentences"], strict=True)]
    return "\n\n".join([_text(record["question"]), *paragraphs]), _text(record["answer"])


def _qqp(record: dict) -> tuple[str, str] | None:
    return (_text(record["question1"]), _text(record["question2"])) if record["label"] == 1 else None


def _conversation(record: dict) -> tuple[str, str]:
    return _turn(record["post"]), _turn(record["response"])


def _turn(value: str | list[str]) -> str:
    return value if isinstance(value, str) else " ".join(map(_text, value))


RECIPES = {recipe.name: recipe for recipe in (
    Recipe("arxiv", "article -> abstract", ("article", "abstract"), _arxiv,
           {"train": "ccdv/arxiv-summarization:document:train", "valid": "ccdv/arxiv-summarization:document:validation",
            "test": "ccdv/arxiv-summarization:document:test"}),
    Recipe("hotpotqa", "question and the titled paragraphs of context -> answer", ("question", "context", "answer"),
           _hotpotqa, {"train": "hotpotqa/hotpot_qa:distractor:train",
                       "test": "hotpotqa/hotpot_qa:distractor:validation"}),
    Recipe("conversation", "post -> response (strings, or lists of words); Commonsense Conversation is not on the hub: "
           "give its files with --train, --valid, --test", ("post", "response"), _conversation),
    Recipe("qqp", "question1 -> question2 where label is 1", ("question1", "question2", "label"), _qqp,
           {"train": "nyu-mll/glue:qqp:train", "test": "nyu-mll/glue:qqp:validation"}),
)}
"""By name. Test splits without published answers (HotpotQA, QQP) are replaced by the validation splits."""
