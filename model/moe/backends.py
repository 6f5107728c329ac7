"""Which code multiplies the experts' matrices.

A backend is a module with two functions:

    unavailable(device, dtype, width, ffn) -> str | None    why it cannot run there; None if it can
    run(x_ND, counts_E, experts) -> y_ND

`x_ND` holds the N tokens sorted by expert, `counts_E` (integer, on x's device, summing to N) how many belong
to each expert, `experts` the module that owns `w1`, `w2`, `w3`. Row n of `y_ND` is its expert's output. N is at
least 1, but any count may be 0; weights that were not used then get a gradient of zeros. Kernel packages are imported
inside these functions only.

It may have its own `sort_by_expert`, `scatter_to_experts` and `gather_from_experts` in place of those of
`model/moe/dispatch.py`, and `remark() -> str`, which adds to what is said of a choice.
"""

from __future__ import annotations

from functools import lru_cache
from types import ModuleType

import torch

from model.errors import BackendUnavailable, ConfigError
from model.moe import cpu, dispatch, grouped_mm, megablocks, reference

BACKENDS: dict[str, ModuleType] = {"cpu": cpu, "grouped_mm": grouped_mm, "megablocks": megablocks,
                                   "reference": reference}
"""In the order in which `auto` prefers them. On a GPU grouped_mm stands before megablocks because it keeps half as
many activations for the backward pass, needs no package, and computes the same."""

_KEY = "model.moe.backend"


@lru_cache
def choose_backend(name: str, device: torch.device | str, dtype: torch.dtype, width: int,
                   ffn: int) -> tuple[str, str]:
    """(key of BACKENDS, why) for experts of this width and hidden width (`ffn`) in `dtype` on `device`.

    `auto` takes the first that can run. Any other name is taken or refused: BackendUnavailable says why it
    cannot run and what `auto` would take, ConfigError that there is no such backend.
    """
    if name != "auto" and name not in BACKENDS:
        raise ConfigError(_KEY, f"is '{name}', must be one of auto, {', '.join(BACKENDS)}")
    device = torch.device(device)
    refusals = {}
    for candidate, backend in BACKENDS.items():
        refusal = backend.unavailable(device, dtype, width, ffn)
        if refusal is None:
            break
        refusals[candidate] = refusal
    if name == "auto":
        passed_over = "".join(f"; not {other}: {why}" for other, why in refusals.items())
        return candidate, f"first that runs {dtype} on {device.type}{passed_over}{remark(candidate)}"
    refusal = BACKENDS[name].unavailable(device, dtype, width, ffn)
    if refusal is not None:
        raise BackendUnavailable(_KEY, f"'{name}' cannot run here: {refusal}. Use {_KEY} = auto, "
                                       f"which would choose '{candidate}'")
    return name, f"asked for by name{remark(name)}"


def remark(name: str) -> str:
    """What else to say of backend `name` where it runs, beginning with a semicolon; mostly nothing."""
    text = BACKENDS[name].remark() if hasattr(BACKENDS[name], "remark") else ""
    return text and f"; {text}"


def dispatch_of(name: str) -> ModuleType:
    """The module whose functions take tokens to their experts and back for backend `name`."""
    return BACKENDS[name] if hasattr(BACKENDS[name], "sort_by_expert") else dispatch
