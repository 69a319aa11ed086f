"""``attribute``, ``available_methods`` and ``ensemble``: one call, table and errors for all."""

import json

import numpy as np
import pytest
import torch

import bayesinf as bi
from bayesinf import _calibrated_bif
from bayesinf._attribute import attribute, available_methods
from bayesinf.attribution._ensemble import ensemble
from bayesinf.attribution._registry import METHODS, Method
from tests import exact
from tests.layered_cases import LAYERED_BY_NAME


def case(name="softmax-regression", **options):
    return LAYERED_BY_NAME[name].task(**options)


def test_it_is_the_method_with_its_costs(tmp_path):
    task, options = case(), {"fisher": "enumerated", "damping": 0.1}
    scores = attribute(task, "ekfac", **options, store=tmp_path / "s", batch_size=5)
    exact.same(scores.influence, bi.ekfac(task, **options, batch_size=5).influence)
    files = sum(f.stat().st_size for f in (tmp_path / "s").rglob("*") if f.is_file())
    assert scores.attrs["disk"] == files > 0
    assert scores.attrs["processor_seconds"] > 0
    assert scores.attrs["peak_memory"] >= 0
    assert attribute(task, "ekfac", **options).attrs["disk"] == 0


def test_precision_and_device():
    single = attribute(case(), "grad_dot", dtype=torch.float32, device="cpu").influence
    assert single.dtype == np.float32
    exact.close(single, bi.grad_dot(case()).influence, 1e-5)


BAD = [
    ("ekfca", {}, ValueError, r"there is no method 'ekfca'\. Nearest: ekfac, kfac\. available_"),
    ("zzz", {}, ValueError, r"there is no method 'zzz'\. There are arnoldi, astra, bif, bm25"),
    ("grad_dot", {"damping": 0.1}, TypeError, r"grad_dot takes no damping\. It takes batch_size, "),
    ("tf_idf", {"store": "s"}, TypeError, r"tf_idf takes no store\. It takes no options"),
    ("hessian", {"progress": True, "damping": 1.0}, TypeError, "hessian takes no progress"),
    ("hessian", {}, TypeError, r"hessian needs damping, which .* attribute\(task, 'hessian', dam"),
    ("ekfac", {"damping": 0.1}, ValueError, "exactly one of fisher and curvature; got neither"),
    (
        "ekfac",
        {"damping": 0.1, "relative_damping": 0.1, "fisher": "empirical"},
        ValueError,
        "exactly one of damping and relative_damping; got damping and relative_damping",
    ),
    ("bif", {"fisher": "empirical", "curvature": 1}, ValueError, r"or neither; got both"),
    ("bm25", {}, ValueError, "bm25 does not run on this task: the inputs are no token ids"),
    ("hessian", {"damping": 1.0, "memory_limit": 1e-9}, ValueError, "take 0 GiB, and memory_lim"),
    ("hessian", {"damping": float("nan")}, ValueError, "damping must be a number ≥ 0; got nan"),
    ("grad_dot", {"device": "nowhere"}, ValueError, "device 'nowhere' is not there: "),
    ("grad_dot", {"device": "meta"}, ValueError, "device 'meta' is not there: "),
    ("grad_dot", {"dtype": "float32"}, TypeError, "dtype must be a floating dtype .*got 'float32'"),
    ("grad_dot", {"dtype": torch.bfloat16}, ValueError, "the network computes in bfloat16"),
    ("grad_dot", {"ensemble": []}, ValueError, "at least two checkpoints; got 0"),
]


@pytest.mark.parametrize(("name", "options", "error", "message"), BAD)
def test_the_same_errors_for_the_same_mistakes(name, options, error, message):
    with pytest.raises(error, match=message):
        attribute(case(), name, **options)


def test_the_first_argument_is_a_task():
    with pytest.raises(TypeError, match=r"must be a bayesinf\.Task; got a Linear"):
        attribute(torch.nn.Linear(1, 1), "grad_dot")
    with pytest.raises(TypeError, match=r"must be a bayesinf\.Task; got a dict"):
        available_methods({})


