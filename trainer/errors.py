"""Exit codes, in one place, and the errors that carry them.

Whoever starts a run (a shell, a scheduler's script) reads only the exit code. Codes 80 to 89 say what a
person has to mend before another attempt can go further; a restart may help after 1 and after 90 or more.
"""

from __future__ import annotations

import errno
import os
from enum import IntEnum

from model.errors import ConfigError


class ExitCode(IntEnum):
    """How a run ended."""

    FINISHED = 0
    """The last step was done, or the run was saved on request (a signal, a time limit): a marker file in the
    run folder says which."""
    UNEXPECTED = 1
    """An error that nobody foresaw: a defect of the program or of the machine. The log has the traceback."""
    NOT_REQUEUED = 75
    """Under SLURM: saved on request, but this cluster forbids to queue the job again: submit it again."""
    CONFIG = 80
    """The command line, the configuration or the DeepSpeed JSON asks for something that cannot work."""
    DATA = 81
    """A data file is missing, damaged or not of the form that was promised."""
    NUMERICAL = 82
    """Too many steps in a row had to be skipped: the loss or its gradient was not finite, or a spike."""
    OUT_OF_MEMORY = 83
    """A device, or the host, had no memory left for a tensor."""
    CHECKPOINT = 84
    """No usable checkpoint to start from, or the run folder could not be written."""
    HANG = 90
    """No progress for `train.hang_minutes`. The log names the ranks that are silent or behind."""
    COMMUNICATION = 91
    """The ranks lost touch with each other. The log names a rank that has died."""
    NODES = 92
    """Under SLURM: nodes failed the checks before training, and there are no others to take their place."""


class RunError(Exception):
    """Ends a run with one line for the user and a documented exit code."""

    code = ExitCode.UNEXPECTED


class DataError(RunError):
    """A data file that cannot be used: says which file, and which line of it."""

    code = ExitCode.DATA


class NumericalError(RunError):
    """Too many steps in a row had to be skipped."""

    code = ExitCode.NUMERICAL


class CheckpointError(RunError):
    """A checkpoint that cannot be read or does not fit this run, or a run folder that cannot be written."""

    code = ExitCode.CHECKPOINT


class LostRankError(RunError):
    """Another rank has died; says which."""

    code = ExitCode.COMMUNICATION


_STORAGE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO)
_STORAGE_TEXTS = ("inline_container.cc", "basic_ios::clear", "os error 28")
"""How PyTorch and safetensors say that a file could not be written."""


def storage_failure(exc: BaseException) -> str | None:
    """Why a file system took no more bytes (no space, quota, read-only); None if that is not what went wrong."""
    if isinstance(exc, OSError) and exc.errno in _STORAGE:
        return os.strerror(exc.errno)
    return "no space is left, or the disk fails" if any(text in str(exc) for text in _STORAGE_TEXTS) else None


def exit_code_of(exc: BaseException) -> ExitCode:
    """The exit code for an exception that ended the run; UNEXPECTED for one that is not listed here.

    PyTorch's host allocator reports a lack of memory, and gloo a lost peer, as a plain RuntimeError that only
    its text gives away.
    """
    import torch  # here, so that a command line that only prints its help does not wait for it

    if isinstance(exc, RunError):
        return exc.code
    if isinstance(exc, ConfigError):
        return ExitCode.CONFIG
    if isinstance(exc, MemoryError | torch.OutOfMemoryError):
        return ExitCode.OUT_OF_MEMORY
    if isinstance(exc, RuntimeError) and "DefaultCPUAllocator: can't allocate memory" in str(exc):
        return ExitCode.OUT_OF_MEMORY
    if isinstance(exc, torch.distributed.DistError) or "gloo/transport" in str(exc):
        return ExitCode.COMMUNICATION
    return ExitCode.UNEXPECTED


_UNCLEAR = {
    ExitCode.UNEXPECTED: "{kind}: {text}",
    ExitCode.OUT_OF_MEMORY: "out of memory ({text}): lower train_micro_batch_size_per_gpu, raising "
                            "gradient_accumulation_steps instead, lower data.row_tokens or the sizes of the model, or "
                            "set train.activation_checkpointing",
    ExitCode.COMMUNICATION: "lost another rank ({text}): its own output says why; started again, the run continues "
                            "from its newest checkpoint",
}
"""What is said about errors whose own text names no remedy."""


def line_of(exc: BaseException) -> str:
    """What to tell the user about an error, in one line."""
    return _UNCLEAR.get(exit_code_of(exc), "{text}").format(kind=type(exc).__name__, text=" ".join(str(exc).split()))
