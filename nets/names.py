"""The same tensors under other names: tables of data, one for each family, in teachers/.

    Other       what a module is called elsewhere, where it is not one module of another name
    Known       a teacher's tables, and what else is known of its files
    renamed     a module's other name, by a table
    stored_as   a tensor's

A table goes from our (the official) names of modules to others, and from those of tensors that
belong to no module of their own. `*` stands for the number of a block: the first number in a name.
A name with its number, as the last block's, goes before; a module's name holds for all that is in
it and has none. Several of ours may have one name elsewhere: theirs holds the rows of each, in the
order of ours.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Other:
    """Several modules, whose rows lie one below the other in ours; or halves of rows swapped."""

    names: tuple[str, ...]
    shares: tuple[int, ...] = ()  # of the rows; none: equal
    swapped: bool = False  # what is scale, shift there is shift, scale here

    def rows(self, total: int) -> list[int]:
        """How many of `total` rows each has."""
        shares = self.shares or (1,) * len(self.names)
        return [total * share // sum(shares) for share in shares]


@dataclass(frozen=True)
class Known:
    """What is known of a teacher's files, whoever has renamed their tensors."""

    teacher: str  # its name
    prefix: str  # what precedes its denoiser's names in the official file
    tables: Mapping[str, Mapping[str, str | Other]]  # sets of names, by whose they are
    not_weights: tuple[str, ...]


def renamed(table: Mapping[str, str | Other], name: str) -> Other | None:
    """None: the table does not have it."""
    number = re.search(r"(?<=\.)\d+(?=\.)", name)
    starred = name[: number.start()] + "*" + name[number.end() :] if number else name
    found = table.get(name) or table.get(starred)
    if found is None:
        above, _, last = name.rpartition(".")
        return below(renamed(table, above), last) if above else None
    other = Other((found,)) if isinstance(found, str) else found
    names = (x.replace("*", number[0], 1) if number else x for x in other.names)
    return replace(other, names=tuple(names))


def below(other: Other | None, last: str) -> Other | None:
    return other and replace(other, names=tuple(f"{name}.{last}" for name in other.names))


LEAVES = {"scale": "weight"}  # the makers of FLUX call a norm's weight so, nobody else does


def stored_as(table: Mapping[str, str | Other], name: str) -> Other:
    """As it is called here where the table has no other name."""
    owner, _, leaf = name.rpartition(".")
    other = renamed(table, owner or name)
    if other is None or not owner:
        return other or Other((name,))
    return below(other, LEAVES.get(leaf, leaf))
