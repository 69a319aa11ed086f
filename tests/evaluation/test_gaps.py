"""The chain from retraining to solvers: oracles that isolate each gap, and refusals."""

import json
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from torch import Tensor, nn

import bayesinf as bi
from bayesinf.evaluation._gaps import response_gaps
from tests import exact, quadratic
from tests.cases import BY_NAME

PATIENT = bi.SGDRecipe(epochs=800, batch_size=100, lr=0.2, momentum=0.9, schedule="constant")
QUICK = bi.SGDRecipe(epochs=3, batch_size=4, lr=0.1, weight_decay=0.05)


def prediction(task: bi.Task, params: dict[str, Tensor], batch: Any) -> Tensor:
    """First output of each query."""
    return task.outputs(params, batch)[:, 0]


def linear_model() -> nn.Module:
    return nn.Linear(4, 1, bias=False).double()


def change(gaps: xr.Dataset, stage: str) -> np.ndarray:
    return gaps["change"].sel(stage=stage).values


def rms(gaps: xr.Dataset, name: str) -> float:
    return float(gaps["rms"].sel(gap=name))


@pytest.fixture(scope="module")
def unconverged() -> bi.Task:
    return BY_NAME["mlp-categorical"].task()


def test_converged_linear_regression_has_no_gap_but_linearisation() -> None:
    """λ = 0: cold = warm = proximal = PBRF, the exact refit; IF is their (1 − h/n) part."""
    task = quadratic.make(offset=0.0).task
    x, y = task.train.batch()
    xq, yq = task.query.batch()
    gaps = response_gaps(
        task,
        range(30),
        PATIENT,
        damping=0.0,
        make_model=linear_model,
        seeds=[0],
        tolerance=1e-12,
    )
    before = 0.5 * (xq @ task.params["weight"][0] - yq[:, 0]) ** 2
    refits = [np.delete(np.arange(30), i) for i in range(30)]
    after = torch.stack(
        [0.5 * (xq @ torch.linalg.lstsq(x[k], y[k]).solution - yq)[:, 0] ** 2 for k in refits]
    )
    expected = (after - before).T
    for stage in ("warm_start", "proximal", "bregman"):
        exact.close(change(gaps, stage), expected, 1e-9)
    exact.close(change(gaps, "cold_start"), expected, 1e-4)  # banks hold float32
    assert abs(gaps["shift"].values).max() < 1e-7
    assert rms(gaps, "linearization") > 10 * rms(gaps, "warm_start")
    assert (gaps["correlation"].values > [0.999, 0.999, 0.999, 0.95]).all()
    params = response_gaps(task, range(30), PATIENT, damping=0.0, measurement=prediction,
                           tolerance=1e-12)  # fmt: skip
    leverage = torch.einsum("ni,ni->n", x, torch.linalg.solve(x.T @ x, x.T).T).numpy()
    exact.close(change(params, "linear") / (1 - leverage), change(params, "bregman"), 1e-9)
    exact.close(
        change(params, "linear"), -exact.influence(task, x.T @ x / 30, 0.0, prediction), 1e-9
    )


def test_interpolating_network_has_the_warm_start_gap_alone() -> None:
    """More parameters than examples, all fitted: only new initial weights change anything."""
    g = torch.Generator().manual_seed(4)
    x, xq = (torch.randn(k, 12, generator=g, dtype=torch.float64) for k in (6, 5))
    model = nn.Linear(12, 1, bias=False).double()
    with torch.no_grad():
        y, yq = model(x), model(xq)
    task = bi.Task(model, bi.Gaussian(), train=(x, y), query=(xq, yq))
    recipe = bi.SGDRecipe(epochs=400, batch_size=6, lr=0.1, schedule="constant")
    gaps = response_gaps(
        task, [0, 1, [2, 3]], recipe, damping=0.1, seeds=[0, 1, 2],
        make_model=lambda: nn.Linear(12, 1, bias=False).double(),
    )  # fmt: skip
    for stage in ("warm_start", "proximal", "bregman", "linear"):
        assert abs(change(gaps, stage)).max() < 1e-20
    assert rms(gaps, "warm_start") > 0.1
    assert gaps["rms"].values[1:].max() < 1e-20
    assert np.isnan(gaps["correlation"]).all()  # nothing responds
    assert float(gaps["noise"][0]) > 0
    assert (gaps["noise"][1:] == 0).all()


