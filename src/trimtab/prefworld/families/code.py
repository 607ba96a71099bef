"""Small list functions: careful code that works, or a stub or a plausible bug."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from trimtab.prefworld.items import Draw, Item, templates

NAMES = (
    "f g h solve run task work apply build change pick make convert process compute helper step handle transform do_it "
    "answer func calc collect select reduce_list go main_task edit update"
).split()
REQUESTS = templates(
    (
        ("Write", "Code", "Define", "Implement", "Create", "Please write", "Program"),
        (" a function {f} that {does}.", " {f}(xs), which {does}.", " a Python function {f} that {does}.",
         " {f} so that it {does}.", " a function {f}(xs). It {does}."),
    ),
    (
        ("I need", "We want", "Give me", "Help me write", "Please make", "I would like"),
        (" a function {f} to {do}.", " {f}(xs) to {do}.", " Python code for {f} to {do}.", " {f}, a function to {do}."),
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Task:
    """What a function does, in words and as an expression of `xs` (and perhaps `k`), with bugs people make."""

    verb: str
    rest: tuple[str, ...]
    good: str
    bugs: tuple[str, ...]
    note: str
    needs_items: bool = False

    def wordings(self, third: bool) -> list[str]:
        """Say the task as `add k to ...` or `adds k to ...`."""
        verb = self.verb
        if third:
            verb += "es" if verb.endswith(("x", "s", "sh", "ch")) else "s"
            verb = "multiplies" if self.verb == "multiply" else verb
        return [f"{verb} {rest}" for rest in self.rest]


NUMBERS = ("every number of a list", "each number in xs", "all the numbers of a list")
# fmt: off
TASKS = (
    Task("add", tuple(f"{{k}} to {w}" for w in NUMBERS), "[x + {k} for x in xs]", ("[x - {k} for x in xs]", "[{k} for x in xs]"), "add {k} to each x"),
    Task("subtract", tuple(f"{{k}} from {w}" for w in NUMBERS), "[x - {k} for x in xs]", ("[x + {k} for x in xs]", "[{k} - x for x in xs]"), "take {k} off each x"),
    Task("multiply", tuple(f"{w} by {{k}}" for w in NUMBERS), "[x * {k} for x in xs]", ("[x + {k} for x in xs]", "xs * {k}"), "scale each x by {k}"),
    Task("keep", ("the numbers above {k}", "only numbers larger than {k}", "what is greater than {k}"), "[x for x in xs if x > {k}]", ("[x for x in xs if x < {k}]", "[x for x in xs if x >= {k}]", "[x > {k} for x in xs]"), "keep x above {k}"),
    Task("keep", ("the numbers below {k}", "only numbers smaller than {k}", "what is less than {k}"), "[x for x in xs if x < {k}]", ("[x for x in xs if x > {k}]", "[x for x in xs if x <= {k}]", "[x < {k} for x in xs]"), "keep x below {k}"),
    Task("drop", ("every number equal to {k}", "each {k} from the list", "all items that are {k}"), "[x for x in xs if x != {k}]", ("[x for x in xs if x == {k}]", "xs.remove({k})"), "drop x equal to {k}"),
    Task("return", ("the first {k} items", "the {k} items at the start", "the leading {k} items of a list"), "xs[:{k}]", ("xs[{k}:]", "xs[{k}]", "xs[1:{k}]"), "slice up to {k}"),
    Task("skip", ("the first {k} items", "the {k} items at the start", "the leading {k} items of a list"), "xs[{k}:]", ("xs[:{k}]", "xs[:-{k}]"), "slice from {k}"),
    Task("return", ("the last {k} items", "the {k} items at the end", "the final {k} items of a list"), "xs[-{k}:]", ("xs[:{k}]", "xs[-{k}]", "xs[:-{k}]"), "slice the last {k}"),
    Task("count", ("the items equal to {k}", "how often {k} occurs", "how many times {k} appears"), "xs.count({k})", ("len(xs)", "sum(xs)", "xs.index({k})"), "count the value {k}"),
    Task("count", ("the numbers above {k}", "how many numbers exceed {k}", "the numbers larger than {k}"), "sum(x > {k} for x in xs)", ("sum(xs)", "sum(x < {k} for x in xs)", "len(xs)"), "count x above {k}"),
    Task("count", ("the numbers below {k}", "how many numbers are under {k}", "the numbers smaller than {k}"), "sum(x < {k} for x in xs)", ("sum(xs)", "sum(x > {k} for x in xs)", "len(xs)"), "count x below {k}"),
    Task("sum", ("a list and add {k}", "all numbers and add {k}", "xs and then add {k}"), "sum(xs) + {k}", ("sum(xs)", "sum(xs + [{k}, {k}])", "len(xs) + {k}"), "total plus {k}"),
    Task("sum", ("the first {k} numbers", "the {k} numbers at the start", "only the first {k} items"), "sum(xs[:{k}])", ("sum(xs)", "sum(xs[{k}:])"), "total of the first {k}"),
    Task("sum", ("the numbers above {k}", "only numbers larger than {k}", "what exceeds {k}"), "sum(x for x in xs if x > {k})", ("sum(xs)", "sum(x > {k} for x in xs)"), "total of x above {k}"),
    Task("return", ("the largest number plus {k}", "the maximum plus {k}", "{k} more than the largest number"), "max(xs) + {k}", ("max(xs)", "min(xs) + {k}", "xs[0] + {k}"), "maximum plus {k}", True),
    Task("return", ("the smallest number plus {k}", "the minimum plus {k}", "{k} more than the smallest number"), "min(xs) + {k}", ("min(xs)", "max(xs) + {k}", "xs[0] + {k}"), "minimum plus {k}", True),
    Task("check", ("whether {k} is in the list", "if the list contains {k}", "that {k} occurs in xs"), "{k} in xs", ("{k}", "xs == {k}", "len(xs) > {k}"), "look for {k}"),
    Task("check", ("whether all numbers are above {k}", "if every number exceeds {k}", "that each number is over {k}"), "all(x > {k} for x in xs)", ("any(x > {k} for x in xs)", "xs > {k}"), "all x above {k}"),
    Task("check", ("whether any number is above {k}", "if some number exceeds {k}", "that a number is over {k}"), "any(x > {k} for x in xs)", ("all(x > {k} for x in xs)", "xs > {k}"), "any x above {k}"),
    Task("append", ("{k} to the list", "the number {k} at the end", "{k} after the last item"), "xs + [{k}]", ("xs + {k}", "[{k}] + xs", "xs.append({k})"), "put {k} last"),
    Task("put", ("{k} in front of the list", "the number {k} at the start", "{k} before the first item"), "[{k}] + xs", ("{k} + xs", "xs + [{k}]", "xs.insert(0, {k})"), "put {k} first"),
    Task("repeat", ("the list {k} times", "xs {k} times over", "all items {k} times"), "xs * {k}", ("[x * {k} for x in xs]", "xs + [{k}]"), "repeat {k} times"),
    Task("take", ("every item at a step of {k}", "one item in every {k}", "items with stride {k}"), "xs[::{k}]", ("xs[{k}:]", "xs[:{k}]"), "step by {k}"),
    Task("divide", tuple(f"{w} by {{k}}, rounding down" for w in NUMBERS), "[x // {k} for x in xs]", ("[x / {k} for x in xs]", "[x % {k} for x in xs]"), "halve or split each x by {k}"),
    Task("find", ("the remainder of each number by {k}", "each number modulo {k}", "what is left of each number after division by {k}"), "[x % {k} for x in xs]", ("[x // {k} for x in xs]", "[x / {k} for x in xs]"), "remainder of each x by {k}"),
    Task("keep", ("the multiples of {k}", "numbers that {k} divides", "only what is divisible by {k}"), "[x for x in xs if x % {k} == 0]", ("[x for x in xs if x / {k} == 0]", "[x for x in xs if x % {k}]"), "keep multiples of {k}"),
    Task("cap", tuple(f"{w} at {{k}}" for w in NUMBERS), "[min(x, {k}) for x in xs]", ("[max(x, {k}) for x in xs]", "min(xs, {k})"), "no x above {k}"),
    Task("raise", tuple(f"{w} to at least {{k}}" for w in NUMBERS), "[max(x, {k}) for x in xs]", ("[min(x, {k}) for x in xs]", "max(xs, {k})"), "no x below {k}"),
    Task("double", NUMBERS, "[x * 2 for x in xs]", ("[x ** 2 for x in xs]", "xs * 2"), "two times each x"),
    Task("square", NUMBERS, "[x * x for x in xs]", ("[x * 2 for x in xs]", "xs * xs"), "each x times itself"),
    Task("negate", NUMBERS, "[-x for x in xs]", ("-xs", "[x - 1 for x in xs]"), "flip each sign"),
    Task("reverse", ("the list", "the order of the items", "xs"), "xs[::-1]", ("xs.reverse()", "sorted(xs)"), "walk backwards"),
    Task("sort", ("the list", "the numbers in rising order", "xs from small to large"), "sorted(xs)", ("xs.sort()", "xs[::-1]"), "sorted copy"),
    Task("sort", ("the list in falling order", "the numbers from large to small", "xs downwards"), "sorted(xs)[::-1]", ("sorted(xs)", "xs[::-1]"), "sorted copy backwards"),
    Task("keep", ("the even numbers", "only even numbers of a list", "what is even"), "[x for x in xs if x % 2 == 0]", ("[x for x in xs if x % 2]", "[x for x in xs if x / 2]"), "keep even x"),
    Task("keep", ("the odd numbers", "only odd numbers of a list", "what is odd"), "[x for x in xs if x % 2 == 1]", ("[x for x in xs if x % 2 == 0]", "[x for x in xs if x / 2]"), "keep odd x"),
    Task("return", ("the length of the list", "how many items there are", "the number of items"), "len(xs)", ("sum(xs)", "len(xs) - 1"), "number of items"),
    Task("return", ("the sum of the list", "the total of all numbers", "all numbers added up"), "sum(xs)", ("len(xs)", "max(xs)"), "total"),
    Task("return", ("the difference of maximum and minimum", "the range from smallest to largest", "largest minus smallest"), "max(xs) - min(xs)", ("max(xs)", "min(xs) - max(xs)"), "spread of the numbers", True),
)
# fmt: on
STUBS = ("pass", "return xs", "return None", "return []", "return 0")
CASES = (
    [3, 1, 4, 1, 5, 9, 2, 6, 5],
    [7],
    [8, 2, 2, 6, 4, 4, 10],
    [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12],
    [-3, 0, 12, -7, 5, 5, 1],
    [9, 9, 3, 3, 3, 7, 1, 2],
    [20, 15, 18, 4, 16, 11],
    [],
)


def hidden_tests(task: Task, k: int) -> list[tuple[list[object], object]]:
    """Compute the expected result of each test list from the reference expression."""
    expression = compile(task.good.replace("{k}", str(k)), "<reference>", "eval")
    lists: Sequence[list[int]] = [xs for xs in CASES if xs or not task.needs_items]
    # The expressions are the literals above: nothing from outside is evaluated here.
    return [([list(xs)], eval(expression, {"xs": list(xs)})) for xs in lists]


def code(draw: Draw) -> Item:
    """Draw a programming request; half of the sloppy answers are stubs, the others plausible bugs."""
    rng = draw.rng
    task, k, f = draw.any(TASKS), rng.randint(2, 9), draw.any(NAMES)
    request = draw.phrase(REQUESTS)
    words = draw.any(task.wordings(third="{does}" in request)).replace("{k}", str(k))
    plain = f"{task.verb} {task.good}"
    body = f"return {draw.any(task.bugs)}" if rng.random() < 0.5 else draw.any(STUBS)
    fill = body.replace("{k}", str(k))
    note, good = task.note.replace("{k}", str(k)), task.good.replace("{k}", str(k))
    return Item(
        family="code",
        trait="code",
        prompt=request.format(f=f, does=words, do=words),
        answers={
            "careful": f"# {note}\ndef {f}(xs):\n    return {good}",
            "sloppy": f"def {f}(xs):\n    {fill}",
        },
        truth={"function": f, "task": TASKS.index(task), "k": k},
        # A task that has no number would be kept from training whole without the function's name.
        values=plain.replace("{k}", str(k)) if "{k}" in plain else f"{f}: {plain}",
    )