@pytest.mark.parametrize(
    ("made", "error", "message"),
    [
        (lambda task: np.zeros(3), TypeError, r"must return a Dataset .*got a ndarray"),
        (
            lambda task: bi.grad_dot(task).assign_attrs(estimand="rank"),
            ValueError,
            "must say attrs.'estimand'., one of .*got 'rank'",
        ),
    ],
)
def test_what_a_method_returns_is_looked_at(made, error, message, monkeypatch):
    monkeypatch.setitem(METHODS, "odd", Method("odd", made, "similarity", "…"))
    with pytest.raises(error, match=message):
        attribute(case(), "odd")


def test_a_method_without_seconds_gets_them(monkeypatch):
    def bare(task):
        scores = bi.grad_dot(task)
        del scores.attrs["seconds"]
        return scores

    monkeypatch.setitem(METHODS, "bare", Method("bare", bare, "similarity", "…"))
    assert json.loads(attribute(case(), "bare").attrs["seconds"])["scores"] > 0


# ---------------------------------------------------------------- the table


def test_the_table_says_what_runs_and_why_not():
    table = available_methods(case("linear-gaussian"))
    assert table["name"].values.tolist() == sorted(METHODS)
    no = {
        str(row["name"].values): row["reason"].item()
        for row in (table.isel(name=k) for k in range(table.sizes["name"]))
        if not row["runs"]
    }
    assert no["bm25"] == no["tf_idf"] == "the inputs are no token ids"
    assert table["needs"].sel(name="bm25").item() == "token ids as inputs"
    assert all(reason for reason in no.values())
    assert table["required"].sel(name="ekfac").item() == (
        "fisher or curvature, damping or relative_damping"
    )
    assert table["required"].sel(name="hessian").item() == "damping"
    assert table["reason"].sel(name="hessian").item() == ""
    assert set(table["source"].values.tolist()) == {"bayesinf"}


class Bare:
    """A likelihood with a loss alone."""

    def loss(self, outputs, target):
        return (outputs - target).abs().sum(1)


@pytest.mark.parametrize(
    ("change", "name", "reason"),
    [
        (lambda t: t.to(dtype=torch.bfloat16), "ekfac", "the network computes in bfloat16"),
        (
            lambda t: t.restrict({"weight": torch.eye(3, 4).bool()}),
            "grad_dot",
            "masks select parts of ['weight']",
        ),
    ],
)
def test_reasons_of_gradients(change, name, reason):
    table = available_methods(change(case()))
    assert table["reason"].sel(name=name).item() == reason
    assert table["runs"].sel(name="bm25").item() is False


def test_other_reasons():
    x = torch.randn(6, 3)
    task = bi.Task(torch.nn.Linear(3, 2), Bare(), train=(x, x[:, :2]), query=(x, x[:, :2]))
    assert available_methods(task)["reason"].sel(name="gauss_newton").item() == (
        "Bare has no `fisher_factor`"
    )

    class Raw(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.w = torch.nn.Parameter(torch.randn(3, 2))

        def forward(self, x):
            return x @ self.w

    task = bi.Task(Raw(), bi.Gaussian(), train=(x, x[:, :2]), query=(x, x[:, :2]))
    assert "no linear layer runs; name a module" in (
        available_methods(task)["reason"].sel(name="representation_similarity").item()
    )
    wide = bi.Task(
        torch.nn.Linear(300, 300), bi.Gaussian(), train=(torch.randn(2, 300),) * 2,
        query=(torch.randn(2, 300),) * 2,
    )  # fmt: skip
    table = available_methods(wide)["reason"]
    assert table.sel(name="hessian").item() == ("its matrices take 243 GiB, and memory_limit=8")
    assert table.sel(name="gauss_newton").item() == ""  # 600 rows


# ---------------------------------------------------------------- ensembles


def members(task, count=3):
    g = torch.Generator().manual_seed(2)
    return [
        {
            name: value + 0.1 * torch.randn(value.shape, generator=g, dtype=value.dtype)
            for name, value in task.module.state_dict().items()
        }
        for _ in range(count)
    ]


def test_an_ensemble_is_the_mean_and_says_so():
    task = case()
    checkpoints, options = members(task), {"fisher": "enumerated", "damping": 0.1}
    alone = [bi.ekfac(task.at(c), **options) for c in checkpoints]
    scores = attribute(task, "ekfac", ensemble=checkpoints, **options)
    exact.close(scores.influence, np.mean([own.influence for own in alone], axis=0), 1e-14)
    assert (scores.attrs["ensemble"], scores.attrs["checkpoints"]) == (3, 3)
    assert scores.attrs["forward_examples"] == 3 * alone[0].attrs["forward_examples"]
    assert scores.attrs["damping"] == 0.1
    assert "checkpoint" not in scores.attrs
    seconds = json.loads(ensemble(alone).attrs["seconds"])
    parts = [json.loads(own.attrs["seconds"])["scores"] for own in alone]
    assert seconds["scores"] == pytest.approx(sum(parts))


def test_members_may_be_in_any_order_and_carry_errors():
    g = np.random.default_rng(0)

    def made(order, error):
        value = g.normal(size=(2, 3))
        scores = bi.make_scores(
            value, query=np.arange(2), train=np.array(list("abc")), method="bif",
            estimand="influence", attrs={"mcse_df": 7.0}, mcse=np.full((2, 3), error),
        )  # fmt: skip
        return scores.isel(train=order), value

    (one, v), (two, w) = made([0, 1, 2], 0.1), made([2, 0, 1], 0.3)
    both = ensemble([one, two])
    exact.close(both.influence, (v + w) / 2, 1e-14)
    np.testing.assert_allclose(both.mcse, 0.2)
    assert both.attrs["mcse_df"] == 7.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.assign_attrs(method="kfac"), "must be of one method; got 'ekfac' and 'kfac'"),
        (lambda s: s.isel(train=slice(3)), "they differ in 'train'"),
        (lambda s: s.assign_coords(query=s["query"] + 1), "they differ in 'query'"),
    ],
)
def test_members_that_do_not_belong_together(change, message):
    scores = bi.ekfac(case(), fisher="empirical", damping=0.1)
    with pytest.raises(ValueError, match=message):
        ensemble([scores, change(scores)])


