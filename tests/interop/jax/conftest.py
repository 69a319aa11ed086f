"""Programs of these tests run for milliseconds: what they cost is their compilation."""

import pytest


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    jax = pytest.importorskip("jax")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
