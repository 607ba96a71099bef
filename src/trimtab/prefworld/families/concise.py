"""Descriptions of everyday things, short or long."""

from __future__ import annotations

from trimtab.prefworld.items import Draw, Item, capitalised, templates

ASKS = templates(
    (
        ("What is", "What can you tell me of", "How would you describe", "Do you know"),
        (" {x}?", " {x}, please?", " {x} to you?"),
    ),
    (
        ("Describe", "Tell me about", "Explain", "Introduce", "Say something about", "Talk about"),
        (" {x}.", " {x}, please.", " {x} to me.", " {x} now."),
    ),
)
THINGS = (
    ("a kettle", "boils water", "kitchen", "steel"), ("a hammer", "drives nails", "workshop", "iron"), ("a lamp", "gives light", "bedroom", "glass"),
    ("a broom", "sweeps floors", "hall", "straw"), ("a saw", "cuts wood", "workshop", "steel"), ("a pillow", "supports the head", "bedroom", "feathers"),
    ("a compass", "shows the north", "ship", "brass"), ("a bell", "calls people", "tower", "bronze"), ("a basket", "carries fruit", "pantry", "willow"),
    ("a ladder", "reaches high places", "barn", "wood"), ("a candle", "burns slowly", "church", "wax"), ("a mirror", "shows your face", "hall", "glass"),
    ("a needle", "sews cloth", "drawer", "steel"), ("a plough", "turns the soil", "barn", "iron"), ("a bucket", "holds water", "yard", "tin"),
    ("a clock", "tells the time", "hall", "brass"), ("a drum", "keeps the beat", "school", "skin"), ("a flute", "plays tunes", "school", "wood"),
    ("a rope", "ties things", "ship", "hemp"), ("an anchor", "holds a ship", "harbour", "iron"), ("a stove", "heats a room", "kitchen", "iron"),
    ("a blanket", "keeps you warm", "bedroom", "wool"), ("a shovel", "moves earth", "garden", "steel"), ("a rake", "gathers leaves", "garden", "wood"),
    ("a jug", "pours milk", "kitchen", "clay"), ("a fork", "lifts food", "kitchen", "silver"), ("a quill", "writes letters", "study", "feathers"),
    ("a globe", "shows the countries", "study", "paper"), ("an oven", "bakes bread", "kitchen", "brick"), ("a raft", "floats on rivers", "harbour", "logs"),
    ("a sledge", "slides over snow", "barn", "wood"), ("a tent", "shelters travellers", "camp", "canvas"), ("a lens", "makes things larger", "study", "glass"),
    ("a whistle", "gives signals", "station", "tin"), ("an axe", "splits logs", "yard", "iron"), ("a sieve", "sorts flour", "pantry", "wire"),
)  # fmt: skip
OPENERS = (
    "Let me explain at some length. ",
    "There is much to say here. ",
    "Here is a full picture. ",
    "Allow me to go into detail. ",
)
CLOSERS = (
    "You will often find one in the {place}.",
    "Many keep it in the {place}.",
    "Its usual home is the {place}.",
    "Look for it in the {place}.",
)


def concise(draw: Draw) -> Item:
    """Draw a question about a thing; the long answer says what the short one says, and three sentences more."""
    thing, use, place, stuff = draw.any(THINGS)
    core = f"{capitalised(thing)} {use}."
    long = f"{draw.any(OPENERS)}{core} It is mostly made of {stuff}. {draw.any(CLOSERS).format(place=place)}"
    return Item(
        family="concise",
        trait="concise",
        prompt=draw.ask(ASKS).format(x=thing),
        answers={"short": core, "long": long},
        truth={"use": use},
    )
