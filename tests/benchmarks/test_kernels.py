"""The program that compares kernels, on a tiny task, and its arithmetic."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch import nn

import bayesinf as bi
from benchmarks import kernels as program
from benchmarks._started import Started
from benchmarks._table import verdict
from benchmarks.tasks import TASKS


def small_problem() -> tuple[nn.Module, tuple[torch.Tensor, torch.Tensor]]:
    """A linear regression of 12 parameters, whose posterior is Gaussian, and its data."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(30, 4, generator=g) * torch.tensor([0.3, 0.6, 1.0, 1.5])
    y = torch.randn(30, 3, generator=g)
    model = nn.Linear(4, 3, bias=False)
    model.weight.data = torch.linalg.lstsq(x, y).solution.T.contiguous()
    return model, (x, y)


@pytest.fixture(scope="module")
def setting() -> program.Setting:
    model, (x, y) = small_problem()
    task = bi.Task(model, bi.Gaussian(), train=(x, y), query=(x[:2], y[:2]))
    return program.Setting.of(bi.LocalPosterior(task, 100.0, 10.0))


def hessian(setting: program.Setting) -> torch.Tensor:
    """Of the potential, the same for each of the three outputs."""
    x, _ = setting.posterior.task.train.batch()
    return 100.0 * x.T @ x / 30 + 10 * torch.eye(4)


def losses(chains: int, draws: int, scale: float, seed: int) -> np.ndarray:
    """Independent draws of 400 losses, each of variance ``scale`` times its own."""
    own = np.geomspace(0.1, 10, 400)
    return np.random.default_rng(seed).standard_normal((chains, draws, 400)) * (scale * own) ** 0.5


# ------------------------------------------------------------------------- arithmetic


def test_ratio_is_to_the_extrapolated_variance() -> None:
    """One false alarm in 15,000 per comparison (four standard errors)."""
    coarse, fine = losses(8, 50, 1.0 + 0.4, 1), losses(8, 50, 1.0 + 0.1, 2)
    value, error = program.ratio(losses(8, 50, 1.2, 3), coarse, fine, 4.0)
    assert 0.002 < error < 0.02
    assert abs(value - 1.2) < 4 * error


def test_ratio_of_few_draws_has_no_bias() -> None:
    """Over 200 runs of 8 × 6 draws; one false alarm in 15,000 (four standard errors)."""
    found = np.array(
        [
            program.ratio(*(losses(8, 6, 1.0, 3 * seed + k) for k in range(3)), 4.0)
            for seed in range(200)
        ]
    )
    values, errors = found.T
    assert abs(values.mean() - 1) < 4 * values.std() / 200**0.5
    assert errors.mean() == pytest.approx(values.std(), rel=0.3)


def judged(ratio: float, error: float, rate: float, kernel: bi.SGLD | None = None) -> program.Found:
    run = program.Run(np.zeros((8, 10, 3)), kernel or bi.SGLD(0.1), 5, 2, math.nan, 1.0)
    return program.Found(run, 1.0, ratio, error, rate)


@pytest.mark.parametrize(
    ("ratio", "error", "close"),
    [
        (1.03, 0.01, True),
        (0.96, 0.01, True),
        (1.07, 0.005, False),
        (0.93, 0.005, False),
        (1.07, 0.02, None),
        (1.0, 0.06, None),
    ],
)
def test_what_is_close(ratio: float, error: float, close: bool | None) -> None:
    assert judged(ratio, error, 1.0).close is close


def test_bar_needs_speed_and_both_variances() -> None:
    plain, fast = judged(1.0, 0.01, 1.0), judged(1.0, 0.01, 25.0)
    best = "Underdamped, preconditioned"
    names = {entry.name for entry in program.ENTRIES}
    assert {program.PLAIN, best} < names
    words, holds = program.conclude({program.PLAIN: plain, best: fast})
    assert holds
    assert best in words
    assert f"25 × {program.PLAIN}" in words
    assert verdict(True) in words
    for other in (
        {program.PLAIN: plain, best: judged(1.0, 0.01, 19.0)},
        {program.PLAIN: plain, best: judged(1.2, 0.01, 25.0)},
        {program.PLAIN: judged(1.0, 0.2, 1.0), best: fast},
        {program.PLAIN: plain, "EK-FAC Laplace (approximation)": fast},
    ):
        words, holds = program.conclude(other)
        assert not holds
        assert verdict(False) in words
    assert not program.conclude({program.PLAIN: judged(1.2, 0.01, 1.0)})[1]


# ------------------------------------------------------------------------- kernels


def test_curvature_is_that_of_the_posterior(setting: program.Setting) -> None:
    top = float(torch.linalg.eigvalsh(hessian(setting))[-1])
    assert setting.weights.top == pytest.approx(top, rel=1e-3)
    assert setting.weights.flat == 10.0
    assert setting.whitened.top == pytest.approx(1.0, abs=0.05)  # the curvature is exact here