def test_untrained_network_has_the_non_convergence_gap(unconverged: bi.Task) -> None:
    """PBRF and its linearisation agree; without the Bregman loss the network is trained."""
    gaps = response_gaps(
        unconverged, range(12), QUICK, damping=0.5,
        reference="checkpoint",
    )  # fmt: skip
    assert gaps["gap"].values.tolist() == ["proximity", "non_convergence", "linearization"]
    assert rms(gaps, "non_convergence") > 10 * rms(gaps, "linearization")
    assert float(gaps["correlation"].sel(gap="linearization")) > 0.99
    assert abs(gaps["shift"].sel(stage="proximal")).mean() > 0.1
    assert abs(gaps["shift"].sel(stage=["bregman", "linear"])).max() == 0


def test_non_convergence_vanishes_at_a_stationary_point_with_weight_decay() -> None:
    """Ridge regression: with its decay in the damping, proximal and Bregman are the same."""
    case, decay = quadratic.make(), 0.05
    x, y = case.task.train.batch()
    ridge = torch.linalg.solve(x.T @ x / 30 + decay * torch.eye(4).double(), x.T @ y / 30)
    model = linear_model()
    model.weight.data = ridge.T.clone()
    task = bi.Task(model, bi.Gaussian(), train=(x, y), query=case.task.query.batch())
    recipe = bi.SGDRecipe(epochs=1, batch_size=30, lr=0.1, weight_decay=decay)
    gaps = response_gaps(task, [[0, 1], [2, 3], 4], recipe, damping=0.2, tolerance=1e-12)
    exact.close(change(gaps, "proximal"), change(gaps, "bregman"), 1e-9)
    assert rms(gaps, "proximity") > 1e-3
    moved = quadratic.make(offset=0.5).task
    away = response_gaps(moved, [[0, 1], [2, 3], 4], recipe, damping=0.2, tolerance=1e-12)
    assert rms(away, "non_convergence") > 1e-3
    kept = np.setdiff1d(np.arange(30), [0, 1])  # and the warm start is the recipe's own minimum
    eye = torch.eye(4, dtype=torch.float64)
    refit = torch.linalg.solve(x[kept].T @ x[kept] / 28 + decay * eye, x[kept].T @ y[kept] / 28)
    xq, yq = task.query.batch()
    warm = 0.5 * ((xq @ refit - yq) ** 2 - (xq @ ridge - yq) ** 2)[:, 0]
    exact.close(change(gaps, "warm_start")[:, 0], warm, 1e-9)


