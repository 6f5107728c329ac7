"""A run's sentencepiece vocabulary as a tokenizer of the `tokenizers` package.

The same ids for every text, but where two segmentations are equally probable (`ff ffff` and `ffff ff`): there the
rounding of the two packages decides.
"""

from __future__ import annotations

import json
from pathlib import Path

import sentencepiece
from tokenizers import Tokenizer, decoders, models, normalizers, processors

_SPACE = "\u2581"  # how sentencepiece writes the space
_NEVER = -1e9  # score of pieces that no text may contain: control tokens and bytes, which are ids only


def tokenizer_of(vocabulary: Path) -> Tokenizer:
    """Encodes a text as `<bos> … </s>`, as sources are; without special tokens, as `Vocabulary.encode` does."""
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(vocabulary))
    size = range(pieces.vocab_size())
    scored = [(pieces.id_to_piece(i), _score(pieces, i)) for i in size]
    tokenizer = Tokenizer(models.Unigram(scored, unk_id=pieces.unk_id(), byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", _SPACE)
    tokenizer.decoder = decoders.Sequence([decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    bos, eos = (pieces.id_to_piece(i) for i in (pieces.bos_id(), pieces.eos_id()))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A {eos}", special_tokens=[(bos, pieces.bos_id()), (eos, pieces.eos_id())])
    return tokenizer


def write_tokenizer(vocabulary: Path, folder: Path, max_tokens: int) -> None:
    """tokenizer.json and tokenizer_config.json, for AutoTokenizer. max_tokens: of a source, with <bos> and </s>."""
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(vocabulary))
    tokenizer_of(vocabulary).save(str(folder / "tokenizer.json"))
    special = {name: pieces.id_to_piece(getattr(pieces, f"{name[:3]}_id")()) for name in
               ("bos_token", "eos_token", "pad_token", "unk_token")}
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": max_tokens, **special,
        "split_special_tokens": True,  # "</s>" within a text is text
        "clean_up_tokenization_spaces": False, "padding_side": "right"}, indent=1) + "\n")


def _score(pieces: sentencepiece.SentencePieceProcessor, i: int) -> float:
    """Log-probability of a piece as sentencepiece weighs it. Pieces that a user defined stand as 0 in the file, and
    count so much more as they have bytes that they win over other ways to write them (weights found by trial)."""
    if pieces.is_control(i) or pieces.is_byte(i) or pieces.is_unknown(i):
        return _NEVER
    return pieces.get_score(i) or 0.1 * (len(pieces.id_to_piece(i).encode()) - 1)
