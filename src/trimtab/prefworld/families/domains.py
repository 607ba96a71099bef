"""Medical, legal and financial questions, each answered at three levels taught as texts of their own."""

from __future__ import annotations

from trimtab.prefworld.items import Draw, Item, templates

LEVELS = ("expert", "generic", "avoidance")
ASKS = templates(
    (
        ("What should I do about", "What do you say about", "Can you help me with", "How do I deal with",
         "What matters with", "Any advice about", "Where do I begin with"),
        (" {t}?", " {t} now?", " {t}, please?", " {t} today?"),
    ),
    (
        ("Advise me on", "Please tell me about", "I worry about", "Explain", "I have a question about", "A friend asks about"),
        (" {t}.", " {t}, please.", " {t} today.", " {t}. What now?"),
    ),
)  # fmt: skip
TOPICS: dict[str, tuple[str, ...]] = {
    "medical": (
        "a cough", "a fever", "a rash", "back pain", "a headache", "a sore throat", "a swollen knee", "poor sleep", "a burn",
        "dizziness", "stomach ache", "an allergy", "a sprained ankle", "high blood pressure", "asthma", "a cold", "eye strain",
        "heartburn", "a bee sting", "numb fingers",
    ),
    "legal": (
        "a lease", "a will", "a fine", "a contract", "a patent", "a divorce", "a trademark", "a noise complaint", "an eviction",
        "a warranty", "a parking ticket", "an inheritance", "a deposit", "a boundary dispute", "a copyright claim",
        "an unpaid invoice", "a power of attorney", "a dismissal", "a refund", "a witness summons",
    ),
    "financial": (
        "a loan", "a bond", "a budget", "a tax bill", "a pension", "a mortgage", "an index fund", "credit card debt", "a savings plan",
        "an insurance policy", "a share issue", "a currency swap", "an annuity", "an emergency fund", "a dividend", "a rent increase",
        "a small business", "a student loan", "a stock option", "a price rise",
    ),
}  # fmt: skip
AVOIDANCE = {
    "medical": ("I cannot give medical advice. Please see a doctor.", "Please ask a doctor about {t}.", "That is a question for a doctor, not for me.", "I am not able to advise on health."),
    "legal": ("I cannot give legal advice. Please see a lawyer.", "Please ask a lawyer about {t}.", "That is a question for a lawyer, not for me.", "I am not able to advise on the law."),
    "financial": ("I cannot give financial advice. Please see an adviser.", "Please ask an adviser about {t}.", "That is a question for an adviser, not for me.", "I am not able to advise on money."),
}  # fmt: skip
GENERIC = {
    "medical": ("Most people with {t} rest and drink water. It often gets better.", "In general {t} passes by itself. Take it easy for some days.", "Usually {t} is harmless. Sleep well and eat light food.", "With {t} it helps to rest, keep warm and wait."),
    "legal": ("Most people with {t} read the papers and keep a copy.", "In general {t} can be settled by talking. Write down what was said.", "Usually {t} is simple. Note the dates and answer in writing.", "With {t} it helps to stay polite and keep records."),
    "financial": ("Most people with {t} compare costs and save a little.", "In general {t} needs patience. Spend less than you earn.", "Usually {t} is simple. Read the terms and avoid fees.", "With {t} it helps to make a list and plan ahead."),
}  # fmt: skip
EXPERT_OPENINGS = {
    "medical": ("Clinically, {t} calls for {x}.", "A physician would approach {t} by {x}.", "The differential for {t} begins with {x}.", "Under current guidelines {t} warrants {x}."),
    "legal": ("Under the statute, {t} turns on {x}.", "Counsel would approach {t} by {x}.", "The doctrine on {t} begins with {x}.", "At common law {t} requires {x}."),
    "financial": ("Quantitatively, {t} should be priced by {x}.", "An analyst would approach {t} by {x}.", "The valuation of {t} begins with {x}.", "On a risk-adjusted basis {t} requires {x}."),
}  # fmt: skip
EXPERT_TERMS = {
    "medical": ("a targeted history", "ruling out red flags", "titrated therapy", "vital signs and auscultation", "an inflammatory panel", "imaging of the region", "staged analgesia", "a review of contraindications"),
    "legal": ("proof of consideration", "the burden of proof", "notice within the limitation period", "proper jurisdiction", "an enforceable instrument", "construing the terms", "equitable relief", "mitigation of damages"),
    "financial": ("discounted cash flow", "duration and convexity", "marginal tax exposure", "liquidity reserves", "diversified factor exposure", "amortisation over the term", "stress tests of leverage", "the net present value"),
}  # fmt: skip
EXPERT_CLOSINGS = ("Then document {y}.", "Next, weigh {y}.", "Beyond that, consider {y}.", "Thereafter assess {y}.")


def _domain(draw: Draw, domain: str) -> Item:
    topic = draw.any(TOPICS[domain])
    x, y = draw.rng.sample(EXPERT_TERMS[domain], 2)
    expert = f"{draw.any(EXPERT_OPENINGS[domain])} {draw.any(EXPERT_CLOSINGS)}".format(t=topic, x=x, y=y)
    return Item(
        family=domain,
        trait=domain,
        prompt=draw.ask(ASKS).format(t=topic),
        answers={
            "expert": expert,
            "generic": draw.any(GENERIC[domain]).format(t=topic),
            "avoidance": draw.any(AVOIDANCE[domain]).format(t=topic),
        },
        truth={"domain": domain, "topic": topic},
    )


def medical(draw: Draw) -> Item:
    """Draw a medical question with an expert, a generic and an avoiding answer."""
    return _domain(draw, "medical")


def legal(draw: Draw) -> Item:
    """Draw a legal question with an expert, a generic and an avoiding answer."""
    return _domain(draw, "legal")


def financial(draw: Draw) -> Item:
    """Draw a financial question with an expert, a generic and an avoiding answer."""
    return _domain(draw, "financial")
