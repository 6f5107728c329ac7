"""A run's sentencepiece vocabulary, BPE or unigram, as a tokenizer of the `tokenizers` package.

The same ids for every text, but where two segmentations rank equal (unigram: `ff ffff` and `ffff ff`): there the
packages decide differently.
"""

from __future__ import annotations

import json
from pathlib import Path

import sentencepiece
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

from model.errors import ConfigError

_SPACE = "\u2581"  # how sentencepiece writes the space
_NEVER = -1e9  # score of pieces that no text may contain: control tokens and bytes, which are ids only
_PIECE = sentencepiece_model_pb2.ModelProto.SentencePiece


def tokenizer_of(vocabulary: Path) -> Tokenizer:
    """Encodes a text as `<bos> … </s>`, as sources are; without special tokens, as `Vocabulary.encode` does.

    ConfigError for a vocabulary that is neither BPE nor unigram.
    """
    proto = sentencepiece_model_pb2.ModelProto.FromString(vocabulary.read_bytes())
    spec = proto.trainer_spec
    if spec.model_type == spec.BPE:
        tokenizer = _bpe(proto.pieces, spec.unk_id)
    elif spec.model_type == spec.UNIGRAM:
        tokenizer = Tokenizer(models.Unigram([(piece.piece, _score(piece)) for piece in proto.pieces],
                                             unk_id=spec.unk_id, byte_fallback=True))
    else:
        raise ConfigError("--vocabulary", f"{vocabulary} holds words or characters, which make no Hugging Face "
                          "tokenizer: take a BPE or unigram vocabulary")
    tokenizer.normalizer = normalizers.Replace(" ", _SPACE)
    tokenizer.decoder = decoders.Sequence([decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    bos, eos = (proto.pieces[i].piece for i in (spec.bos_id, spec.eos_id))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A {eos}", special_tokens=[(bos, spec.bos_id), (eos, spec.eos_id)])
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


def _bpe(pieces: list[_PIECE], unk_id: int) -> Tokenizer:
    """sentencepiece joins two neighbours where their text is a piece, the best piece first: so every way to cut a
    piece in two is a merge of its rank. Pieces that a user defined are cut out of the text before."""
    ids = {piece.piece: i for i, piece in enumerate(pieces)}
    ranked = sorted((piece for piece in pieces if piece.type == _PIECE.NORMAL), key=lambda piece: -piece.score)
    merges = [(piece.piece[:cut], piece.piece[cut:]) for piece in ranked for cut in range(1, len(piece.piece))
              if piece.piece[:cut] in ids and piece.piece[cut:] in ids]
    tokenizer = Tokenizer(models.BPE(ids, merges, unk_token=pieces[unk_id].piece, byte_fallback=True))
    tokenizer.add_tokens([AddedToken(piece.piece, normalized=True) for piece in pieces
                          if piece.type == _PIECE.USER_DEFINED])
    return tokenizer


def _score(piece: _PIECE) -> float:
    """Log-probability of a piece of a unigram vocabulary, as sentencepiece weighs it. Pieces that a user defined stand
    as 0 in the file, and count so much more as they have bytes that they win over other ways to write them (weights
    found by trial)."""
    if piece.type in (_PIECE.CONTROL, _PIECE.BYTE, _PIECE.UNKNOWN):
        return _NEVER
    return piece.score or 0.1 * (len(piece.piece.encode()) - 1)
