"""The same tensors under other names: tables of data, one for each family, in teachers/.

    Other     what a module is called elsewhere, where it is not one module of another name
    renamed   a module's other name, by a table

A table goes from our (the official) names of modules to others. `*` stands for the number of a
block: the first number in a name. A name with its number, as the last block's, goes before.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass


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


def renamed(table: Mapping[str, str | Other], name: str) -> Other | None:
    """None: the table does not have it."""
    number = re.search(r"(?<=\.)\d+(?=\.)", name)
    starred = name[: number.start()] + "*" + name[number.end() :] if number else name
    found = table.get(name) or table.get(starred)
    if found is None:
        return None
    other = Other((found,)) if isinstance(found, str) else found
    names = (x.replace("*", number[0], 1) if number else x for x in other.names)
    return Other(tuple(names), other.shares, other.swapped)
