"""What stores of traces and of sums say alike: which chains there are, and of which run."""

from __future__ import annotations

import os
import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bayesinf._disk import StoreError
from bayesinf._layout import differences, identity

__all__ = ["ChainRecord", "FailedChainsWarning"]


class FailedChainsWarning(UserWarning):
    """Chains diverged and are absent from what was asked for."""


class ChainRecord(ABC):
    """The chains of a run; concrete stores say where their draws are."""

    path: Path | None
    config: dict[str, Any]
    draws: int

    @property
    @abstractmethod
    def commit_facts(self) -> dict[str, Any]:
        """What was said with the last draws."""

    @property
    def chains(self) -> int:
        """Number of chains, failed ones included."""
        return int(self.config["chains"])

    @property
    def failed(self) -> dict[int, str]:
        """Failed chains and why."""
        return {int(c): why for c, why in self.commit_facts.get("failed", {}).items()}

    @property
    def healthy(self) -> list[int]:
        """Chains that did not fail."""
        return [c for c in range(self.chains) if c not in self.failed]

    @property
    def superchains(self) -> np.ndarray:
        """Superchain of each healthy chain; those with a healthy chain are numbered from 0."""
        per = self.chains // int(self.config["superchains"])
        return np.unique(np.asarray(self.healthy) // per, return_inverse=True)[1]

    def check_identity(self, config: Mapping[str, Any]) -> None:
        """Raise :class:`StoreError` where ``config`` differs, showing both values."""
        if identity(config) != identity(self.config):
            where = "in memory" if self.path is None else f"at {os.fspath(self.path)!r}"
            raise StoreError(differences(self.config, config, where))

    def refuse_tokens(self, group: str, measurement: str = "loss") -> None:
        """Raise ``KeyError``: values of tokens are wanted that were not recorded."""
        if measurement != "loss":
            raise KeyError(
                f"{measurement!r} of {group!r} is one number an example; only losses are recorded "
                f"token by token. Leave tokens= out."
            )
        held = self.config.get("tokens")
        wanted = "both" if held else group
        raise KeyError(
            f"losses of {group} tokens were not recorded; this store has "
            f"{'those of ' + held + ' tokens' if held else 'one loss an example'}. Record them: "
            f"sample(..., tokens={wanted!r})."
        )

    def warn_of_failures(self, stacklevel: int) -> None:
        """Warn where chains failed, by number."""
        if self.failed:
            warnings.warn(
                f"chains {sorted(self.failed)} diverged and are left out; {len(self.healthy)} of "
                f"{self.chains} chains remain.",
                FailedChainsWarning,
                stacklevel=stacklevel + 1,
            )

    def __repr__(self) -> str:
        where = "in memory" if self.path is None else os.fspath(self.path)
        size = f"{self.chains} chains × {self.draws} draws" if self.config else "empty"
        return f"<{type(self).__name__} {where}: {size}>"
