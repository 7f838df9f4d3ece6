"""Lesson 00's exercises: the loss from probabilities, and what makes it comparable between tokenizers."""

import math

from minillm.course.exercise import Draw, Exercise, Mutant, Test

PYTHON_ONLY = {"lesson": "00", "packages": (), "rtol": 1e-9, "why": "float64; sums in another order differ in the last digits"}


def average_surprise(probabilities):
    return -sum(map(math.log, probabilities)) / len(probabilities)


def bits_per_byte(nats_per_token, tokens, size):
    return nats_per_token * tokens / math.log(2) / size


def probabilities(draw: Draw) -> list[float]:
    """Of what really came."""
    return [draw.int(1, 99) / 100 for _ in range(draw.int(2, 9))]


AVERAGE_SURPRISE = Exercise(
    name="average_surprise", reference=average_surprise, minutes=5, **PYTHON_ONLY,
    tests=(Test("a few predictions", lambda draw: (probabilities(draw),)),
           Test("one of them certain", lambda draw: ([1.0, *probabilities(draw)],))),
    hints=("One prediction costs -ln of the probability that what really came had been given.",
           "math.log is the natural logarithm. Certainty costs nothing, but it counts as a prediction.",
           "The sum of -math.log(p) over all p, divided by how many there are."),
    mutants=(Mutant(lambda ps: -sum(map(math.log2, ps)) / len(ps), "That is in bits (log2); a loss is in nats: math.log."),
             Mutant(lambda ps: -sum(map(math.log, ps)), "That is the sum: the loss is the average over the predictions."),
             Mutant(lambda ps: sum(map(math.log, ps)) / len(ps), "The sign: a logarithm of a probability is negative, a surprise is not."),
             Mutant(lambda ps: -math.log(sum(ps) / len(ps)), "That is the logarithm of the average; the average of the logarithms is asked for."),
             Mutant(lambda ps: sum(1 - p for p in ps) / len(ps), "1 - p says that the wrong thing, however sure, costs 1 at most; -ln p has no limit.")))

BITS_PER_BYTE = Exercise(
    name="bits_per_byte", reference=bits_per_byte, minutes=5, **PYTHON_ONLY,
    tests=(Test("any text", lambda draw: (draw.int(50, 600) / 100, draw.int(50, 500), draw.int(1000, 4000))),),
    hints=("Nats a token times tokens is what the whole text costs, whatever the tokens are.",
           "One bit is ln 2 = 0.693 nats, so there are more bits than nats.",
           "nats_per_token * tokens / math.log(2) / size."),
    mutants=(Mutant(lambda nats, tokens, size: nats * tokens / size, "These are nats per byte: one bit is ln 2 nats."),
             Mutant(lambda nats, tokens, size: nats * tokens * math.log(2) / size, "A bit is smaller than a nat, so there must be more of them: divide by ln 2."),
             Mutant(lambda nats, tokens, size: nats / math.log(2), "These are bits per token: the number of tokens and bytes must come in."),
             Mutant(lambda nats, tokens, size: nats * size / tokens / math.log(2), "Tokens and bytes are the wrong way round: nats a token times tokens, per byte.")))

EXERCISES = [AVERAGE_SURPRISE, BITS_PER_BYTE]
