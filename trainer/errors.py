"""Exit codes, in one place, and the errors that carry them.

Whoever starts a run (a shell, a scheduler's script) reads only the exit code. Codes 80 to 89 say what a
person has to mend before another attempt can go further; a restart may help after 1 and after 90 or more.
"""

from __future__ import annotations

from enum import IntEnum

from model.errors import ConfigError


class ExitCode(IntEnum):
    """How a run ended."""

    FINISHED = 0
    """The last step was done, or the run was saved on request (a signal, a time limit): a marker file in the
    run folder says which."""
    UNEXPECTED = 1
    """An error that nobody foresaw: a defect of the program or of the machine. The log has the traceback."""
    CONFIG = 80
    """The command line, the configuration or the DeepSpeed JSON asks for something that cannot work."""
    DATA = 81
    """A data file is missing, damaged or not of the form that was promised."""
    NUMERICAL = 82
    """The loss became infinite or not a number."""
    OUT_OF_MEMORY = 83
    """A device, or the host, had no memory left for a tensor."""
    CHECKPOINT = 84
    """No usable checkpoint to start from, or one could not be written."""
    COMMUNICATION = 91
    """The ranks lost touch with each other."""


class RunError(Exception):
    """Ends a run with one line for the user and a documented exit code."""

    code = ExitCode.UNEXPECTED


class DataError(RunError):
    """A data file that cannot be used: says which file, and which line of it."""

    code = ExitCode.DATA


class NumericalError(RunError):
    """The loss became infinite or not a number."""

    code = ExitCode.NUMERICAL


class CheckpointError(RunError):
    """A checkpoint that cannot be read, does not fit this run, or could not be written."""

    code = ExitCode.CHECKPOINT


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
