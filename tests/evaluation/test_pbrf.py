"""The proximal Bregman response as scores: closed forms, the linear limit, refusals."""

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from torch import Tensor, nn

import bayesinf as bi
from bayesinf.evaluation._pbrf import pbrf
from bayesinf.evaluation._proximal import Neighbourhood, fit_metric, respond
from tests import exact, quadratic
from tests.cases import BY_NAME
from tests.layered_cases import LAYERED_BY_NAME

LINKS = ["mlp-categorical", "mlp-gaussian", "mlp-bernoulli"]
DAMPING = 0.2


def prediction(task: bi.Task, params: dict[str, Tensor], batch: Any) -> Tensor:
    """First output of each query."""
    return task.outputs(params, batch)[:, 0]


def relabelled(task: bi.Task, change: Callable[[Tensor], Tensor]) -> bi.Task:
    """The same task with other labels for all training examples but the first."""
    x, y = task.train.batch()
    other = y.clone()
    other[1:] = change(y[1:])
    return bi.Task(task.module, task.likelihood, train=(x, other), query=task.query.batch(),
                   parameters=".*")  # fmt: skip


@pytest.mark.parametrize("offset", [0.0, 0.7])
@pytest.mark.parametrize("epsilon", [None, 0.06])
def test_linear_regression_in_closed_form(offset: float, epsilon: float | None) -> None:
    """±ε gives −ε v/(1 ± εh): the central difference is the linear term over 1 − (εh)²."""
    case = quadratic.make(offset=offset)
    scores = pbrf(case.task, damping=0.05, measurement=prediction, epsilon=epsilon, tolerance=1e-12)
    x, _ = case.task.train.batch()
    dense = x.T @ x / 30 + 0.05 * torch.eye(4, dtype=torch.float64)
    leverage = torch.einsum("ni,ni->n", x, torch.linalg.solve(dense, x.T).T)
    step = 1 / 30 if epsilon is None else epsilon
    linear = exact.influence(case.task, x.T @ x / 30, 0.05, prediction)
    exact.close(scores["influence"], linear / (1 - (step * leverage.numpy()) ** 2), 1e-9)
    assert scores.attrs["epsilon"] == step
    half = linear / (1 - (step * leverage.numpy() / 2) ** 2)
    change = np.linalg.norm(scores["influence"] - half, axis=0)
    expected = change / np.linalg.norm(scores["influence"], axis=0)
    np.testing.assert_allclose(scores["nonlinearity"], expected, rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize("name", [*LINKS, "cnn", "softmax-regression"])
@pytest.mark.parametrize("measurement", ["loss", prediction])
def test_limit_of_small_epsilon_is_gauss_newton_influence(name: str, measurement: Any) -> None:
    task = BY_NAME[name].task()
    scores = pbrf(task, damping=DAMPING, epsilon=1e-5, measurement=measurement, tolerance=1e-8)
    exact.close(
        scores["influence"],
        exact.influence(task, exact.gauss_newton(task), DAMPING, measurement),
        1e-6,
    )


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@pytest.mark.parametrize("name", LAYERED_BY_NAME)
def test_every_kind_of_layer(name: str) -> None:
    """The linear response, by second derivatives, and the finite one, against dense matrices."""
    task = LAYERED_BY_NAME[name].task()
    ids = task.train.ids[:2]
    expected = exact.influence(task, exact.gauss_newton(task), DAMPING)[:, :2]
    options = {"damping": DAMPING, "tolerance": 1e-6}
    scores = pbrf(task, epsilon=1e-5, train_ids=ids, check_linearity=False, **options)
    exact.close(scores["influence"], expected, 1e-5)
    near = Neighbourhood(task)
    share = torch.full((task.n,), 1 / task.n, dtype=torch.float64)
    metric = fit_metric(near, share, rank=20, generator=torch.Generator().manual_seed(0))
    gradients = near.loss_gradients(torch.eye(task.n, dtype=torch.float64)[:2] / task.n)
    v, _ = respond(near, metric, share, DAMPING, gradients, tolerance=1e-8, max_iterations=200)
    exact.close(near.slope("loss", v).T, expected, 1e-6)


@pytest.mark.parametrize("name", LINKS)
def test_correlates_with_gauss_newton_at_a_finite_weight(name: str) -> None:
    """Of 12 examples, one gains or loses a quarter of its weight."""
    task = BY_NAME[name].task()
    scores = pbrf(task, damping=DAMPING, epsilon=0.25 / 12)
    linear = bi.gauss_newton(task, damping=DAMPING)
    pairs = zip(scores["influence"].values, linear["influence"].values, strict=True)
    assert np.mean([np.corrcoef(a, b)[0, 1] for a, b in pairs]) >= 0.99
    assert not np.allclose(scores["influence"], linear["influence"], rtol=1e-3)  # nonlinear


def test_even_terms_cancel() -> None:
    """Halving ε quarters the distance to the limit, of which the nonlinearity is ¾."""
    task = BY_NAME["mlp-categorical"].task()
    limit = exact.influence(task, exact.gauss_newton(task), DAMPING)
    options = {"damping": DAMPING, "tolerance": 1e-10}
    wide, narrow = (pbrf(task, epsilon=e, **options) for e in (0.02, 0.01))
    far, near = (np.linalg.norm(s["influence"] - limit) for s in (wide, narrow))
    assert 3.8 < far / near < 4.2
    each = np.linalg.norm(wide["influence"] - limit, axis=0)
    size = np.linalg.norm(wide["influence"], axis=0)
    np.testing.assert_allclose(wide["nonlinearity"], 0.75 * each / size, rtol=0.1)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("mlp-categorical", lambda y: (y + 1) % 3),
        ("mlp-bernoulli", lambda y: 1 - y),
        ("mlp-gaussian", lambda y: y - 3),
    ],
)
def test_state_of_training_does_not_matter(name: str, change: Callable[[Tensor], Tensor]) -> None:
    """However badly the other labels are fitted, the response to an example is the same."""
    task = BY_NAME[name].task()
    other = relabelled(task, change)
    a, b = (pbrf(t, damping=DAMPING, train_ids=[0]) for t in (task, other))
    assert float(task.losses(task.params, task.train.batch()).mean()) != pytest.approx(
        float(other.losses(other.params, other.train.batch()).mean()), rel=0.05
    )
    np.testing.assert_array_equal(a["influence"], b["influence"])


