import os

import pytest
import torch

torch.set_num_threads(1)
os.environ.setdefault("MPLBACKEND", "Agg")


@pytest.fixture
def rng() -> torch.Generator:
    """A generator of the test's own; nothing here uses the global one."""
    return torch.Generator().manual_seed(0)
