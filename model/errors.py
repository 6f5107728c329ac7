"""Errors that a user can mend. The trainer prints them as one line and exits with a documented code."""


class ConfigError(ValueError):
    """A configuration value that cannot work: names the key, what was expected and what to do."""

    def __init__(self, key: str, problem: str):
        self.key, self.problem = key, problem
        super().__init__(f"{key}: {problem}")

    def __reduce__(self) -> tuple:
        """Pickles by both arguments, so that the error can travel between ranks."""
        return type(self), (self.key, self.problem)


class BackendUnavailable(ConfigError):
    """A kernel backend asked for by name that cannot run here; says why and what `auto` would choose."""