def test_an_example_that_is_fitted_exactly_has_no_influence() -> None:
    case = quadratic.make(offset=0.3)
    x, y = case.task.train.batch()
    y = y.clone()
    y[4] = x[4] @ case.w0
    task = bi.Task(case.task.module, bi.Gaussian(), train=(x, y), query=case.task.query.batch(),
                   parameters=".*")  # fmt: skip
    scores = pbrf(task, damping=0.1, train_ids=[4, 5])
    assert float(abs(scores["influence"].sel(train=4)).max()) < 1e-14
    assert float(abs(scores["influence"].sel(train=5)).max()) > 1e-4
    assert scores["nonlinearity"].values[0] == 0
    assert scores["converged"].values.tolist() == [True, True]


def test_the_divergence_of_a_sample_is_common_to_all_responses() -> None:
    """It is the response of the task that consists of the sample, at the same ε."""
    task = BY_NAME["mlp-categorical"].task(train_ids=[f"t{k}" for k in range(12)])
    sample = np.sort(np.random.default_rng(3).permutation(12)[:5])
    x, y = task.train.batch()
    small = bi.Task(task.module, bi.Categorical(), train=(x[sample], y[sample]),
                    query=task.query.batch(), parameters=".*")  # fmt: skip
    options = {"damping": DAMPING, "epsilon": 0.05, "tolerance": 1e-10}
    whole = pbrf(task, examples=5, seed=3, **options)
    alone = pbrf(small, **options)
    inside = whole["influence"].isel(train=sample)
    exact.close(12 * inside, 5 * alone["influence"], 1e-8)
    one = pbrf(task, examples=5, seed=3, train_ids=["t11"], **options)  # not in the sample
    exact.close(one["influence"], whole["influence"].sel(train=["t11"]), 1e-8)
    assert whole.attrs["examples"] == 5
    full = pbrf(task, **options)
    assert abs(full["influence"] - whole["influence"]).max() > 0.01 * abs(full["influence"]).max()


def test_chosen_examples_in_their_order_and_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    task = BY_NAME["mlp-categorical"].task()
    options = {"damping": DAMPING, "tolerance": 1e-9}
    whole = pbrf(task, **options)
    some = pbrf(task, train_ids=[7, 2, 11], **options)
    assert some["train"].values.tolist() == [7, 2, 11]
    exact.close(some["influence"], whole["influence"].sel(train=[7, 2, 11]), 1e-7)
    monkeypatch.setattr("bayesinf.evaluation._pbrf.MOST_ROWS", 8)
    exact.close(pbrf(task, **options)["influence"], whole["influence"], 1e-7)
    bare = pbrf(task, check_linearity=False, rank=3, **options)
    exact.close(bare["influence"], whole["influence"], 1e-7)
    assert "nonlinearity" not in bare


def test_computed_in_float64_for_any_task() -> None:
    task = BY_NAME["mlp-categorical"].task().to(dtype=torch.float32)
    exact.close(
        pbrf(task, damping=DAMPING)["influence"],
        pbrf(task.to(dtype=torch.float64), damping=DAMPING)["influence"],
        1e-12,
    )
    assert task.dtype == torch.float32


