"""The packed batch: every document of a micro-batch in one flat stream of T tokens, without padding.

Index letters used throughout `model/`: T tokens, D channels of the model, E channels of a token embedding,
V vocabulary, H heads, C noised copies (a document with R draws has R copies).
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from model.transfer import sent


@dataclass(frozen=True)
class TokenLayout:
    """Who a token is: all that attention needs to know of a packed stream. Tokens may lie in any order.

    document_T: index of the document within the batch. Documents never attend to each other.
    position_T: 0-based position within the document; a target continues where its source ends, and every draw
        of a target has the same positions.
    is_target_T: True for tokens that are noised and denoised.
    draw_T: which noised copy of the target a token belongs to; 0 for source tokens.
    is_global_T: True for tokens that attend to, and are attended by, their whole document.
    """

    document_T: Tensor
    position_T: Tensor
    is_target_T: Tensor
    draw_T: Tensor
    is_global_T: Tensor

    def __len__(self) -> int:
        return self.document_T.numel()


@dataclass(frozen=True)
class PackedBatch:
    """Token ids and layout of one micro-batch, with what training needs to know of each noised copy.

    tokens_T: int64 ids. in_loss_T: bool, the target tokens that are trained on (text and its end, not the filler
    behind it). is_given_T: bool, the canvas tokens that are given instead of noised (infilling); neither source nor
    target. row_T: the packed row a token lies in; rows are the unit that is sharded over ranks.
    copy_T: index of the token's noised copy (its document's first copy for source tokens).
    sample_C: the data set's index of the copy's document. draw_C: which draw of it.
    stratum_C: the copy's place among all `strata` copies of the global batch, for stratified time sampling.
    """

    tokens_T: Tensor
    document_T: Tensor
    position_T: Tensor
    is_target_T: Tensor
    draw_T: Tensor
    in_loss_T: Tensor
    is_given_T: Tensor
    row_T: Tensor
    copy_T: Tensor
    sample_C: Tensor
    draw_C: Tensor
    stratum_C: Tensor
    rows: int
    documents: int
    strata: int

    def __len__(self) -> int:
        return self.tokens_T.numel()

    def to(self, device: torch.device | str) -> PackedBatch:
        moved = {f.name: sent(getattr(self, f.name), device) for f in fields(self)
                 if isinstance(getattr(self, f.name), Tensor)}
        return replace(self, **moved)

    def take(self, index: Tensor) -> PackedBatch:
        """The batch with only the tokens listed, in that order; what is kept per copy stays."""
        per_token = {f.name: getattr(self, f.name)[index] for f in fields(self) if f.name.endswith("_T")}
        return replace(self, **per_token)

    def without_sources(self, dropped_D: Tensor | None = None) -> PackedBatch:
        """The batch with the sources of the documents marked in dropped_D (all of them if None) emptied: their first
        and last token, <bos> and </s>, stay, and the targets move up behind them. Documents without one stay."""
        source_T = ~(self.is_target_T | self.is_given_T)
        length_D = torch.bincount(self.document_T[source_T], minlength=self.documents)
        cut_D = (length_D - 2).clamp_min(0)
        cut_T = (cut_D if dropped_D is None else cut_D * dropped_D)[self.document_T]
        kept_T = (self.position_T == 0) | (self.position_T > cut_T)
        shifted_T = torch.where(self.position_T == 0, 0, self.position_T - cut_T)
        return replace(self, position_T=shifted_T).take(kept_T.nonzero().flatten())
