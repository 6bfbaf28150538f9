"""A text of the tests' own, the same whatever else changes: lines like a program's."""

import random
import string

_PARTS = "ba de fi go lu me no pa qui ra si ta um ver wo xe yt za str th ing er ion".split()
_FORMS = (
    "def {0}_{1}({2}: int) -> {3}:",
    '    """The {0} of {1} {2}, and {3}\'s {4}."""',
    "    {0} = {1}.{2}({3}) + {5}",
    "    if {0} != {5}:  # {1}, {2} and {3} don't",
    "        return [{0} for {0} in {1}[{5}:]]",
    "",
    "{0} {1} {2}: {3}; {4} ({5}%).",
)


def _text() -> str:
    draw = random.Random(0)
    words = ["".join(draw.choices(_PARTS, k=draw.randint(1, 4))) for _ in range(400)]
    words[:8] = "the of a and in to is for".split()
    common = [1 / (rank + 2) for rank in range(len(words))]
    lines = []
    for _ in range(420):
        five = draw.choices(words, common, k=5)
        lines.append(draw.choice(_FORMS).format(*five, draw.randint(0, 999)))
    return "\n".join([*lines, string.ascii_uppercase, string.punctuation]) + "\n"


TEXT = _text()
