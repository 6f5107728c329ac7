"""Which tensors of a source become which tensors of a target: declared as rules, checked before anything is read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from model import diffuseq_import
from model.config import ModelConfig
from tools.conversion.source import Source
from trainer.errors import CheckpointError


class Rule(NamedTuple):
    """`target` is made of the tensors `sources`, by `combine`; without it, it is the one source as it is."""

    target: str
    sources: tuple[str, ...]
    combine: Callable[[list[Tensor]], Tensor] | None = None

    def pieces(self, source: Source, kind: str) -> Iterator[Tensor]:
        """The target's elements as consecutive flat tensors."""
        if self.combine is None:
            yield from source.pieces(kind, self.sources[0], 0, source.shapes[self.sources[0]].numel())
        else:
            yield self.combine([source.whole(kind, name) for name in self.sources]).flatten()


def check(rules: list[Rule], sources: Iterable[str], targets: Iterable[str]) -> None:
    """CheckpointError unless the rules use each source exactly once and make each target exactly once."""
    used = Counter(name for rule in rules for name in rule.sources)
    made = Counter(rule.target for rule in rules)
    for what, counts, names in (("used", used, set(sources)), ("made", made, set(targets))):
        problems = {f"not {what}": names - counts.keys(), "unknown": counts.keys() - names,
                    f"{what} more than once": {name for name, count in counts.items() if count > 1}}
        for problem, found in problems.items():
            if found:
                shown = ", ".join(sorted(found)[:5]) + (", …" if len(found) > 5 else "")
                raise CheckpointError(f"nothing was converted: {len(found)} tensors would be {problem}: {shown}")


def same(names: Iterable[str]) -> list[Rule]:
    """Every tensor as it is."""
    return [Rule(name, (name,)) for name in names]


def from_diffuseq(config: ModelConfig, table: str) -> list[Rule]:
    """The original DiffuSeq's tensors, some of them stacked. table: which of its two embedding tables, live or
    averaged."""
    return [Rule(name, sources, torch.cat) for name, sources in diffuseq_import.weight_map(config, table).items()]
