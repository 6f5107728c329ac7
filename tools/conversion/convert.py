"""From a command line to a conversion: which source, which target."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from model.errors import ConfigError
from tools.conversion.configuration import with_vocabulary
from tools.conversion.files import appearing, write_safetensors
from tools.conversion.layout import Topology
from tools.conversion.mapping import from_diffuseq, same
from tools.conversion.reshard import write_checkpoint
from tools.conversion.sharded import ShardedCheckpoint
from tools.conversion.source import AVERAGE, WEIGHTS, Source
from tools.conversion.universal import TRAINING, UniversalCheckpoint, write_universal
from tools.conversion.upcycle import upcycled_run, upcycling
from tools.conversion.weights import ExportedModel, OriginalDiffuSeq, metadata_of, tensors_of, write_shards
from tools.huggingface.figures import figures_of
from tools.huggingface.folder import describe_for_huggingface
from trainer import checkpoint
from trainer.checkpoint_folder import MANIFEST, by_step
from trainer.errors import CheckpointError
from trainer.export import INDEX, WEIGHTS_FILE, describe_model

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def open_source(path: Path, embeddings: str = "live") -> Source:
    """Whatever can be converted, by what lies at `path`. CheckpointError if it is damaged or nothing of that kind."""
    if path.is_file() and (path.parent / "training_args.json").is_file():
        return OriginalDiffuSeq(path, embeddings)
    if (path / MANIFEST).is_file():
        return ShardedCheckpoint(path)
    if (path / TRAINING).is_file():
        return UniversalCheckpoint(path)
    if _is_exported(path):
        return ExportedModel(path)
    if by_step(path):
        found = checkpoint.find(path, None, print)
        if found is None:
            raise CheckpointError(f"{path}: none of its checkpoints is whole")
        return ShardedCheckpoint(found[0])
    if _is_exported(path / "model"):
        return ExportedModel(path / "model")
    raise CheckpointError(f"{path} is no run, checkpoint, universal checkpoint or exported model, nor a .pt file of "
                          "the original DiffuSeq with its training_args.json")


def _is_exported(path: Path) -> bool:
    return (path / WEIGHTS_FILE).is_file() or (path / INDEX).is_file()


def convert(args: argparse.Namespace) -> str:
    """Converts as the command line asks; what to tell the user of it."""
    with appearing(args.target) as room:  # refuses a target that exists before anything is read
        source = open_source(args.source, args.embeddings or "live")
        if args.embeddings and not isinstance(source, OriginalDiffuSeq):
            raise ConfigError("--embeddings", f"only applies to the original DiffuSeq, which {args.source} is not")
        if args.format in ("checkpoint", "universal") and source.training is None:
            raise ConfigError("--format", f"{args.format} needs a training state, but {args.source} has only weights: "
                              "begin a new run from an exported model with --init_from")
        if args.format == "checkpoint":
            return _to_checkpoint(room, source, args)
        if args.format == "universal":
            room.mkdir()
            write_universal(room, source, source.vocabulary)
            return f"{args.target}: step {source.step}, {len(source.shapes)} parameters"
        return _to_weights(room, source, args)


def _to_checkpoint(room: Path, source: Source, args: argparse.Namespace) -> str:
    old = source.topology if isinstance(source, ShardedCheckpoint) else Topology(1, 1, 1)
    new = Topology(*(old_value if value is None else value for old_value, value in zip(
        vars(old).values(), (args.world, args.expert_parallel_size, args.zero_stage), strict=True)))
    batches = write_checkpoint(room, source, new, source.vocabulary)
    return (f"{args.target}: step {source.step} for {new.world} ranks, train.expert_parallel_size = "
            f"{new.expert_parallel_size}, ZeRO stage {new.zero_stage}. Resume it with --resume {args.target} and "
            + ", ".join(f"{name} = {value}" for name, value in batches.items()) + " in the DeepSpeed JSON")


def _to_weights(room: Path, source: Source, args: argparse.Namespace) -> str:
    kind, weights = _kind(source, args)
    run, rules = source.run, same(source.shapes)
    if isinstance(source, OriginalDiffuSeq):
        rules = from_diffuseq(run.model, args.embeddings or "live")
    dtype = _DTYPES[args.dtype or "fp32"]
    facts = {"step": source.step, "weights": weights}
    if args.format == "safetensors":
        write_safetensors(room, tensors_of(source, run, rules, kind, dtype), metadata_of(run, facts))
        return f"{args.target}: {_size(room)}, {weights} weights of step {source.step}"
    run, vocabulary = with_vocabulary(source, args.vocabulary)
    if args.upcycle is not None:
        run = upcycled_run(run, args.upcycle, args.top_k or 2)
        rules = upcycling(source, run, args.noise or 0.0, args.seed or 0)
    room.mkdir()
    tensors = tensors_of(source, run, rules, kind, dtype)
    if args.format == "huggingface":
        write_shards(room, tensors, round((args.shard_gb or 5) * 1e9))
        measured = args.upcycle is None and (weights == "averaged" or AVERAGE not in source.kinds)
        figures = figures_of(args.source, source.step) if measured else {}
        describe_for_huggingface(room, args.target.name, run, vocabulary, tensors, facts, figures)
    else:
        write_shards(room, tensors, sys.maxsize)
        describe_model(room, run, vocabulary, facts)
    return f"{args.target}: {_size(room)}, {weights} weights of step {source.step}"


def _kind(source: Source, args: argparse.Namespace) -> tuple[str, str]:
    """Which tensors are wanted, and what an exported model calls them."""
    if source.training is None:
        if args.weights:
            raise ConfigError("--weights", f"only applies to training states: {args.source} has one kind of weights")
        return WEIGHTS, getattr(source, "weights", None) or "last"
    wanted = args.weights or ("average" if AVERAGE in source.kinds else "trained")
    if wanted == "average" and AVERAGE not in source.kinds:
        raise ConfigError("--weights", "is average, but the run kept none (optim.ema_decay = 0): use trained")
    return (AVERAGE, "averaged") if wanted == "average" else (WEIGHTS, "last")


def _size(path: Path) -> str:
    files = path.glob("*.safetensors") if path.is_dir() else [path]
    return f"{sum(file.stat().st_size for file in files) / 1e6:,.1f} MB"
