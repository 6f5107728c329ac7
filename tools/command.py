"""What the tools' command lines share."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable

from trainer.errors import ExitCode, exit_code_of


def run(main: Callable[[], None]) -> None:
    """Runs a tool; an error that the user can mend is one line and the documented exit code of its kind."""
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        code = exit_code_of(error)
        if code == ExitCode.UNEXPECTED:
            traceback.print_exc()
        print(f"error: {error}", file=sys.stderr)
        sys.exit(code)
