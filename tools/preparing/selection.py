"""Which documents go where: duplicates are left out, and evaluation documents taken from the training documents."""

from __future__ import annotations

import functools
import hashlib
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from model.errors import ConfigError
from trainer.data.prepare import SPLITS
from trainer.data.records import Block, Reader, documents

EXACT, NEAR = -1, -2
_PERMUTATIONS = 128  # of MinHash: a similarity is then known to about 4 %
_SHINGLE = 5  # words


class Fingerprints(NamedTuple):
    """What a block's N documents are compared by."""

    whole_NH: np.ndarray
    """128 bits of source and target, as two uint64."""
    place_N: np.ndarray
    """A number in [0, 1) that depends on the source (of a text: on it), for dividing documents among splits."""
    similar_NP: np.ndarray
    """MinHash signatures, uint32; of width 0 if not asked for."""
    done: float


def normalized(text: str) -> str:
    """The text by which duplicates are found: without case, form of characters (NFKC) and amount of white space."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def fingerprints(block: Block, reader: Reader, near: bool) -> Fingerprints:
    """Reads a block and reduces each of its documents to what selection needs. Raises DataError for faulty ones."""
    whole, places, signatures = [], [], []
    for source, target in zip(*documents(block, reader), strict=True):
        source, target = normalized(source), normalized(target)
        whole.append(hashlib.blake2b(f"{source}\0{target}".encode(), digest_size=16).digest())
        places.append(hashlib.blake2b((source or target).encode(), digest_size=8, person=b"split").digest())
        if near:
            signatures.append(_signature(f"{source} {target}"))
    return Fingerprints(np.frombuffer(b"".join(whole), np.uint64).reshape(-1, 2),
                        (np.frombuffer(b"".join(places), np.uint64) >> 11) / 2.0**53,
                        np.array(signatures, np.uint32).reshape(len(whole), -1 if signatures else 0), block.done)


@functools.cache
def _empty_sketch():
    from datasketch import MinHash

    return MinHash(_PERMUTATIONS, scheme="affine32")


def _signature(text: str) -> np.ndarray:
    words = text.split()
    shingles = {" ".join(words[start:start + _SHINGLE]) for start in range(max(1, len(words) - _SHINGLE + 1))}
    sketch = _empty_sketch().copy()
    sketch.update_batch([shingle.encode() for shingle in shingles])
    return sketch.hashvalues


@dataclass(frozen=True)
class Selection:
    """Rules for what goes where, the same for the same documents in any order of splits.

    duplicates: keep, exact, or near. similarity: of word 5-grams (Jaccard), above which two documents are near
    duplicates. shares: of the training documents that become valid and test documents.
    """

    duplicates: str = "exact"
    similarity: float = 0.8
    shares: tuple[float, float] = (0.0, 0.0)

    def check(self) -> None:
        """Refuses impossible values, and near duplicates where the package for them is missing: ConfigError."""
        if self.duplicates == "near":
            try:
                import datasketch  # noqa: F401 (before processes are forked, so that they share it)
            except ImportError:
                raise ConfigError("--duplicates", "near needs a package that is not installed: pip install "
                                  "datasketch==2.0.0") from None
        if not 0 < self.similarity < 1:
            raise ConfigError("--similarity", f"must lie between 0 and 1, not {self.similarity}")
        if min(self.shares) < 0 or sum(self.shares) >= 1:
            raise ConfigError("--valid_percent", "and --test_percent must not be negative, and leave documents to "
                              "train on")

    def choose(self, found: dict[str, Fingerprints]) -> dict[str, np.ndarray]:
        """For the documents of each input, the number in SPLITS of the split they go to, or EXACT or NEAR for those
        that are left out [N]."""
        split = {name: np.full(len(prints.place_N), SPLITS.index(name)) for name, prints in found.items()}
        valid, test = self.shares
        place_N = found["train"].place_N
        split["train"][place_N < valid + test] = SPLITS.index("valid")
        split["train"][place_N < test] = SPLITS.index("test")
        if self.duplicates == "keep":
            return split
        names = list(found)
        split_N = np.concatenate([split[name] for name in names])
        # A document stays where it matters most that it is new to the model: test, then valid, then train.
        order_N = np.argsort(-split_N, kind="stable")
        whole_NH = np.concatenate([found[name].whole_NH for name in names])
        _, first = np.unique(whole_NH[order_N], axis=0, return_index=True)
        kept_N = np.zeros(len(split_N), bool)
        kept_N[order_N[first]] = True
        split_N[~kept_N] = EXACT
        if self.duplicates == "near":
            signatures_NP = np.concatenate([found[name].similar_NP for name in names])
            order_N = order_N[kept_N[order_N]]
            split_N[order_N[_near_duplicates(signatures_NP[order_N], self.similarity)]] = NEAR
        bounds = np.cumsum([len(split[name]) for name in names])[:-1]
        return dict(zip(names, np.split(split_N, bounds), strict=True))


def _near_duplicates(signatures_NP: np.ndarray, similarity: float) -> np.ndarray:
    """Whether each document is similar to one before it that is none [N]."""
    from datasketch import MinHash, MinHashLSH

    index = MinHashLSH(similarity, _PERMUTATIONS)
    similar_N = np.zeros(len(signatures_NP), bool)
    for number, signature in enumerate(signatures_NP):
        sketch = MinHash(hashvalues=signature, permutations=_empty_sketch().permutations, scheme="affine32")
        candidates = index.query(sketch)
        similar_N[number] = any((signatures_NP[other] == signature).mean() >= similarity for other in candidates)
        if not similar_N[number]:
            index.insert(number, sketch)
    return similar_N


def joined(parts: Sequence[Fingerprints]) -> Fingerprints:
    """The fingerprints of several blocks as one."""
    whole, place, similar, done = zip(*parts, strict=True)
    return Fingerprints(np.concatenate(whole), np.concatenate(place), np.concatenate(similar), done[-1])
