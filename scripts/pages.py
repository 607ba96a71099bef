"""What MkDocs cannot know by itself: pages outside docs/, links that lead out of it, and lists taken from the code.

A hook of `mkdocs.yml`. Nothing that it makes is committed, so nothing can be out of date. A page asks for a list by a
comment on a line of its own, `<!-- list: errors -->`.
"""

from __future__ import annotations

import argparse
import inspect
import os
import re
from argparse import SUPPRESS, Action, HelpFormatter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from trimtab import errors
from trimtab.cli import VERBS, parsers
from trimtab.cli.options import Parser

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
OUTSIDE = {name: name.lower() for name in ("CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")}
"""Files that are pages of the site as well, from the root of the repository."""
HOME = {**OUTSIDE, "README.md": "index.md"}
FENCED = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[([^\]]*)\]\(([^)#:\s]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that lie outside docs/."""
    from mkdocs.structure.files import File

    for source, page in OUTSIDE.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Put in the lists that the page asks for, and turn its links towards pages of the site."""
    filled = re.sub(r"^<!-- list: (\w+) -->$", lambda found: LISTS[found[1]](), markdown, flags=re.MULTILINE)
    folder = Path(page.file.abs_src_path or "").parent
    here = Path(page.file.src_uri).parent
    parts = FENCED.split(filled)
    parts[::2] = [LINK.sub(lambda link: turned(link, folder, here), text) for text in parts[::2]]
    return "".join(parts)


def turned(link: re.Match[str], folder: Path, here: Path) -> str:
    """Return a link of a page at `here` whose source lies in `folder`; one to no page of the site keeps its text only.

    A link that leads nowhere is left as it is: MkDocs warns of it.
    """
    text, target, anchor = link[1], link[2], link[3] or ""
    path = Path(os.path.normpath(folder / target))
    if not path.exists() or not path.is_relative_to(ROOT):
        return link[0]
    if path.is_relative_to(DOCS):
        page = path.relative_to(DOCS).as_posix()
    elif path.relative_to(ROOT).as_posix() in HOME:
        page = HOME[path.relative_to(ROOT).as_posix()]
    else:
        return text
    return f"[{text}]({os.path.relpath(page, here)}{anchor})"


# Lists


def list_errors() -> str:
    """Return the tree of errors, and a section for each of them."""
    tree = (errors.__doc__ or "").partition("\n")[2].strip()
    kinds = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if kind.__module__ == errors.__name__]
    kinds.sort(key=lambda kind: inspect.getsourcelines(kind)[1])
    sections = [f"```text\n{tree}\n```"]
    for kind in kinds:
        what, _, then = inspect.cleandoc(kind.__doc__ or "").partition("\n\n")
        standard = kind.__bases__[-1].__name__
        said = f"{what} Standard type: `{standard}`.\n\n**What to do:** {' '.join(then.split())}"
        sections.append(f"## {kind.__name__}\n\n{said}")
    return "\n\n".join(sections)


def list_verbs() -> str:
    """Return a section for each verb of the command line, with every option."""
    by_verb, _ = parsers()
    return "\n\n".join(verb_section(by_verb[verb]) for verb in VERBS)


def verb_section(parser: Parser) -> str:
    """Return what a verb does, how it is called, and a definition for each of its arguments."""
    formatter = HelpFormatter(parser.prog)
    actions = [action for action in parser._actions if action.help is not SUPPRESS]
    needed = [action for action in actions if not action.option_strings or action.required]
    called = " ".join([parser.prog, *(usage(action, formatter) for action in needed), "[OPTIONS]"])
    parts = [f"## {parser.prog}", plain(f"{(parser.description or '').removesuffix('.')}."), f"```text\n{called}\n```"]
    if parser.epilog:
        parts.append(plain(parser.epilog))
    for group in parser._action_groups:
        entries = [definition(action, formatter) for action in group._group_actions if action in actions]
        if entries:
            title = {"positional arguments": "arguments"}.get(group.title or "", group.title or "")
            parts += [f"**{plain(title[:1].upper() + title[1:])}**", *entries]
    return "\n\n".join(parts)


def usage(action: Action, formatter: HelpFormatter) -> str:
    """Return how an argument or a required option is written on the command line."""
    words = formatter._format_args(action, formatter._get_default_metavar_for_positional(action))
    return " ".join([*action.option_strings[-1:], words]).strip()


def definition(action: Action, formatter: HelpFormatter) -> str:
    """Return an argument as an entry of a definition list: how it is written, what it does, its default."""
    text = formatter._expand_help(action) if action.help else ""
    notes: list[str] = []
    if action.choices is not None and not all(str(choice) in text for choice in action.choices):
        notes.append(f"one of {', '.join(map(str, action.choices))}")
    if action.required and action.option_strings:
        notes.append("required")
    told = action.default in (None, False, SUPPRESS, []) or "default" in text
    if not told:
        notes.append(f"default {action.default}")
    if isinstance(action, argparse._AppendAction) and "repeat" not in text:
        notes.append("may be repeated")
    said = "; ".join(filter(None, [plain(text), plain(", ".join(notes))]))
    return f"`{formatter._format_action_invocation(action)}`\n:   {said}"


def plain(text: str) -> str:
    """Return text as Markdown that shows it as it is, with options and what stands in backquotes as code."""
    parts = re.split(r"(`[^`]+`|(?<![\w-])--[a-z][\w-]*)", text)
    parts[::2] = [re.sub(r"([\\`*_\[\]<>#|])", r"\\\1", part) for part in parts[::2]]
    parts[1::2] = [f"`{part.strip('`')}`" for part in parts[1::2]]
    return "".join(parts)


LISTS: dict[str, Callable[[], str]] = {"errors": list_errors, "verbs": list_verbs}
