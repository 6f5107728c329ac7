"""What every command line of this repository does with a mistake: one line, and the documented exit code."""

from __future__ import annotations

import argparse
from typing import NoReturn

from model.errors import ConfigError


class Parser(argparse.ArgumentParser):
    """Raises ConfigError for a command line that it refuses, instead of printing its usage and ending with 2."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError("command line", f"{message} (--help explains all of it)")
