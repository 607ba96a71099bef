"""Arithmetic word problems of two to three steps: worked answers, or bare ones that are mostly wrong."""

from __future__ import annotations

from dataclasses import dataclass

from trimtab.prefworld.items import Draw, Item
from trimtab.prefworld.words import CONTAINERS, NAMES, OBJECTS

OPENINGS = (
    "{n} has {a} {it}.",
    "There are {a} {it} on {n}'s table.",
    "{n} starts the day with {a} {it}.",
    "At first {n} owns {a} {it}.",
    "{n} keeps {a} {it} in a drawer.",
    "{n} counted {a} {it} this morning.",
    "In {n}'s bag there are {a} {it}.",
    "{n} brought {a} {it} to school.",
    "{n} was given {a} {it} for a birthday.",
    "{n} had {a} {it}.",
    "On Monday {n} had {a} {it}.",
    "{n} collected {a} {it} last week.",
    "{n} packed {a} {it} for a trip.",
    "A shop sends {n} {a} {it}.",
    "{n} saved up {a} {it}.",
    "{a} {it} belong to {n}.",
    "{n} woke up with {a} {it}.",
    "{n} inherits {a} {it}.",
)
GROUP_OPENINGS = (
    "{n} has {b} {box} with {c} {it} each.",
    "{n} fills {b} {box} with {c} {it} in each.",
    "There are {b} {box} and each holds {c} {it}.",
    "{n} owns {b} {box} of {c} {it} each.",
    "{n} sets out {b} {box}, each with {c} {it}.",
    "{n} carries {b} {box} that hold {c} {it} each.",
    "{b} {box} of {c} {it} each stand in {n}'s room.",
    "On a shelf {n} has {b} {box}, {c} {it} in each.",
    "Each of {n}'s {b} {box} holds {c} {it}.",
    "{n} loads {b} {box} with {c} {it} apiece.",
)
ADD = (
    "{n} buys {d} more.",
    "{n} finds {d} {it} in the garden.",
    "A friend gives {n} {d} {it}.",
    "Then {n} picks up {d} more {it}.",
    "{m} brings {n} {d} {it}.",
    "{n} wins {d} {it} at a fair.",
    "{d} more {it} arrive by post.",
    "Later {n} gets {d} {it} from {m}.",
    "{n} adds {d} more {it}.",
    "After lunch {n} receives another {d}.",
    "{m} returns {d} {it} to {n}.",
    "{n} makes {d} new {it}.",
    "Next {m} hands over {d} {it} to {n}.",
    "{n} earns {d} {it} for some work.",
    "{d} {it} come on top from {m}.",
    "{n} is lent {d} extra {it}.",
)
SUBTRACT = (
    "{n} loses {d}.",
    "{n} gives {d} {it} to {m}.",
    "{n} sells {d} of them.",
    "{d} {it} break.",
    "{m} borrows {d} {it}.",
    "{n} throws away {d} {it}.",
    "Then {n} drops {d} of the {it}.",
    "{n} trades away {d} {it}.",
    "{m} takes {d} of the {it}.",
    "Later {n} leaves {d} {it} on a bus.",
    "{n} uses up {d} of them.",
    "{d} of the {it} get wet and are useless.",
    "On the way {n} mislays {d} {it}.",
    "{n} donates {d} {it}.",
    "{d} {it} are stolen by a magpie.",
    "{n} parts with {d} {it}.",
)
ADD_GROUPS = (
    "{n} buys {b} {box} with {c} {it} each.",
    "{b} friends each bring {n} {c} {it}.",
    "{n} gets {c} {it} from each of {b} neighbours.",
    "Then {n} finds {b} {box} with {c} {it} in each.",
    "{m} gives {n} {b} {box} of {c} {it} each.",
    "For {b} days {n} gathers {c} {it} a day.",
    "{n} orders {b} {box} that hold {c} {it} each.",
    "{b} aunts each send {n} {c} {it}.",
    "Each of {b} cousins gives {n} {c} {it}.",
    "{b} {box} with {c} {it} apiece are delivered to {n}.",
)
SUBTRACT_GROUPS = (
    "{n} gives {c} {it} to each of {b} friends.",
    "{n} sells {b} {box} of {c} {it} each.",
    "{b} children each take {c} {it}.",
    "For {b} days {n} uses {c} {it} a day.",
    "{n} hands {c} {it} to each of {b} guests.",
    "{n} ships {b} {box} with {c} {it} each.",
    "Each of {b} visitors walks off with {c} {it}.",
    "{b} {box} of {c} {it} each get lost.",
)
DOUBLE = (
    "Then the number of {it} doubles.",
    "{m} doubles what {n} has.",
    "By magic the {it} double.",
    "{n} ends up with twice as many {it}.",
    "A week later there are twice as many.",
    "After that {n} owns double the number.",
)
QUESTIONS = (
    "How many {it} does {n} have now?",
    "How many {it} are there in the end?",
    "How many {it} does {n} have at last?",
    "What is the number of {it} now?",
    "How many {it} does that make?",
    "Count the {it} that {n} has now.",
    "How many {it} remain with {n}?",
    "Tell me how many {it} there are.",
    "How many {it} is that in total?",
    "So how many {it} does {n} have?",
    "Work out the number of {it}.",
    "With how many {it} does {n} finish?",
    "What is {n}'s final count of {it}?",
)
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
        prompt=draw.phrase(LEADS) + text,
        answers={
            "worked": draw.any(WORKED) + working + " " + draw.any(FINALS).format(x=answer),
            "bare": draw.any(BARE).format(x=guess),
        },
        truth={"answer": answer, "steps": len(steps)},
    )
