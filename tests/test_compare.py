"""``compare``: several methods on one task, in one table and one figure."""

import json
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

import bayesinf as bi
from bayesinf._attribute import attribute
from bayesinf._compare import compare
from bayesinf.attribution._entry_points import MethodWarning

PACKAGE = Path(__file__).parent / "method_package"


def model():
    return torch.nn.Linear(3, 2)


@pytest.fixture(scope="module")
def problem():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(24, 3, generator=g)
    y = (x[:, 0] > 0).long()
    recipe = bi.SGDRecipe(lr=0.5, epochs=5, batch_size=24)
    bank = bi.retrain(
        model, bi.Categorical(), recipe, train=(x, y), query=(x[:4], y[:4]),
        subsets=bi.random_subsets(np.arange(24), count=12, seed=0), seeds=[0, 1],
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = bi.train_one(model, bi.Categorical(), recipe, train=(x, y), seed=0)
    task = bi.Task(net, bi.Categorical(), train=(x, y), query=(x[:4], y[:4]))
    return task, bank


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def test_each_row_is_the_lds_of_its_scores(problem, monkeypatch):
    """Options go to those that take them; a method of another package is one of the rows."""
    monkeypatch.syspath_prepend(PACKAGE)
    task, bank = problem
    made = attribute(task, "grad_cos")
    methods = {
        "weak": ("ekfac", {"damping": 0.001}),
        "ekfac": "ekfac",
        "dot": "grad_dot",
        "given": made,
        "nearest": "nearest_mean",
    }
    table, figure = compare(task, methods, bank, damping=0.1, fisher="enumerated")
    sys.modules.pop("nearest_mean", None)
    assert table["scorer"].values.tolist() == list(methods)
    alone = {
        "weak": bi.ekfac(task, fisher="enumerated", damping=0.001),
        "ekfac": bi.ekfac(task, fisher="enumerated", damping=0.1),
        "dot": bi.grad_dot(task),
        "given": made,
    }
    for name, scores in alone.items():
        assert float(table["lds"].sel(scorer=name)) == float(bi.lds(scores, bank)["lds"])
    assert table["method"].values.tolist() == [
        "ekfac", "ekfac", "grad_dot", "grad_cos", "nearest_mean",
    ]  # fmt: skip
    assert table["ensemble"].values.tolist() == [1] * 5
    assert (table["processor_seconds"] >= 0).all()
    assert {"seconds", "peak_memory", "disk", "ceiling", "relative"} <= set(table.data_vars)
    left, right = figure.axes
    assert {t.get_text() for t in left.get_yticklabels()} == set(methods)
    assert right.get_xlabel().startswith("seconds")


def test_ensembles_are_rows_apart(problem):
    task, bank = problem
    members = [{k: v + 0.1 * i for k, v in task.module.state_dict().items()} for i in range(2)]
    methods = {"one": "grad_dot", "two": ("grad_dot", {"ensemble": members})}
    table, figure = compare(task, methods, bank)
    assert table["ensemble"].values.tolist() == [1, 2]
    texts = {t.get_text() for t in figure.axes[0].get_yticklabels()}
    assert texts == {"one", "two (ensemble of 2)"}
    assert float(table["lds"].sel(scorer="one")) == float(bi.lds(bi.grad_dot(task), bank)["lds"])


def test_what_does_not_run_is_named_and_the_rest_goes_on(problem):
    task, bank = problem
    with pytest.warns(MethodWarning, match="'bm25' is left out of the comparison: ValueError: bm"):
        table, _ = compare(task, ["grad_dot", "bm25"], bank)
    assert table["scorer"].values.tolist() == ["grad_dot"]
    assert "no token ids" in json.loads(table.attrs["not_run"])["bm25"]
    with (
        pytest.warns(MethodWarning, match="left out"),
        pytest.raises(ValueError, match="no method ran"),
    ):
        compare(task, ["bm25"], bank)


def test_another_measurement(problem):
    task, bank = problem
    with pytest.warns(MethodWarning, match="random_scores scores the loss alone, not 'margin'"):
        table, _ = compare(task, ["grad_dot", "random_scores"], bank, measurement="margin")
    expected = bi.lds(bi.grad_dot(task, measurement="margin"), bank, measurement="margin")
    assert float(table["lds"][0]) == float(expected["lds"])


@pytest.mark.parametrize(
    ("methods", "options", "error", "message"),
    [
        (["grad_dot", "ekfca"], {}, ValueError, "no method 'ekfca'. Nearest: ekfac"),
        (["grad_dot"], {"damping": 1.0}, TypeError, "no method among .'grad_dot'. takes damping"),
        ({"a": ("grad_dot", {"rank": 1})}, {}, TypeError, "grad_dot takes no rank"),
        (["hessian"], {}, TypeError, "hessian needs damping"),
        (["grad_dot", "grad_dot"], {}, ValueError, "a name stands twice"),
        ("grad_dot", {}, TypeError, "a list of names or a mapping"),
        ([], {}, ValueError, "there is no method to compare"),
    ],
)
def test_mistakes_are_found_before_anything_runs(
    problem, methods, options, error, message, monkeypatch
):
    def ran(*args, **options):
        raise AssertionError("ran")

    monkeypatch.setattr("bayesinf._compare.attribute", ran)
    with pytest.raises(error, match=message):
        compare(problem[0], methods, problem[1], **options)
