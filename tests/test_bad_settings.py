"""Deliberately bad settings: none gives scores without the error or warning that is written here.

And good settings, which raise nothing. The network is a linear regression with a Gaussian local
posterior (:mod:`tests.quadratic`) or a small tanh network, so that a run takes tenths of a second.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import bayesinf as bi
from bayesinf.curvature import GaussNewtonProduct, deflate
from tests import quadratic
from tests.cases import BY_NAME

PROBLEM = quadratic.make()
STIFF = float(torch.linalg.eigvalsh(PROBLEM.hessian)[-1])
GOOD = bi.SGLD(0.5 / STIFF)


def run(posterior: bi.LocalPosterior | None = None, kernel: Any = GOOD, **options: Any) -> Any:
    """Sample and score as a user does, with good settings where nothing else is said."""
    settings = {"draws": 120, "warmup": 50, "chains": 4, "thin": 3}
    own = PROBLEM.posterior if posterior is None else posterior
    score = {k: options.pop(k) for k in ("target_mcse", "normalize") if k in options}
    traces = bi.sample(own, kernel, progress=False, **{**settings, **options})
    return bi.bif(traces, **score)


def posterior(**changes: Any) -> bi.LocalPosterior:
    return replace(PROBLEM.posterior, **changes)


def preconditioner(n_beta: float = 60.0) -> bi.Preconditioner:
    curvature = bi.fit_curvature(PROBLEM.task, fisher="enumerated")
    return bi.Preconditioner(curvature.inverse(0.1), n_beta)


def regression(x: torch.Tensor, y: torch.Tensor, **options: Any) -> bi.LocalPosterior:
    model = nn.Linear(4, 1, bias=False, dtype=torch.float64)
    model.weight.data = PROBLEM.w0[None].clone()
    task = bi.Task(model, bi.Gaussian(), train=(x, y), query=(x[:3], y[:3]), **options)
    return bi.LocalPosterior(task, n_beta=60.0, gamma=6.0)


def with_nan() -> bi.LocalPosterior:
    x, y = (part.clone() for part in PROBLEM.task.train.batch())
    y[17] = float("nan")
    return regression(x, y)


def with_flat_directions() -> bi.LocalPosterior:
    """A coordinate of the input is always 0, and nothing holds its weight."""
    x, y = (part.clone() for part in PROBLEM.task.train.batch())
    x[:, 0] = 0
    return replace(regression(x, y), gamma=0.0)


def unconverged() -> bi.LocalPosterior:
    """A network far from a minimum, held weakly, and not tilted."""
    task = BY_NAME["mlp-gaussian"].task()
    return bi.LocalPosterior(task, n_beta=2000.0, gamma=0.5, potential="plain")


def half_precision() -> bi.LocalPosterior:
    """Posterior spread 1e-4, rounding step of bfloat16 weights near 1: 8e-3."""
    x, y = (part.bfloat16() for part in PROBLEM.task.train.batch())
    model = nn.Linear(4, 1, bias=False, dtype=torch.bfloat16)
    model.weight.data.fill_(1.0)
    task = bi.Task(model, bi.Gaussian(), train=(x, y), query=(x[:3], y[:3]))
    return bi.LocalPosterior(task, n_beta=1e8, gamma=1e8)


class Random(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) + torch.randn(len(x), 1, dtype=x.dtype)

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 1, dtype=torch.float64)


def of_a_random_model() -> bi.LocalPosterior:
    data = PROBLEM.task.train.batch()
    return bi.LocalPosterior(bi.Task(Random(), bi.Gaussian(), train=data, query=data), 60.0, 6.0)


def deflated_for_another_task() -> bi.Preconditioner:
    task = BY_NAME["mlp-gaussian"].task()
    curvature = bi.fit_curvature(task, fisher="enumerated")
    inverse = deflate(curvature, GaussNewtonProduct(task), damping=0.1, rank=2)
    return bi.Preconditioner(inverse, n_beta=60)


SLOW = bi.SGLD(1e-5 / STIFF)
CONVERGENCE = bi.ConvergenceWarning
Bad = tuple[str, Callable[[], Any], type[BaseException], str]
BAD: list[Bad] = [
    ("step too large", lambda: run(kernel=bi.SGLD(5 / STIFF)),
     bi.DivergenceError, "Lower the step size first"),
    ("momentum step too large", lambda: run(kernel=bi.Underdamped(5 / STIFF, 2.0)),
     bi.DivergenceError, "Lower the step size first"),
    ("step too small", lambda: run(kernel=SLOW), CONVERGENCE, "raise the step"),
    ("friction too large", lambda: run(kernel=bi.Underdamped(0.5 / STIFF, 1e5)),
     CONVERGENCE, "chains disagree"),
    ("flat directions, nothing holds them", lambda: run(with_flat_directions()),
     ValueError, "gamma > 0, or start all chains at w0 with jitter=0"),
    ("ten draws", lambda: run(draws=10), CONVERGENCE, "effective draws"),
    ("one draw", lambda: run(draws=1), ValueError, "two draws"),
    ("one chain", lambda: run(chains=1, draws=400), CONVERGENCE, "there is one chain"),
    ("no warm-up, far from stationarity", lambda: run(
        kernel=bi.SGLD(0.01 / STIFF), warmup=0, jitter=100.0, thin=1,
        divergence_bound=float("inf")), CONVERGENCE, "lengthen warmup"),
    ("no draw beyond the memory of a chain", lambda: run(thin=1, kernel=bi.SGLD(0.02 / STIFF)),
     CONVERGENCE, "effective draws"),
    ("plain potential, unconverged checkpoint", lambda: run(
        unconverged(), bi.SGLD(1e-5), warmup=0, thin=1, jitter=0.0), CONVERGENCE, "linear drift"),
    ("noise lost to rounding", lambda: run(half_precision(), bi.SGLD(1e-9)),
     bi.PrecisionWarning, "float32 model"),
    ("batch of two of thirty", lambda: run(batch_size=2, kernel=bi.SGLD(0.5 / STIFF)),
     bi.GradientNoiseWarning, "batch too small"),
    ("batch too large", lambda: run(batch_size=31), ValueError, "between 1 and the 30"),
    ("n_beta = 0", lambda: run(posterior(n_beta=0.0, gamma=60.0)),
     ValueError, "the influence is 0 by definition"),
    ("negative n_beta", lambda: posterior(n_beta=-1.0), ValueError, "finite and ≥ 0"),
    ("gamma is no number", lambda: posterior(gamma=float("nan")), ValueError, "finite and ≥ 0"),
    ("colder than rounding", lambda: run(
        replace(quadratic_in_single(), n_beta=1e16, gamma=1e16), bi.SGLD(1e-17)),
     CONVERGENCE, "effective draws|do not move"),
    ("NaN in one example", lambda: run(with_nan()), bi.DivergenceError, "example 17|not finite"),
    ("RMSprop without warm-up", lambda: run(kernel=bi.RMSpropSGLD(1e-3), warmup=0),
     ValueError, "adapts its preconditioner during warm-up"),
    ("RMSprop, one step of warm-up, tiny batches",
     lambda: run(kernel=bi.RMSpropSGLD(1e-1, eps=1e-3), warmup=1),
     bi.DivergenceError, "diverged"),
    ("minibatches for a Metropolis kernel", lambda: run(kernel=bi.MALA(0.1), batch_size=10),
     ValueError, "takes no minibatches"),
    ("MALA that accepts nothing", lambda: run(kernel=bi.MALA(1e4 / STIFF), jitter=0.0),
     CONVERGENCE, "do not move"),
    ("HMC that accepts nothing", lambda: run(
        kernel=bi.HMC(100.0 / STIFF, steps=5), jitter=0.0), CONVERGENCE, "do not move"),
    ("noise correction above the friction",
     lambda: bi.SGHMC(0.1 / STIFF, friction=1.0, noise_correction=2.0),
     ValueError, "noise_correction < friction"),
    ("a Laplace kernel on the plain potential", lambda: run(
        posterior(potential="plain"), bi.EKFACLaplace(curvature())),
     ValueError, "w0 is not the mode of the plain potential"),
    ("a solver that does not converge", lambda: run(
        kernel=bi.GaussNewtonLaplace(tolerance=1e-12, iterations=1), chains=1),
     RuntimeError, "would not have their law"),
    ("preconditioner at another temperature", lambda: run(
        kernel=bi.SGLD(0.5, preconditioner=preconditioner(0.01))),
     bi.DivergenceError, "diverged"),
    ("preconditioner of another network", lambda: run(
        kernel=bi.SGLD(0.5, preconditioner=deflated_for_another_task())),
     ValueError, "preconditioner is of 37 parameters"),
    ("a random model", of_a_random_model, ValueError, "random even in eval mode"),
    ("nothing observed", lambda: run(observe={"query": []}), ValueError, "is empty"),
    ("too little precision for the target", lambda: run(target_mcse=0.001),
     bi.MonteCarloWarning, "draws"),
    ("calibration at a saddle", lambda: bi.calibrate(
        BY_NAME["mlp-gaussian"].task(), damping=1e-9), ValueError, "no minimum of any local"),
]  # fmt: skip


def curvature() -> bi.Curvature:
    return bi.fit_curvature(PROBLEM.task, fisher="enumerated")


def quadratic_in_single() -> bi.LocalPosterior:
    return replace(PROBLEM.posterior, task=PROBLEM.task.to(dtype=torch.float32))


@pytest.mark.parametrize("bad", BAD, ids=[bad[0] for bad in BAD])
def test_a_bad_setting_says_so(bad: Bad) -> None:
    _, make, kind, message = bad
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what else there is to say
        if issubclass(kind, Warning):
            warnings.simplefilter("error", kind)
        with pytest.raises(kind, match=message):
            make()


def test_there_are_thirty() -> None:
    assert len({bad[0] for bad in BAD}) == len(BAD) >= 30


STEADY = {"draws": 400, "thin": 10}
GOODS: dict[str, Callable[[], Any]] = {
    "SGLD": lambda: run(**STEADY),
    "plain potential": lambda: run(posterior(potential="plain"), **STEADY),
    "large batches": lambda: run(
        kernel=bi.SGLD(0.1, preconditioner()), batch_size=25, draws=200, thin=20
    ),
    "underdamped": lambda: run(kernel=bi.Underdamped(1 / STIFF, 2.0), **STEADY),
    "preconditioned": lambda: run(
        kernel=bi.SGLD(0.4, preconditioner=preconditioner()), draws=300, warmup=50
    ),
    "underdamped, preconditioned": lambda: run(
        kernel=bi.Underdamped(0.5, 1.0, preconditioner()), draws=300, warmup=50
    ),
    "MALA": lambda: run(kernel=bi.MALA(0.3, preconditioner()), draws=300, warmup=50),
    "Laplace": lambda: run(kernel=bi.EKFACLaplace(curvature()), draws=200, thin=1, warmup=0),
    "Gauss–Newton": lambda: run(kernel=bi.GaussNewtonLaplace(), draws=100, thin=1, warmup=0),
    "normalised": lambda: run(normalize="correlation", **STEADY),
    "streamed": lambda: run(store=bi.StreamingCovariance(), **STEADY),
}


@pytest.mark.parametrize("name", GOODS)
def test_a_good_setting_raises_nothing(name: str) -> None:
    """Warnings are errors here; the seeds are fixed."""
    scores = GOODS[name]()
    assert bool(np.isfinite(scores["influence"]).all())
    assert float(scores["influence"].std()) > 0


def test_there_are_ten_good_ones() -> None:
    assert len(GOODS) >= 10
