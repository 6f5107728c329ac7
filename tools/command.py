"""What the tools' command lines share."""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from collections.abc import Callable

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