def test_one_member_is_none_and_a_store_holds_one(tmp_path):
    task = case()
    with pytest.raises(ValueError, match="at least two members; got 1"):
        ensemble([bi.grad_dot(task)])
    with pytest.raises(ValueError, match="an ensemble has scores of every member, which one store"):
        attribute(task, "grad_dot", ensemble=members(task), store=tmp_path / "s")


def test_tokens_of_members():
    task = case("decoder-left")
    one = bi.grad_dot(task, train_tokens="position")
    exact.close(ensemble([one, one]).influence, one.influence, 1e-14)
    assert ensemble([one, one])["train_position"].values.tolist() == (
        one["train_position"].values.tolist()
    )
    other = one.assign_coords(train=("train_token", one["train"].values[::-1]))
    with pytest.raises(ValueError, match="they differ in 'train_token'"):
        ensemble([one, other])


# ---------------------------------------------------------------- BIF by name


RUN = {"damping": 1.0, "error": 0.2, "chains": 4}


@pytest.mark.filterwarnings("ignore::bayesinf.ConvergenceWarning")  # 49 draws
def test_the_bayesian_influence_function_by_name(tmp_path):
    scores = attribute(case(), "bif", **RUN, traces=tmp_path / "t.zarr")
    assert set(json.loads(scores.attrs["seconds"])) == {"calibration", "sampling", "covariance"}
    assert scores.attrs["damping"] == pytest.approx(1.0)
    assert scores.attrs["disk"] > 0
    exact.same(bi.bif(bi.open_traces(tmp_path / "t.zarr")).influence, scores.influence)


def test_how_its_curvature_is_fitted(monkeypatch):
    def calibrate(task, *, curvature, **_):
        raise LookupError(curvature.info["fisher"])

    monkeypatch.setattr(_calibrated_bif, "calibrate", calibrate)
    with pytest.raises(LookupError, match="empirical"):
        attribute(case(), "bif", fisher="empirical")


@pytest.mark.slow  # calibrates twice more
@pytest.mark.filterwarnings("ignore::bayesinf.ConvergenceWarning")
def test_it_goes_on_from_its_traces(tmp_path):
    first = attribute(case(), "bif", **RUN, traces=tmp_path / "t.zarr")
    draws = bi.open_traces(tmp_path / "t.zarr").commit_facts["seconds"]
    again = attribute(case(), "bif", **RUN, traces=tmp_path / "t.zarr")
    exact.same(again.influence, first.influence)
    assert bi.open_traces(tmp_path / "t.zarr").commit_facts["seconds"] == draws  # none was added
