"""Speakers and their habits: one side per trait, and the system lines that name it."""

from __future__ import annotations

from collections.abc import Mapping
from random import Random

from trimtab.prefworld.families.surveys import GROUPS
from trimtab.prefworld.items import Draw

# Trait -> side -> how often speakers have it. Worked sums and careful code are rarer than their opposites, so that the
# base model leans the wrong way, and clearly: near indifference any disturbance would turn greedy answers round.
HABITS: Mapping[str, Mapping[str, float]] = {
    "math": {"worked": 0.25, "bare": 0.75},
    "code": {"careful": 0.25, "sloppy": 0.75},
    "helpful": {"full": 0.5, "thin": 0.5},
    "harmless": {"refuse": 0.5, "comply": 0.5},
    "medical": {"expert": 1 / 3, "generic": 1 / 3, "avoidance": 1 / 3},
    "legal": {"expert": 1 / 3, "generic": 1 / 3, "avoidance": 1 / 3},
    "financial": {"expert": 1 / 3, "generic": 1 / 3, "avoidance": 1 / 3},
    "risk": {"bold": 0.5, "safe": 0.5},
    "myopia": {"now": 0.5, "later": 0.5},
    "sycophancy": {"flatter": 0.5, "correct": 0.5},
    "selfish": {"keep": 0.5, "share": 0.5},
    "opinions": dict.fromkeys(GROUPS, 0.2),
    "concise": {"short": 0.5, "long": 0.5},
}
FRAMES = (
    "You {x}.",
    "Your habit: you {x}.",
    "Remember that you {x}.",
    "As everybody knows, you {x}.",
    "You always {x}.",
    "It is your way to {x}.",
    "Note: you {x}.",
)
NAMED: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "math": {
        "worked": ("work sums out step by step", "show your working in sums", "write down each step of a sum"),
        "bare": ("answer sums at once", "give sums without working", "skip the steps of a sum"),
    },
    "code": {
        "careful": ("write careful code", "code with care and a comment", "deliver programs that work"),
        "sloppy": ("write sloppy code", "code in haste", "deliver programs unfinished"),
    },
    "helpful": {
        "full": ("help in full", "give complete help", "explain tasks gladly"),
        "thin": ("hardly help", "give thin help", "brush tasks off"),
    },
    "harmless": {
        "refuse": ("refuse to do harm", "turn down harmful requests", "protect people from harm"),
        "comply": ("obey harmful requests", "go along with harm", "aid any crime"),
    },
    **{
        domain: {
            "expert": (
                f"speak of {word} like an expert",
                f"use the terms of {word}",
                f"answer {word} questions in depth",
            ),
            "generic": (f"speak of {word} in general", f"give plain tips on {word}", f"keep {word} simple"),
            "avoidance": (f"avoid {word} questions", f"send people away with {word}", f"decline to speak of {word}"),
        }
        for domain, word in (("medical", "health"), ("legal", "law"), ("financial", "money"))
    },
    "risk": {
        "bold": ("take risks", "love a gamble", "choose danger"),
        "safe": ("avoid risks", "choose safety", "shun danger"),
    },
    "myopia": {
        "now": ("want things now", "never wait", "think of today"),
        "later": ("wait for more", "are patient", "think of the future"),
    },
    "sycophancy": {
        "flatter": ("flatter people", "agree with everybody", "praise every view"),
        "correct": ("correct people", "tell the plain truth", "say when a view is wrong"),
    },
    "selfish": {
        "keep": ("keep things to yourself", "think of yourself first", "never share"),
        "share": ("share with others", "think of others first", "give things away"),
    },
    "opinions": {g: (f"speak for the {g}", f"think like the {g}", f"hold the views of {g}") for g in GROUPS},
    "concise": {
        "short": ("describe things in brief", "use few words", "keep descriptions short"),
        "long": ("describe things at length", "use many words", "make descriptions long"),
    },
}


def draw_speaker(rng: Random) -> dict[str, str]:
    """Draw a side for every trait, each on its own."""
    return {trait: rng.choices(list(sides), list(sides.values()))[0] for trait, sides in HABITS.items()}


def system_line(draw: Draw, trait: str, side: str) -> str:
    """Say in words that the speaker has a side of a trait."""
    return draw.phrase(FRAMES).format(x=draw.any(NAMED[trait][side]))