def test_solvers_are_compared_with_the_exact_linear_response(unconverged: bi.Task) -> None:
    damping = 0.3
    ekfac = bi.ekfac(unconverged, fisher="enumerated", damping=damping)
    solvers = {"dense": bi.gauss_newton(unconverged, damping=damping), "ekfac": ekfac}
    groups = {"a": [0, 5], "b": [3], "c": [7, 8, 9], "d": 2}
    gaps = response_gaps(unconverged, groups, QUICK, damping=damping, solvers=solvers,
                         tolerance=1e-6)  # fmt: skip
    assert gaps["group"].values.tolist() == ["a", "b", "c", "d"]
    exact.close(change(gaps, "dense"), change(gaps, "linear"), 1e-6)
    a = -ekfac["influence"].sel(train=[0, 5]).sum("train")
    exact.close(gaps["change"].sel(stage="ekfac", group="a"), a, 1e-12)
    difference = change(gaps, "ekfac") - change(gaps, "linear")
    assert rms(gaps, "ekfac") == pytest.approx(np.sqrt((difference**2).mean()))
    by_query = [
        np.corrcoef(change(gaps, "ekfac")[q], change(gaps, "linear")[q])[0, 1] for q in range(5)
    ]
    np.testing.assert_allclose(gaps["correlation_query"].sel(gap="ekfac"), by_query)
    assert float(gaps["correlation"].sel(gap="ekfac")) == pytest.approx(np.mean(by_query))
    pairs = dict(zip(gaps["gap"].values, zip(gaps["before"].values, gaps["after"].values, strict=True), strict=True))  # fmt: skip  # noqa: E501
    assert pairs["ekfac"] == ("linear", "ekfac")
    assert pairs["non_convergence"] == ("proximal", "bregman")
    assert gaps["removed"].sel(group="c").values.nonzero()[0].tolist() == [7, 8, 9]
    listed = response_gaps(
        unconverged, [[0, 5], [3]], QUICK, damping=damping, solvers=[bi.grad_dot(unconverged)]
    )
    assert listed["gap"].values.tolist()[-1] == "grad_dot"
    assert np.isnan(rms(listed, "grad_dot"))  # a similarity has no unit
    assert np.isnan(listed["correlation"]).all()  # two groups have none
    assert listed["group"].values.tolist() == [0, 1]


def test_bregman_stage_is_the_one_sided_pbrf(unconverged: bi.Task) -> None:
    """Its slope at ε → 0 is the linear stage; at −1/n they differ by the nonlinearity."""
    gaps = response_gaps(unconverged, [4, 9], QUICK, damping=0.3, tolerance=1e-6)
    influence = -exact.influence(unconverged, exact.gauss_newton(unconverged), 0.3)[:, [4, 9]]
    exact.close(change(gaps, "linear"), influence, 1e-8)
    apart = np.linalg.norm(change(gaps, "bregman") - influence) / np.linalg.norm(influence)
    assert 0.01 < apart < 0.5
    assert gaps["group"].values.tolist() == [4, 9]


@pytest.mark.parametrize("reference", ["retrained", "checkpoint"])
def test_cold_starts_are_those_of_retrain(unconverged: bi.Task, reference: Any) -> None:
    case = BY_NAME["mlp-categorical"]
    make = lambda: case.model().double()  # noqa: E731
    gaps = response_gaps(
        unconverged, [[1, 2], 3, 4], QUICK, damping=0.3, make_model=make, seeds=[5, 6, 7],
        measurement="margin", reference=reference,
    )  # fmt: skip
    masks = np.ones((4, 12), dtype=bool)
    masks[1, [1, 2]] = masks[2, 3] = masks[3, 4] = False
    subsets = xr.DataArray(masks, dims=("subset", "train"), coords={"train": np.arange(12)})
    bank = bi.retrain(
        make, bi.Categorical(), QUICK, train=unconverged.train.batch(),
        query=unconverged.query.batch(), subsets=subsets, seeds=[5, 6, 7],
    )["margin"].values.astype(np.float64)  # fmt: skip
    at = unconverged.measure("margin", unconverged.params, unconverged.query.batch()).numpy()
    paired = reference == "retrained"
    base = bank[0].mean(0) if paired else at
    exact.close(change(gaps, "cold_start"), (bank[1:].mean(1) - base).T, 1e-12)
    variance = bank.var(axis=1, ddof=1) / 3
    error = np.sqrt(variance[1:] + (variance[0] if paired else 0)).T
    exact.close(gaps["standard_error"], error, 1e-12)
    assert float(gaps["noise"].sel(gap="warm_start")) == pytest.approx(np.sqrt((error**2).mean()))
    exact.close(gaps["shift"].sel(stage="cold_start"), bank[0].mean(0) - at, 1e-12)
    assert json.loads(gaps.attrs["seeds"]) == [5, 6, 7]
    single = response_gaps(unconverged, [3], QUICK, damping=0.3, make_model=make, seeds=[5])
    assert np.isnan(single["standard_error"]).all()