def test_format_is_that_of_all_scores(tmp_path: Any) -> None:
    task = BY_NAME["mlp-categorical"].task(query_ids=list("abcde"))
    scores = pbrf(task, damping=DAMPING, measurement="margin")
    made = bi.make_scores(
        scores["influence"].values, query=task.query.ids, train=task.train.ids, method="pbrf",
        estimand="influence",
    )  # fmt: skip
    xr.testing.assert_identical(scores[["influence"]].drop_attrs(), made.drop_attrs())
    assert scores["query"].dtype == made["query"].dtype
    assert made.attrs.items() <= scores.attrs.items()
    assert scores.attrs["measurement"] == "margin"
    assert scores.attrs["damping"] == DAMPING
    assert scores.attrs["residual"] == float(scores["residual"].max()) <= 1e-4
    assert scores.attrs["nonlinearity"] == float(scores["nonlinearity"].max())
    assert set(json.loads(scores.attrs["seconds"])) == {"preconditioner", "responses"}
    assert scores.attrs["passes"] * 12 == scores.attrs["backward_examples"]
    assert scores["iterations"].dtype == np.int64
    scores.to_zarr(tmp_path / "scores.zarr", zarr_format=3, consolidated=False)
    subsets = bi.random_subsets(12, count=5, seed=0)
    outcome = np.random.default_rng(0).standard_normal((5, 2, 5))
    bank = xr.Dataset(
        {"margin": (("subset", "seed", "query"), outcome), "subset_mask": subsets},
        coords={"seed": [0, 1], "query": list("abcde")},
    )
    assert np.isfinite(bi.lds(scores, bank, measurement="margin")["lds"])


def test_unfinished_responses_are_named() -> None:
    task = BY_NAME["mlp-categorical"].task(train_ids=[f"t{k}" for k in range(12)])
    with pytest.warns(bi.ConvergenceWarning, match=r"2 of 2 responses .* t\d") as caught:
        scores = pbrf(task, damping=1e-4, train_ids=["t3", "t8"], max_iterations=1)
    text = str(caught[0].message)
    assert "t3 (" in text
    assert "t8 (" in text
    assert "Raise max_iterations=1" in text
    assert not scores["converged"].any()
    assert (scores["residual"] > 1e-4).all()
    assert (scores["iterations"] == 1).all()


def test_progress_is_shown_on_request(capsys: pytest.CaptureFixture[str]) -> None:
    task = BY_NAME["linear-gaussian"].task()
    pbrf(task, damping=0.1, train_ids=[1])
    assert capsys.readouterr().err == ""
    pbrf(task, damping=0.1, train_ids=[1], progress=True)
    assert "1/1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"damping": -1.0}, r"damping must be a number ≥ 0; got -1.0"),
        ({"damping": float("nan")}, "damping must be"),
        ({"damping": True}, "damping must be"),
        ({"epsilon": 0.0}, r"epsilon must be a positive number, or None for 1/n = 0.08333"),
        ({"epsilon": float("inf")}, "epsilon must be"),
        ({"epsilon": "1/n"}, "epsilon must be"),
        ({"examples": 13}, "examples must lie between 1 and the 12"),
        ({"examples": 0}, "examples must lie"),
        ({"tolerance": 1.0}, "tolerance must lie between 0 and 1"),
        ({"max_iterations": 0}, "max_iterations must be a positive integer; got 0"),
        ({"rank": 2.5}, r"rank must be a positive integer; got 2.5"),
        ({"train_ids": []}, "at least one training example"),
        ({"train_ids": [3, 3]}, r"each once; got \[3, 3\]"),
        ({"measurement": lambda task, p, b: task.losses(p, b).mean()[None]}, "one value per query"),
    ],
)
def test_refusals(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pbrf(BY_NAME["mlp-categorical"].task(), **{"damping": DAMPING, **options})


def test_unknown_ids() -> None:
    with pytest.raises(KeyError, match=r"unknown train ids \[99\]"):
        pbrf(BY_NAME["mlp-categorical"].task(), damping=DAMPING, train_ids=[1, 99])


def test_what_the_likelihood_lacks() -> None:
    case = BY_NAME["mlp-gaussian"].task()
    with pytest.raises(NotImplementedError, match="needs `margin` of the likelihood"):
        pbrf(case, damping=DAMPING, measurement="margin")

    class Bare:
        def loss(self, outputs: Tensor, target: Tensor) -> Tensor:
            return (outputs - target).abs().sum(1)

    task = bi.Task(case.module, Bare(), train=case.train.batch(), query=case.query.batch(),
                   parameters=".*")  # fmt: skip
    with pytest.raises(NotImplementedError, match="needs `bregman` of the likelihood, and Bare"):
        pbrf(task, damping=DAMPING)


class Rooted(nn.Module):
    """Its gradient is infinite where an input is 0."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(1, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return (self.w * x).abs().sqrt()


def test_gradients_and_measurements_that_are_not_finite() -> None:
    x = torch.tensor([[1.0], [0.0], [2.0]], dtype=torch.float64)
    task = bi.Task(
        Rooted(), bi.Gaussian(), train=(x, x), query=(x[:1], x[:1]), train_ids=["a", "b", "c"]
    )
    with pytest.raises(ValueError, match="gradient of the loss of training example 'b' is not fin"):
        pbrf(task, damping=DAMPING)

    def endless(task: bi.Task, params: dict[str, Tensor], batch: Any) -> Tensor:
        return task.losses(params, batch) * float("inf")

    with pytest.raises(ValueError, match=r"not finite after the response to training example 0"):
        pbrf(BY_NAME["softmax-regression"].task(), damping=DAMPING, measurement=endless)
