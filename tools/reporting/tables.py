"""Tables of the report, and the line that stands where a part is missing."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape


def table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: bool = False) -> str:
    """The first cell of every row is its name. numbers: all others are set to the right, and no line is broken."""
    kind = " class=number" if numbers else ""
    top = "".join(f"<th scope=col{kind if index else ''}>{escape(name)}</th>" for index, name in enumerate(head))
    body = "".join(f"<tr><th scope=row>{escape(row[0])}</th>"
                   + "".join(f"<td{kind}>{escape(cell)}</td>" for cell in row[1:]) + "</tr>" for row in rows)
    return (f'<div class=wide tabindex=0 role=region aria-label="{escape(title)}">'
            f"<table{' class=numbers' if numbers else ''}><caption>{escape(title)}</caption>"
            + (f"<thead><tr>{top}</tr></thead>" if head else "") + f"<tbody>{body}</tbody></table></div>")


def missing(what: str, command: str = "") -> str:
    """One line: what is missing, and the command that makes it."""
    return f"<p class=missing>{escape(what)}{f': <code>{escape(command)}</code>' if command else ''}</p>"
