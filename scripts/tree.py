"""Write the annotated tree of `src/trimtab` into the README, from the first line of each module's docstring.

    python scripts/tree.py            rewrite the tree
    python scripts/tree.py --check    exit with 1 if the README is out of date

Siblings stand in the order of the layers in `pyproject.toml`, lowest first: each file needs only what is above it.
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "src" / "trimtab"
README = ROOT / "README.md"
BEGIN = "<!-- tree: begin (written by scripts/tree.py) -->"
END = "<!-- tree: end -->"


def layer_order(pyproject: Path) -> dict[str, int]:
    """Return module name -> rank, lowest layer first, as the layers contract in `pyproject` lists them."""
    contracts = tomllib.loads(pyproject.read_text())["tool"]["importlinter"]["contracts"]
    layers = next(contract["layers"] for contract in contracts if contract["type"] == "layers")
    names = [name for layer in reversed(layers) for name in re.findall(r"\w+", layer)]
    return {name: rank for rank, name in enumerate(names)}


def first_line(module: Path) -> str:
    """Return the first docstring line of a file, without its full stop; empty if the file has no docstring."""
    if not module.is_file():
        return ""
    docstring = ast.get_docstring(ast.parse(module.read_text(encoding="utf-8"))) or ""
    return docstring.partition("\n")[0].removesuffix(".")


def rows(folder: Path, rank: dict[str, int], depth: int = 0) -> list[tuple[str, str]]:
    """List (indented name, description) for every module and package below `folder`."""

    def key(path: Path) -> tuple[bool, int, str]:
        return path.name != "__init__.py", rank.get(path.stem, len(rank)), path.name

    def shown(path: Path) -> bool:
        if path.is_dir():
            return any(path.glob("**/*.py"))
        # A package's __init__ is described on the line of its folder.
        return path.suffix == ".py" and (depth == 0 or path.name != "__init__.py")

    listing: list[tuple[str, str]] = []
    for path in sorted(filter(shown, folder.iterdir()), key=key):
        indent = "  " * (depth + 1)
        if path.is_dir():
            listing.append((f"{indent}{path.name}/", first_line(path / "__init__.py")))
            listing += rows(path, {}, depth + 1)
        else:
            listing.append((f"{indent}{path.name}", first_line(path)))
    return listing


def render(listing: list[tuple[str, str]]) -> str:
    """Lay out the rows as one fenced block with aligned descriptions."""
    width = max(len(name) for name, _ in listing) + 2
    lines = [f"{name:<{width}}{text}".rstrip() for name, text in listing]
    return "\n".join([BEGIN, "", "```text", "src/trimtab/", *lines, "```", "", END])


def replace_tree(readme: str, tree: str) -> str:
    """Return the README's text with the marked part replaced by `tree`."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        sys.exit(f"{README.name} has no markers {BEGIN!r} and {END!r} for the tree to stand between.")
    return before + tree + after


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if the README is out of date")
    check: bool = parser.parse_args().check
    listing = rows(PACKAGE, layer_order(ROOT / "pyproject.toml"))
    silent = [name.strip() for name, text in listing if not text]
    if check and silent:
        sys.exit(f"No docstring to take a line from: {', '.join(silent)}. Start each module with what it is.")
    old = README.read_text(encoding="utf-8")
    new = replace_tree(old, render(listing))
    if check and new != old:
        sys.exit("The tree in README.md is out of date. Run: python scripts/tree.py")
    if not check and new != old:
        README.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
