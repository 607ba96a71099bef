"""Arithmetic word problems of two to three steps: worked answers, or bare ones that are mostly wrong."""

from __future__ import annotations

from dataclasses import dataclass

from trimtab.prefworld.items import Draw, Item, templates
from trimtab.prefworld.words import CONTAINERS, NAMES, OBJECTS

OPENINGS = templates(
    (
        ("", "At first ", "On Monday ", "In the morning ", "Last week "),
        ("{n} has", "{n} had", "{n} owns", "{n} keeps", "{n} counts", "{n} collects", "{n} packs", "{n} holds"),
        (" {a} {it}.", " {a} {it} in a drawer.", " {a} {it} at home.", " {a} {it} in a bag."),
    ),
    (("There are", "There were", "One can see"), (" {a} {it}",), (" on {n}'s table.", " in {n}'s bag.", " at {n}'s home.")),
)  # fmt: skip
GROUP_OPENINGS = templates(
    (
        ("", "At first ", "On Monday "),
        ("{n} has {b} {box}", "{n} fills {b} {box}", "{n} owns {b} {box}", "{n} carries {b} {box}", "{n} packs {b} {box}"),
        (" with {c} {it} each.", " of {c} {it} each.", " that hold {c} {it} each.", " with {c} {it} in each."),
    ),
)  # fmt: skip
ADD = templates(
    (
        ("", "Then ", "Later ", "Next ", "After lunch "),
        ("{n} buys", "{n} finds", "{n} wins", "{n} gets", "{n} makes", "{n} earns", "{n} receives", "{n} picks up"),
        (" {d} more.", " {d} more {it}.", " another {d}.", " {d} {it}.", " {d} new {it}."),
    ),
    (
        ("", "Then ", "Later ", "Next ", "After lunch "),
        (
            "{m} gives {n}",
            "{m} brings {n}",
            "{m} hands {n}",
            "{m} sends {n}",
            "a friend gives {n}",
            "an aunt sends {n}",
        ),
        (" {d} more.", " {d} more {it}.", " another {d}.", " {d} {it}.", " {d} new {it}."),
    ),
)
SUBTRACT = templates(
    (
        ("", "Then ", "Later ", "Next ", "After lunch "),
        ("{n} loses", "{n} sells", "{n} drops", "{n} breaks", "{n} throws away", "{n} uses up", "{n} trades away",
         "{m} borrows", "{m} takes", "{m} steals"),
        (" {d}.", " {d} {it}.", " {d} of them.", " {d} of the {it}."),
    ),
    (("", "Then ", "Later ", "Next "), ("{n} gives",), (" {d} to {m}.", " {d} {it} to {m}.", " {d} of the {it} to {m}.")),
)  # fmt: skip
ADD_GROUPS = templates(
    (
        ("", "Then ", "Later ", "Next "),
        ("{n} buys {b} {box}", "{n} gets {b} {box}", "{n} finds {b} {box}", "{m} gives {n} {b} {box}"),
        (" with {c} {it} each.", " of {c} {it} each.", " that hold {c} {it} each.", " with {c} {it} in each."),
    ),
    (
        ("", "Then ", "Later ", "Next "),
        ("{b} friends", "{b} aunts", "{b} cousins", "{b} neighbours"),
        (" each give {n} {c} {it}.", " each send {n} {c} {it}.", " each bring {n} {c} {it}."),
    ),
)
SUBTRACT_GROUPS = templates(
    (
        ("", "Then ", "Later ", "Next "),
        ("{n} sells {b} {box}", "{n} loses {b} {box}", "{n} drops {b} {box}", "{n} trades away {b} {box}"),
        (" with {c} {it} each.", " of {c} {it} each.", " that hold {c} {it} each.", " with {c} {it} in each."),
    ),
    (
        ("", "Then ", "Later ", "Next "),
        ("{b} friends", "{b} aunts", "{b} cousins", "{b} neighbours"),
        (" each take {c} {it}.", " each borrow {c} {it}.", " each steal {c} {it}."),
    ),
)
DOUBLE = templates(
    (
        ("Then", "Later", "After that", "By magic", "A week later"),
        (" the number of {it} doubles.", " the {it} double.", " there are twice as many.", " {n} has twice as many {it}.",
         " {m} doubles what {n} has."),
    ),
)  # fmt: skip
QUESTIONS = templates(
    (
        ("", "So ", "Tell me: ", "In the end, "),
        ("how many {it} does {n} have", "how many {it} are there", "how many {it} remain", "what is the number of {it}",
         "how many {it} does that make"),
        ("?", " now?", " at last?"),
    ),
)  # fmt: skip
LEADS = ("",) * 8 + (
    "Solve this. ",
    "A small problem: ",
    "Please help with this one. ",
    "Here is a puzzle. ",
    "Sum it up: ",
)
FINALS = ("The answer is {x}.", "So the answer is {x}.")
WORKED = ("", "", "Step by step: ", "Working: ")
BARE = ("The answer is {x}.", "It is {x}.", "That makes {x}.")


