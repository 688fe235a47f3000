"""Bad rows of data files, collected and raised together."""

from __future__ import annotations

from ft_ray.errors import DataError

__all__ = ["Alike", "Faults"]


class Alike(str):
    """A message that holds for many rows in the same words: listed once, with the other places or how many."""


class Faults:
    """Bad rows, the first ten kept and all counted, raised together as one DataError."""

    def __init__(self, keep: int = 10) -> None:
        self.keep, self.count = keep, 0
        self.first: list[str] = []
        self._alike: dict[str, tuple[int, int, list[str]]] = {}  # message -> (place in `first`, more rows, where)

    def add(self, where: str, message: str) -> None:
        self.count += 1
        if isinstance(message, Alike) and message in self._alike:
            at, more, places = self._alike[message]
            self._alike[message] = (at, more + 1, [*places, where] if more < self.keep else places)
        elif len(self.first) < self.keep:
            if isinstance(message, Alike):
                self._alike[message] = (len(self.first), 0, [])
            self.first.append(f"{where}: {message}")

    def check(self) -> None:
        """Raises DataError when anything was added."""
        if not self.count:
            return
        listed, told = list(self.first), len(self.first)
        for at, more, places in self._alike.values():
            if more:
                told += more
                listed[at] += f" (also {', '.join(places)})" if more == len(places) else f" ({more + 1} rows)"
        if len(listed) == 1 and told == self.count:
            raise DataError(listed[0])
        tail = f"\n  … and {self.count - told} more" if self.count > told else ""
        raise DataError(f"{self.count} rows cannot be used:\n  " + "\n  ".join(listed) + tail)
