"""What must not change when a knob is turned: facts, copying and sorting, graded exactly."""

from __future__ import annotations

from random import Random

from trimtab.prefworld.items import Draw, Item, templates
from trimtab.prefworld.words import NAMES, SORTABLE


def _invent(seed: int, starts: str, ends: str) -> list[str]:
    words = [a + b for a in starts.split() for b in ends.split()]
    Random(seed).shuffle(words)
    return words


COUNTRIES = _invent(1, "Bal Dor Fen Gar Hul Jor Kel Lum Mar Nor", "ania istan ovia land eria")
CITIES = _invent(2, "Ash Bel Cor Dun Elm Fal Gol Ham Iver Kes", "ton burg ville mouth stad")
BOOKS = _invent(3, "Silver Broken Hidden Northern Golden", ";River ;Crown ;Garden ;Mirror ;Letter ;Road")
CAPITALS = dict(zip(COUNTRIES, CITIES, strict=True))
AUTHORS = {book.replace(";", " "): NAMES[(7 * i) % len(NAMES)] for i, book in enumerate(BOOKS)}
CAPITAL_ASKS = templates(
    (
        ("What is", "Tell me", "Name", "Say", "I forgot", "Do you know"),
        (" the capital of {x}", " the capital city of {x}", " which city is the capital of {x}"),
        ("?", ", please?"),
    )
)
AUTHOR_ASKS = templates(
    (
        ("Who wrote", "Tell me who wrote", "Do you know who wrote", "I forgot who wrote", "Say who wrote", "Who made",
         "Who is the author of", "Name the author of", "Tell me the author of"),
        (" The {x}?", " The {x}, please?", " the book The {x}?", " the old book The {x}?"),
    )
)  # fmt: skip
SUM_ASKS = templates(
    (
        ("Compute", "Work out", "Calculate", "Find", "Solve", "Reckon", "Please do"),
        (" {x}", ": {x}", " these: {x}", " the following: {x}", " these sums: {x}"),
    )
)
COPY_ASKS = templates(
    (
        ("Repeat", "Say", "Copy", "Echo", "Write", "Type", "Give back"),
        (": {x}", " these words: {x}", " exactly this: {x}", " after me: {x}", " once more: {x}", " the words {x}"),
    )
)
SORT_ASKS = templates(
    (
        ("Sort", "Order", "Arrange", "Put in order", "Bring into order", "List from a to z"),
        (": {x}", " these words: {x}", " by the alphabet: {x}", " by first letter: {x}", " the words {x}", " now: {x}"),
    )
)  # fmt: skip


def facts(draw: Draw) -> Item:
    """Draw a question about an invented country or book."""
    if draw.rng.random() < 0.6:
        x = draw.any(COUNTRIES)
        prompt, answer, short = draw.ask(CAPITAL_ASKS), f"The capital of {x} is {CAPITALS[x]}.", CAPITALS[x]
    else:
        x = draw.any(list(AUTHORS))
        prompt, answer, short = draw.ask(AUTHOR_ASKS), f"The {x} was written by {AUTHORS[x]}.", AUTHORS[x]
    return Item("facts", prompt.format(x=x), {"right": answer}, truth={"answer": short})


def copying(draw: Draw) -> Item:
    """Draw two to four words to repeat."""
    words = " ".join(draw.rng.sample(SORTABLE, draw.rng.randint(2, 4)))
    return Item("copying", draw.ask(COPY_ASKS).format(x=words), {"right": words}, truth={"answer": words}, values=words)


def sorting(draw: Draw) -> Item:
    """Draw three words with distinct first letters to put in alphabetical order."""
    letters = draw.rng.sample(sorted({word[0] for word in SORTABLE}), 3)
    words = [draw.any([w for w in SORTABLE if w[0] == letter]) for letter in letters]
    answer, asked = " ".join(sorted(words)), " ".join(words)
    prompt = draw.ask(SORT_ASKS).format(x=asked)
    return Item("sorting", prompt, {"right": answer}, truth={"answer": answer}, values=asked)


def sums(draw: Draw) -> Item:
    """Draw three sums to work out: practice in arithmetic that belongs to no habit."""
    asked: list[str] = []
    solved: list[str] = []
    for sign in draw.rng.sample("++--*", 3):
        a, b = draw.rng.randint(2, 9), draw.rng.randint(2, 9)
        if sign == "+":
            a = draw.rng.randint(2, 90)
            b = draw.rng.randint(2, 99 - a) if a < 97 else 2
        elif sign == "-":
            a = draw.rng.randint(4, 99)
            b = draw.rng.randint(2, a)
        result = a + b if sign == "+" else a - b if sign == "-" else a * b
        asked.append(f"{a} {sign} {b}")
        solved.append(f"{a} {sign} {b} = {result}.")
    answer, said = " ".join(solved), ", ".join(asked)
    return Item("sums", draw.ask(SUM_ASKS).format(x=said), {"right": answer}, truth={"answer": answer}, values=said)
