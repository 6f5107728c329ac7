"""What the tools' command lines share."""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

from model.errors import ConfigError
from trainer.errors import ExitCode, exit_code_of


def run(main: Callable[[], None]) -> None:
    """Runs a tool; an error that the user can mend is one line and the documented exit code of its kind, a warning one
    line."""
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # `| head` has seen enough; Python must not notice again when it flushes
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except Exception as error:
        code = exit_code_of(error)
        if code == ExitCode.UNEXPECTED:
            traceback.print_exc()
        print(f"error: {error}", file=sys.stderr)
        sys.exit(code)


@contextlib.contextmanager
def writing(option: str, place: Path) -> Iterator[None]:
    """ConfigError for the option that named a place where the block cannot write."""
    try:
        yield
    except OSError as error:
        raise ConfigError(option, f"{place} cannot be written: {error.strerror or error}") from error
