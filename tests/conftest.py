import os

import pytest
import torch

torch.set_num_threads(1)
os.environ.setdefault("MPLBACKEND", "Agg")


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Networks are initialised from the global generator: the same in any order of tests."""
    torch.manual_seed(0)


@pytest.fixture
def rng() -> torch.Generator:
    """A generator of the test's own; data come from it."""
    return torch.Generator().manual_seed(0)
