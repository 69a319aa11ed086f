"""What a computation cost: seconds of each stage, examples passed forward and backward."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Costs"]


@dataclass
class Costs:
    """A running account of one computation.

    Attributes
    ----------
    seconds
        Wall-clock seconds by stage; a stage within another counts for itself alone.
    forward_examples, backward_examples
        How many examples went forward through the network, and backward. An example that is
        differentiated in ten output directions counts ten times backward.
    """

    seconds: dict[str, float] = field(default_factory=dict)
    forward_examples: int = 0
    backward_examples: int = 0
    _within: float = field(default=0.0, repr=False)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the time spent in the block, that of stages within it left out, to a stage."""
        before, self._within = self._within, 0.0
        start = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - start
            self.seconds[name] = self.seconds.get(name, 0.0) + spent - self._within
            self._within = before + spent

    def attrs(self) -> dict[str, Any]:
        """The account as attributes of a score Dataset."""
        return {
            "seconds": {name: round(spent, 6) for name, spent in self.seconds.items()},
            "forward_examples": self.forward_examples,
            "backward_examples": self.backward_examples,
        }
