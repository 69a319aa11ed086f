"""Self-variance: the diagonal of the train × train scores, to rounding."""

from __future__ import annotations

import numpy as np
import pytest

import bayesinf as bi
from bayesinf.attribution._self_variance import self_variance, variances
from tests.cases import BY_NAME
from tests.interrupted import run

pytestmark = pytest.mark.filterwarnings("ignore::bayesinf.ConvergenceWarning")


@pytest.mark.parametrize("chains", [1, 3])
@pytest.mark.parametrize("center", ["grand", "chain"])
def test_diagonal_of_scores_with_the_training_set_as_queries(chains: int, center: str) -> None:
    plain = BY_NAME["softmax-regression"].task()
    inputs, target = plain.train.batch()
    task = bi.Task(
        plain.module, plain.likelihood, train=(inputs, target), query=(inputs, target),
        parameters=list(plain.params),
    )  # fmt: skip
    posterior = bi.LocalPosterior(task, n_beta=10.0, gamma=5.0)
    traces = bi.sample(
        posterior, bi.SGLD(0.02), chains=chains, draws=50, warmup=5, batch_size=4, progress=False,
        vectorize=False,
    )  # fmt: skip
    scores = bi.bif(traces, center=center)  # type: ignore[arg-type]
    found = self_variance(traces, center=center)  # type: ignore[arg-type]
    diagonal = np.arange(task.n)
    np.testing.assert_allclose(
        found["value"], -scores["influence"].values[diagonal, diagonal], rtol=1e-6
    )
    np.testing.assert_allclose(found["mcse"], scores["mcse"].values[diagonal, diagonal], rtol=1e-6)
    assert found.attrs["mcse_df"] == scores.attrs["mcse_df"]
    assert (found["value"] > 0).all()
    observed = chains * 50 * task.n  # queries are no part of it
    assert found.attrs["forward_examples"] == scores.attrs["forward_examples"] - observed
    assert found.attrs["backward_examples"] == scores.attrs["backward_examples"]


def test_standard_errors_of_independent_draws() -> None:
    """Var(s²) = 2σ⁴/(T−1) for Gaussian draws: the mean of 2,000 squared errors, each with 11
    degrees of freedom, is within 5 % (relative standard error 1 %: false alarm below 1e-6).
    """
    losses = np.random.default_rng(0).standard_normal((4, 200, 2000)).astype(np.float32)
    value, error, freedom = variances(losses, "grand")
    assert freedom == pytest.approx(11, abs=0.1)
    assert np.mean(value) == pytest.approx(1.0, abs=0.01)
    assert np.mean(error**2) == pytest.approx(2 / 799, rel=0.05)
    assert np.var(value) == pytest.approx(2 / 799, rel=0.15)  # 4.7 of its standard errors, 3.2 %


def test_sums_are_refused() -> None:
    sums = run(bi.StreamingCovariance(), "SGLD")
    with pytest.raises(TypeError, match="self_variance needs traces"):
        self_variance(sums)  # type: ignore[arg-type]
