"""Numbered messages: what is missing, what came twice, what came out of order."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Arrivals:
    """What arrived of numbers that were sent in ascending order."""

    first: list
    duplicates: int

    @classmethod
    def of(cls, numbers):
        first = list(dict.fromkeys(numbers))
        return cls(first, len(numbers) - len(first))

    def assert_ordered(self):
        breaks = [pair for pair in zip(self.first, self.first[1:]) if pair[0] >= pair[1]]
        assert not breaks, f"out of order: {breaks[:10]} of {len(self.first)}"

    def assert_complete(self, wanted):
        missing = sorted(set(wanted) - set(self.first))
        assert not missing, f"{len(missing)} acknowledged messages are missing: {missing[:20]}"
