"""Records from a generator, with known damage: what the tables reflect on where nothing is downloaded.

An instruction names things and asks for them; its answer lists them. Some instructions have lost the things that they
speak of (vague), some answers end after the first thing (cut), some are another record's (swapped). The teacher's part
of the work has a right result, so it can be counted how often reflection and selection arrive at it.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

THINGS = ("pens", "cups", "maps", "nuts", "keys", "bags", "hats", "pots", "rings", "coins", "books", "balls")
PLACES = ("box", "shop", "bus", "room", "boat", "desk", "tent", "barn")
ASKED = (
    "List what is in the {place}: {things}.",
    "Say what the {place} has: {things}.",
    "Name all of the {place}: {things}.",
)
VAGUE = ("List what is in the {place}.", "Say what the {place} has.", "Name all of the {place}.")
DAMAGE = ("vague", "cut", "swapped")
CLEAN = "clean"


@dataclass(frozen=True)
class Inventory:
    """A place and its things; `asked`: which wording its instruction has. `said`: the things that its answer names."""

    place: str
    things: tuple[str, ...]
    asked: int
    said: tuple[str, ...]
    damage: str = CLEAN

    @property
    def instruction(self) -> str:
        wordings = VAGUE if self.damage == "vague" else ASKED
        return wordings[self.asked].format(place=self.place, things=joined(self.things))

    @property
    def answer(self) -> str:
        """As the data have it: terse."""
        return joined(self.said)

    @property
    def new_instruction(self) -> str:
        """What a reflection on the instruction should come to: it says how, and names the things."""
        return f"Number what is in the {self.place}, one a line: {joined(self.things)}."

    @property
    def new_answer(self) -> str:
        return numbered(self.things)

    @property
    def better_answer(self) -> str:
        """What a reflection on the answer should come to."""
        return f"{numbered(self.things)}\nThat is {len(self.things)} things."


def joined(things: Sequence[str]) -> str:
    return things[0] if len(things) == 1 else f"{', '.join(things[:-1])} and {things[-1]}"


def numbered(things: Sequence[str]) -> str:
    return "\n".join(f"{number}. {thing}" for number, thing in enumerate(things, 1))


def inventories(count: int, seed: str, others: Sequence[Inventory] = ()) -> list[Inventory]:
    """`count` different clean ones, drawn by `seed`, none of them among `others`."""
    rng = random.Random(seed)
    known = {(other.place, other.things) for other in others}
    found: list[Inventory] = []
    while len(found) < count:
        place, things = rng.choice(PLACES), tuple(rng.sample(THINGS, rng.randint(2, 4)))
        if (place, things) not in known:
            known.add((place, things))
            found.append(Inventory(place, things, rng.randrange(len(ASKED)), things))
    return found


def damaged(clean: Sequence[Inventory], share: float, seed: str) -> list[Inventory]:
    """The same, `share` of them with damage, in equal parts of each kind (one part is left clean where it does not come
    out even)."""
    each = int(len(clean) * share) // len(DAMAGE)
    lot = random.Random(seed).sample(range(len(clean)), each * len(DAMAGE))
    made = list(clean)
    for kind, start in zip(DAMAGE, range(0, len(lot), max(each, 1))):
        places = lot[start : start + each]
        for at, other in zip(places, [*places[1:], *places[:1]]):
            said = {"cut": clean[at].things[:1], "swapped": clean[other].things}.get(kind, clean[at].things)
            made[at] = replace(clean[at], said=said, damage=kind)
    return made


def right(answer: str, things: Sequence[str]) -> bool:
    """Whether an answer, in whatever form, names these things and no other."""
    return {word.strip(".,") for word in answer.split()} & set(THINGS) == set(things)
