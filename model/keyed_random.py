"""Random numbers that belong to the data: a generator's stream is fixed by its key, never by rank, batch or history."""

from __future__ import annotations

import hashlib
import struct

import torch


def keyed_generator(*key: int) -> torch.Generator:
    """A CPU generator seeded by a hash of the integers given, for instance (seed, step, sample, draw)."""
    digest = hashlib.blake2b(struct.pack(f"<{len(key)}q", *key), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