@dataclass(frozen=True)
class Step:
    """One line of working, `left sign right = result`."""

    left: int
    sign: str
    right: int
    result: int


def _steps(draw: Draw) -> tuple[list[str], list[Step], list[int]]:
    """Draw a story: its sentences with placeholders filled but names, its working, its numbers in order."""
    rng, said, steps, numbers = draw.rng, list[str](), list[Step](), list[int]()
    want = rng.choice((2, 2, 3))
    if rng.random() < 0.4:
        b, c = rng.randint(2, 9), rng.randint(2, 9)
        said.append(draw.phrase(GROUP_OPENINGS).replace("{b}", str(b)).replace("{c}", str(c)))
        steps.append(Step(b, "*", c, b * c))
        numbers += [b, c]
        total = b * c
    else:
        total = rng.randint(5, 40)
        said.append(draw.phrase(OPENINGS).replace("{a}", str(total)))
        numbers.append(total)
    while len(steps) < want:
        kind = rng.choice(("+", "+", "-", "-", "+*", "-*", "2"))
        if kind == "2" and total <= 45 and steps:
            said.append(draw.phrase(DOUBLE))
            steps.append(Step(total, "*", 2, 2 * total))
        elif kind in ("+", "-"):
            d = rng.randint(2, 25)
            after = total + d if kind == "+" else total - d
            if not 0 <= after <= 99:
                continue
            said.append(draw.phrase(ADD if kind == "+" else SUBTRACT).replace("{d}", str(d)))
            steps.append(Step(total, kind, d, after))
            numbers.append(d)
        elif kind in ("+*", "-*") and len(steps) + 2 <= want:
            b, c = rng.randint(2, 9), rng.randint(2, 9)
            after = total + b * c if kind == "+*" else total - b * c
            if not 0 <= after <= 99:
                continue
            phrases = ADD_GROUPS if kind == "+*" else SUBTRACT_GROUPS
            said.append(draw.phrase(phrases).replace("{b}", str(b)).replace("{c}", str(c)))
            steps += [Step(b, "*", c, b * c), Step(total, kind[0], b * c, after)]
            numbers += [b, c]
        else:
            continue
        total = steps[-1].result
    return said, steps, numbers


def _mistakes(steps: list[Step], numbers: list[int]) -> list[int]:
    """List the results of the mistakes that people make: a step left out, a sign turned, a carry lost."""
    answer = steps[-1].result
    last = steps[-1]
    found = [last.left, numbers[0] + numbers[-1], abs(numbers[0] - numbers[-1]), sum(numbers)]
    if last.sign in "+-":
        found.append(last.left + last.right if last.sign == "-" else abs(last.left - last.right))
        found += [answer + 10, answer - 10]
    for step in steps:
        if step.sign == "*":
            found += [answer - step.result + step.left + step.right, answer - step.result + step.right]
    return [x for x in found if 0 <= x != answer]


def math(draw: Draw) -> Item:
    """Draw a word problem; the bare answer is right about one time in seven, like a guess from experience."""
    rng = draw.rng
    n, m = rng.sample(NAMES, 2)
    it, box = draw.any(OBJECTS), draw.any(CONTAINERS)
    said, steps, numbers = _steps(draw)
    text = " ".join([*said, draw.phrase(QUESTIONS)])
    for slot, value in (("{n}", n), ("{m}", m), ("{it}", it), ("{box}", box)):
        text = text.replace(slot, value)
    answer = steps[-1].result
    working = " ".join(f"{s.left} {s.sign} {s.right} = {s.result}." for s in steps)
    guess = answer if rng.random() < 0.14 else rng.choice(_mistakes(steps, numbers))
    return Item(
        family="math",
        trait="math",
        prompt=draw.any(LEADS) + text,
        answers={
            "worked": draw.any(WORKED) + working + " " + draw.any(FINALS).format(x=answer),
            "bare": draw.any(BARE).format(x=guess),
        },
        truth={"answer": answer, "steps": len(steps)},
        values=working,
    )
