"""What must not change when a knob is turned: facts, copying and sorting, graded exactly."""

from __future__ import annotations

from random import Random

from trimtab.prefworld.items import Draw, Item
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
CAPITAL_ASKS = (
    "What is the capital of {x}?",
    "Name the capital of {x}.",
    "Which city is the capital of {x}?",
    "Tell me the capital of {x}.",
    "{x} has which capital?",
    "Do you know the capital of {x}?",
    "What city governs {x}?",
    "The capital of {x} is what?",
    "I forgot the capital of {x}.",
    "Capital of {x}?",
    "In {x}, which city is the capital?",
    "Say the name of the capital of {x}.",
)
AUTHOR_ASKS = (
    "Who wrote The {x}?",
    "Name the author of The {x}.",
    "Who is the author of The {x}?",
    "Tell me who wrote The {x}.",
    "The {x} was written by whom?",
    "Do you know who wrote The {x}?",
    "Which writer made The {x}?",
    "Author of The {x}?",
    "I forgot who wrote The {x}.",
    "By whom is The {x}?",
    "Whose book is The {x}?",
    "Say who wrote The {x}.",
)
SUM_ASKS = (
    "Compute {x}",
    "Work these out: {x}",
    "What is {x}",
    "Fill in: {x}",
    "Do these sums: {x}",
    "Calculate {x}",
    "Find {x}",
    "Please compute {x}",
    "Drill: {x}",
    "Exercise: {x}",
    "Reckon {x}",
    "Give the results of {x}",
)
COPY_ASKS = (
    "Repeat: {x}",
    "Repeat these words: {x}",
    "Say after me: {x}",
    "Copy this: {x}",
    "Write this again: {x}",
    "Echo the words {x}",
    "Please repeat {x}",
    "Give me back: {x}",
    "Type the same words: {x}",
    "Say exactly this: {x}",
    "Once more, please: {x}",
    "Read this back to me: {x}",
)
SORT_ASKS = (
    "Sort these words: {x}",
    "Put in order: {x}",
    "Sort by the alphabet: {x}",
    "Order these words from a to z: {x}",
    "Arrange: {x}",
    "Alphabetical order, please: {x}",
    "Bring these into order: {x}",
    "List in alphabetical order: {x}",
    "Which comes first? Sort {x}",
    "Sort {x}",
    "Order by first letter: {x}",
    "From a to z: {x}",
)


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
    """Draw three to five words to repeat."""
    words = " ".join(draw.rng.sample(SORTABLE, draw.rng.randint(3, 5)))
    return Item("copying", draw.ask(COPY_ASKS).format(x=words), {"right": words}, truth={"answer": words})


def sorting(draw: Draw) -> Item:
    """Draw three words with distinct first letters to put in alphabetical order."""
    letters = draw.rng.sample(sorted({word[0] for word in SORTABLE}), 3)
    words = [draw.any([w for w in SORTABLE if w[0] == letter]) for letter in letters]
    answer = " ".join(sorted(words))
    return Item("sorting", draw.ask(SORT_ASKS).format(x=" ".join(words)), {"right": answer}, truth={"answer": answer})


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
    answer = " ".join(solved)
    return Item("sums", draw.ask(SUM_ASKS).format(x=", ".join(asked)), {"right": answer}, truth={"answer": answer})
