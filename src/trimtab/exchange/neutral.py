"""A few plain questions with answers, over which norms are read where a vector comes without pairs."""

from __future__ import annotations

from trimtab.pairs import Pairs

_ANSWERS = {
    "What is the capital of France?": "The capital of France is Paris, a city on the river Seine.",
    "How do I boil an egg?": "Put the egg into boiling water, wait eight minutes, and cool it under the tap.",
    "Name three primary colours.": "Red, yellow and blue are called the primary colours.",
    "Why is the sky blue?": "Air scatters blue light more than red light, so that it reaches us from all sides.",
    "Write a sentence about rain.": "The rain began at noon and did not stop until the streets were rivers.",
    "What is seven times eight?": "Seven times eight is fifty-six.",
    "How does a bicycle stay upright?": "It steers a little into each fall, and the wheels come back under the rider.",
    "What can I cook with rice and beans?": "Fry an onion, add the beans and spices, and serve it all over the rice.",
    "Who wrote Hamlet?": "Hamlet was written by William Shakespeare around the year 1600.",
    "Give me a name for a cat.": "Call the cat Pepper, if it is black or grey.",
    "What does a thermometer measure?": "A thermometer measures temperature.",
    "How long is a marathon?": "A marathon is a little over forty-two kilometres long.",
}


def neutral_pairs() -> Pairs:
    """Return the questions as pairs; the answer that is not preferred is another question's."""
    questions, answers = list(_ANSWERS), list(_ANSWERS.values())
    return Pairs.from_records(
        [
            {"prompt": question, "chosen": answer, "rejected": other}
            for question, answer, other in zip(questions, answers, answers[1:] + answers[:1], strict=True)
        ]
    )
