"""A bar for work on a stream of documents whose number is not known beforehand."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from tqdm import tqdm


@contextlib.contextmanager
def progress(title: str) -> Iterator[Callable[[float, int], None]]:
    """Yields show(share of the input that is done, documents so far) of a bar with the time left; an empty title shows
    none."""
    layout = "{desc}: {percentage:3.0f}% |{bar}| {elapsed}<{remaining}{postfix}"
    with tqdm(total=1.0, desc=title, disable=not title, bar_format=layout) as bar:
        def show(done: float, documents: int) -> None:
            bar.set_postfix_str(f"{documents:,} documents", refresh=False)
            bar.update(done - bar.n)

        yield show