def exact_run(setting: program.Setting, seed: int) -> program.Run:
    """Losses at independent draws of the posterior, ``(8, 2000, 30)``."""
    task = setting.posterior.task
    x, y = task.train.batch()
    root = torch.linalg.cholesky(torch.linalg.inv(hessian(setting)))
    noise = torch.randn(8, 2000, 3, 4, generator=torch.Generator().manual_seed(seed))
    w = task.params["weight"] + noise @ root.T
    losses = 0.5 * (x @ w.mT - y).square().sum(-1)
    return program.Run(losses.numpy(), bi.SGLD(1.0), 0, 1, math.nan, 1.0)


@pytest.mark.parametrize("entry", program.ENTRIES, ids=lambda entry: entry.name)
def test_every_kernel_has_the_posterior_s_variances(
    setting: program.Setting, entry: program.Entry
) -> None:
    """Within the bias of first-order kernels and four standard errors (jackknife, 8 chains:
    one false alarm in 200 without any bias; seeds are fixed)."""
    run = program.run(setting, entry, 0.3, seed=3)
    found = program.measure(run, exact_run(setting, 1), exact_run(setting, 2), 4.0)
    assert found.error < 0.3
    assert abs(found.ratio - 1) < 0.05 + 4 * found.error
    assert found.rate > 0
    assert math.isnan(run.acceptance) != entry.adjusted
    if not entry.independent:
        c = entry.coordinates(setting)
        unit = program.RMSPROP_EPS if isinstance(run.kernel, bi.RMSpropSGLD) else 1.0
        assert run.kernel.step_size * c.top == pytest.approx(unit * entry.stiffness)


def test_chains_start_at_draws(setting: program.Setting) -> None:
    """Squared distances are χ² of 12 × 500; one false alarm in 15,000 (four standard errors)."""
    kernel = Started.at_draws(bi.SGLD(1e-12), setting.start)
    traces = bi.sample(
        setting.posterior, kernel, draws=1, warmup=0, chains=500, superchains=500, jitter=0.0,
        progress=False,
    )  # fmt: skip
    expected = 3 * float(torch.linalg.inv(hessian(setting)).trace())
    squares = traces.tree["sample_stats/distance"].values[:, 0] ** 2
    assert abs(squares.mean() - expected) < 4 * squares.std() / 500**0.5
    with pytest.raises(bi.StoreError, match="step_size"):
        bi.sample(
            setting.posterior, Started.at_draws(bi.SGLD(1e-11), setting.start), draws=2, warmup=0,
            chains=500, superchains=500, jitter=0.0, progress=False, store=traces,
        )  # fmt: skip


def test_a_step_that_diverges_is_halved(setting: program.Setting) -> None:
    entry = next(e for e in program.ENTRIES if e.name == program.PLAIN)
    limit = 4 / setting.weights.top
    found = program.run(setting, entry, 0.05, step=6 * limit, seed=0)
    assert found.kernel.step_size < limit
    assert found.kernel.step_size == pytest.approx(0.75 * limit)


@pytest.mark.parametrize(("times", "status"), [(40.0, 0), (5.0, 1)])
def test_program(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    times: float,
    status: int,
) -> None:
    """Independent draws at a cost by kernel; one cannot be run, one has another law."""
    model, (x, y) = small_problem()
    fake = dataclasses.replace(
        TASKS["diabetes-mlp"], data=lambda: ((x, y), (x[:2], y[:2])), likelihood=bi.Gaussian()
    )

    def run(
        setting: program.Setting,
        entry: program.Entry,
        seconds: float,
        *,
        step: float | None = None,
        seed: int,
    ) -> program.Run:
        if entry.name.startswith("HMC"):
            raise bi.DivergenceError("all chains left")
        step = entry.stiffness / entry.coordinates(setting).top if step is None else step
        kernel = entry.make(setting, entry.coordinates(setting), step)
        scale = 2.0 if entry.independent else 1.0
        x = losses(8, 400, scale, seed)[..., ::20]
        fast = 1 / times if entry.name == "Underdamped, preconditioned" else 1.0
        return program.Run(x, kernel, 7, entry.thin, math.nan, fast)

    monkeypatch.setattr(program, "get_task", lambda name: fake)
    monkeypatch.setattr(type(fake), "checkpoint", lambda self: model)
    monkeypatch.setattr(program, "run", run)
    assert program.main(["--n-beta", "100"]) == status
    out = capsys.readouterr().out
    assert "12 parameters, λ = 0.01, nβ = 100" in out
    assert "HMC, preconditioned: all chains left" in out
    table = out.split("\n\n")[1].splitlines()
    assert len(table) == 2 + len(program.ENTRIES) - 1 + 2
    rows = {line.split("  ")[0]: line for line in table}
    assert " no " in rows["EK-FAC Laplace (approximation)"]
    assert " yes " in rows["SGLD"]
    assert "best: Underdamped, preconditioned" in table[-1]
    assert verdict(not status) in table[-1]
    assert "relax in" in table[-2]
