"""Show the doctests of docstrings, which Markdown would take for quotations, as blocks of code: for mkdocstrings."""

from __future__ import annotations

import re

from griffe import Extension, Object

DOCTEST = re.compile(r"(?:^>>> .*\n?(?:^(?!\s*$).*\n?)*)+", re.MULTILINE)


class Doctests(Extension):
    """Fence every run of lines that begins with a prompt."""

    def on_object(self, *, obj: Object, **kwargs: object) -> None:
        """Rewrite the docstring of a module, class, function or attribute."""
        if obj.docstring is not None:
            obj.docstring.value = DOCTEST.sub(fenced, obj.docstring.value)


def fenced(found: re.Match[str]) -> str:
    """Return lines of a doctest as a block."""
    return f"```pycon\n{found[0].rstrip()}\n```\n"