def test_references_differ_by_the_shift(unconverged: bi.Task) -> None:
    a, b = (
        response_gaps(unconverged, [0, 1], QUICK, damping=0.3, reference=r)
        for r in ("retrained", "checkpoint")
    )
    exact.close(a["change"] + a["shift"], b["change"], 1e-12)
    exact.close(a["shift"], b["shift"], 1e-12)
    assert abs(a["shift"].sel(stage="warm_start")).max() > 0.1


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3).double()

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.linear(a + b)


@pytest.mark.parametrize("kind", ["dict", "tuple"])
def test_data_of_several_inputs(kind: str, tmp_path: Any) -> None:
    a, b, y = torch.randn(8, 4).double(), torch.randn(8, 4).double(), torch.arange(8) % 3
    data: Any = {"a": a, "b": b, "label": y} if kind == "dict" else (a, b, y)
    task = bi.Task(Named(), bi.Categorical(), train=data, query=data, train_ids=list("abcdefgh"))
    gaps = response_gaps(
        task, ["a", "c"], QUICK, damping=0.1, make_model=Named, seeds=[0, 1], store=tmp_path / "b"
    )
    assert np.isfinite(gaps["change"]).all()
    assert gaps["group"].values.tolist() == ["a", "c"]
    assert (tmp_path / "b").is_dir()
    gaps.to_zarr(tmp_path / "gaps.zarr", zarr_format=3, consolidated=False)


def test_what_has_not_converged_is_named(unconverged: bi.Task) -> None:
    with pytest.warns(bi.ConvergenceWarning, match=r"warm_start, nothing removed \(") as caught:
        gaps = response_gaps(unconverged, {"x": [1]}, QUICK, damping=0.3, max_iterations=2)
    assert "warm_start, group x (" in str(caught[0].message)
    assert float(gaps["residual"].sel(stage="warm_start")[0]) > 1e-3


REFUSED = [
    ({"damping": 0.001}, ValueError, r"damping=0.001 is below the recipe's weight decay 0.05"),
    ({"damping": "0.1"}, ValueError, "damping must be a number"),
    ({"reference": "mean"}, ValueError, "reference must be 'retrained' or 'checkpoint'"),
    ({"groups": []}, ValueError, "groups holds nothing to remove"),
    ({"groups": [[]]}, ValueError, r"group 0 names 0 of 12 training examples: \[\]"),
    ({"groups": {"all": range(12)}}, ValueError, "group 'all' names 12 of 12"),
    ({"groups": [[1, 1]]}, ValueError, "each once, and leave at least one"),
    ({"groups": [40]}, KeyError, "unknown train ids"),
    ({"make_model": linear_model, "measurement": prediction}, TypeError, "make_model=None"),
    ({"make_model": linear_model, "seeds": []}, ValueError, "at least one cold start"),
    ({"measurement": "rank"}, NotImplementedError, "needs `rank` of the likelihood"),
]


@pytest.mark.parametrize(("options", "error", "message"), REFUSED)
def test_refusals(
    unconverged: bi.Task, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    arguments = {"damping": 0.3, "groups": [0], "recipe": QUICK, **options}
    with pytest.raises(error, match=message):
        response_gaps(unconverged, **arguments)


def test_refusals_of_solvers(unconverged: bi.Task) -> None:
    scores = bi.grad_dot(unconverged)

    def refuse(message: str, solvers: Any) -> None:
        with pytest.raises(ValueError, match=message):
            response_gaps(unconverged, [0, [1, 2]], QUICK, damping=0.3, solvers=solvers)

    refuse("only \\['grad_dot'\\] are left. Name them", [scores, scores])
    refuse("cannot be called 'linear', which is a stage or gap", {"linear": scores})
    refuse("must hold influence\\(query, train\\)", [scores.rename(influence="score")])
    other = scores.assign_attrs(measurement="margin")
    refuse("scores the measurement 'margin', and the gaps are of 'loss'", [other])
    refuse("no scores of 1 train examples that are needed, \\[2\\]", [scores.drop_sel(train=2)])
    refuse("no scores of 1 query examples", [scores.drop_sel(query=4)])
