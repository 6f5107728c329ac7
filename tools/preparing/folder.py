"""What a prepared folder holds, and how it comes about, step by step; each step is done once."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from tools.preparing.lengths import plot, statistics
from tools.preparing.selection import EXACT, NEAR, Selection, fingerprints, joined
from trainer.data.config import DataConfig
from trainer.data.corpus import Corpus
from trainer.data.files import write_text_whole, write_whole
from trainer.data.prepare import CONFIGURATION, PREPARED_WITH, SPLITS, VOCABULARY, open_vocabulary
from trainer.data.progress import progress
from trainer.data.records import Block, texts
from trainer.data.token_cache import TokenCache, is_token_cache, write_token_cache
from trainer.data.vocabulary import Vocabulary, vocabulary_model
from trainer.data.workers import Workers

STATISTICS = "statistics.json"
_SELECTION = "selection.npz"


def settings(corpora: Mapping[str, Corpus], selection: Selection, config: DataConfig) -> dict:
    """Everything that the folder's content depends on, ready for JSON."""
    trained = config.vocabulary == "train"
    return {"documents": {split: corpus.digest for split, corpus in corpora.items()}, "selection": str(selection),
            "vocabulary": f"{config.vocab_size} trained" if trained else open_vocabulary(config).digest,
            "limits": [config.max_source_tokens, config.max_target_tokens]}


def made_with(folder: Path) -> dict | None:
    """The settings of a folder, finished or not; None if it is none of ours."""
    try:
        return json.loads((folder / PREPARED_WITH).read_text())
    except (OSError, ValueError):
        return None


def is_finished(folder: Path) -> bool:
    """Whether all of it is there, and the shards are whole."""
    return (folder / CONFIGURATION).exists() and all(is_token_cache(folder / split) for split in SPLITS
                                                     if (folder / split).exists())


def fill(folder: Path, final: Path, corpora: Mapping[str, Corpus], selection: Selection, config: DataConfig,
         workers: Workers) -> None:
    """Makes everything in `folder` that is not there yet; it will be moved to `final`. Raises DataError."""
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / PREPARED_WITH, settings(corpora, selection, config))
    if not (folder / _SELECTION).exists():
        chosen = _select(corpora, selection, workers)
        write_whole(folder / _SELECTION, lambda handle: np.savez_compressed(handle, **chosen))
    chosen = dict(np.load(folder / _SELECTION))
    if not (folder / VOCABULARY).exists():
        train = _wanted(corpora["train"], chosen, "train", "train")
        model = (vocabulary_model(texts(train, corpora["train"].reader), config.vocab_size)
                 if config.vocabulary == "train" else open_vocabulary(config).path.read_bytes())
        write_whole(folder / VOCABULARY, lambda handle: handle.write(model))
    vocabulary, caches = Vocabulary(folder / VOCABULARY), {}
    for split in SPLITS:
        origin = split if split in corpora else "train"
        if (chosen[f"{origin}.split"] == SPLITS.index(split)).any():
            if not is_token_cache(folder / split):
                write_token_cache(folder / split, _wanted(corpora[origin], chosen, origin, split),
                                  corpora[origin].reader, vocabulary, workers, split)
            caches[split] = TokenCache(folder / split)
    left_out = np.concatenate([chosen[f"{origin}.split"] for origin in corpora])
    (folder / "lengths.svg").write_text(plot(caches, config))
    _write_json(folder / STATISTICS, {
        "exact_duplicates": int((left_out == EXACT).sum()), "near_duplicates": int((left_out == NEAR).sum()),
        "splits": {split: statistics(cache, config) for split, cache in caches.items()}})
    lines = ["[data]", *(f"{split} = {json.dumps(str(final / split) if split in caches else '')}" for split in SPLITS),
             f"vocabulary = {json.dumps(str(final / VOCABULARY))}", f"vocab_size = {vocabulary.size}"]
    write_text_whole(folder / CONFIGURATION, "\n".join([*lines, ""]))


def _select(corpora: Mapping[str, Corpus], selection: Selection, workers: Workers) -> dict[str, np.ndarray]:
    """For each input `NAME.split`, the number in SPLITS of the split that each of its documents goes to (or EXACT,
    NEAR), and `NAME.counts`, the documents of each of its blocks."""
    found, chosen = {}, {}
    for name, corpus in corpora.items():
        parts, count = [], 0
        take = functools.partial(fingerprints, reader=corpus.reader, near=selection.duplicates == "near")
        with progress(f"reading {name}") as show:
            for part in workers.map(take, corpus.blocks()):
                parts.append(part)
                count += len(part.place_N)
                show(part.done, count)
        found[name] = joined(parts)
        chosen[f"{name}.counts"] = np.array([len(part.place_N) for part in parts])
    return chosen | {f"{name}.split": split_N for name, split_N in selection.choose(found).items()}


def _wanted(corpus: Corpus, chosen: Mapping[str, np.ndarray], origin: str, split: str) -> Iterator[Block]:
    """The blocks of an input, marked with which of their documents go to a split."""
    chosen_N, first = chosen[f"{origin}.split"] == SPLITS.index(split), 0
    for block, count in zip(corpus.blocks(), chosen[f"{origin}.counts"].tolist(), strict=True):
        yield block._replace(wanted_N=chosen_N[first:first + count])
        first += count


def _write_json(path: Path, content: dict) -> None:
    write_text_whole(path, json.dumps(content, indent=1) + "\n")
