"""One table for all methods: whatever is registered runs on every small case that it can run on.

What is expected of each is a row of ``tests/method_cases.py``.
"""

import json
import warnings
from functools import cache

import numpy as np
import pytest
import torch

from bayesinf._attribute import attribute
from tests import exact, method_cases
from tests.method_cases import CASES, DAMPING, EXPECTED, RIDGE, labelled, methods, rebuilt

NAMES = tuple(methods())
QUICK = [pytest.param(n, marks=[pytest.mark.slow] * (n == "bif")) for n in NAMES]


def expected(name):
    if name not in EXPECTED:
        pytest.fail(
            f"the method {name!r} is registered and has no row in tests/method_cases.py. Add "
            f"EXPECTED[{name!r}] = Expected(options, reference, tolerance, …): what its scores are "
            f"on a ridge regression, or reference=None where only ranks mean something."
        )
    return EXPECTED[name]


def prepared(name, task, damping, folder, **how):
    """A task, and the options of a method on it."""
    row, checkpoints = expected(name), {}
    if row.run:
        task, run = method_cases.recorded(task, folder, **how)
        checkpoints = {"checkpoints": run}
    return task, {**row.options(task, damping), **checkpoints}


def scored(name, task, options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # chains and solvers of other tests
        return attribute(task, name, **options).influence.sel(
            query=task.query.ids, train=task.train.ids
        )


@pytest.fixture(scope="module")
def regression(tmp_path_factory):
    """The ridge regression, and the scores of every method that runs on it."""
    task, run = method_cases.regression(tmp_path_factory.mktemp("run") / "regression")

    @cache
    def scores(name):
        row = expected(name)
        checkpoints = {"checkpoints": run} if row.run else {}
        return scored(name, task, {**row.options(task, RIDGE), **checkpoints})

    return task, scores


def test_no_row_is_of_a_method_that_is_not_there():
    assert set(EXPECTED) <= set(NAMES)


def test_a_method_without_a_row_fails_in_words():
    with pytest.raises(pytest.fail.Exception, match="'newest' is registered and has no row in"):
        expected("newest")


@pytest.mark.parametrize("name", NAMES)
def test_the_format(name, tmp_path):
    """Shapes, ids, precision, attributes; where it says that it does not run, it does not."""
    method, row, ran = methods()[name], expected(name), 0
    for case in CASES:
        task = labelled(case)
        reasons = method.missing(task)
        if reasons:
            with pytest.raises(ValueError, match=f"{name} does not run on this task: "):
                attribute(task, name, **row.options(task, DAMPING))
            continue
        if case not in row.cases:
            continue
        task, options = prepared(name, task, DAMPING, tmp_path / case)
        scores = attribute(task, name, **options)
        ran += 1
        assert scores.influence.dims == ("query", "train")
        assert scores["query"].values.tolist() == task.query.ids.tolist()
        assert scores["train"].values.tolist() == task.train.ids.tolist()
        assert scores.influence.dtype == np.float64
        assert np.isfinite(scores.influence).all()
        assert scores.influence.values.std() > 0
        attrs = scores.attrs
        assert (attrs["method"], attrs["estimand"]) == (name, method.estimand)
        assert attrs["n"] == task.n
        assert attrs["checkpoints"] >= 1
        assert sum(json.loads(attrs["seconds"]).values()) > 0
        assert attrs["processor_seconds"] >= 0
        assert attrs["forward_examples"] >= 0
        assert attrs["backward_examples"] >= 0
        assert "ensemble" not in attrs
    assert ran > 0


@pytest.mark.parametrize("name", NAMES)
def test_values_on_a_ridge_regression(name, regression):
    """Of estimand-true methods, on a strongly convex problem at its optimum."""
    task, scores = regression
    reference, kind = expected(name).reference, methods()[name].estimand
    assert (reference is None) == (kind == "similarity")
    if reference is not None:
        exact.close(scores(name), reference(task), expected(name).tolerance)


@pytest.mark.parametrize("name", NAMES)
def test_signs_of_exact_removals(name, regression):
    """Influences have the sign of every removal of some size; similarities follow them."""
    task, scores = regression
    row, effect = expected(name), method_cases.removals(task)
    if row.removal is None:
        return
    found = -scores(name).values
    assert np.corrcoef(found.ravel(), effect.ravel())[0, 1] > row.removal
    if row.tolerance < 1e-2 and row.reference is method_cases.gauss_newton:
        large = np.abs(effect) > 0.1 * np.abs(effect).max()
        np.testing.assert_array_equal(np.sign(found[large]), np.sign(effect[large]))


@pytest.mark.parametrize("name", NAMES)
def test_an_example_helps_itself(name, tmp_path):
    row, method = expected(name), methods()[name]
    if not row.own:
        return
    case = next(c for c in CASES[1:] if not method.missing(labelled(c)))
    task, options = prepared(name, labelled(case), DAMPING, tmp_path)
    inputs = method_cases.data(task.train.batch())
    same = type(task)(
        task.module, task.likelihood, parameters=list(task.params), train=inputs, query=inputs
    )
    assert np.diag(scored(name, same, options).values).mean() < 0


@pytest.mark.parametrize("name", QUICK)
def test_order_and_batches_change_nothing(name, tmp_path):
    row, method = expected(name), methods()[name]
    case = next(c for c in row.cases if not method.missing(labelled(c)))
    task, options = prepared(name, labelled(case), DAMPING, tmp_path)
    whole = scored(name, task, options)
    g = torch.Generator().manual_seed(1)
    mixed = rebuilt(
        task,
        train=torch.randperm(task.n, generator=g),
        query=torch.randperm(len(task.query), generator=g),
    )
    size = {"batch_size": 4} if "batch_size" in method.takes else {}
    other = scored(name, mixed, {**options, **size}).sel(query=whole["query"], train=whole["train"])
    exact.close(other, whole, row.rounding)


@pytest.mark.parametrize("name", NAMES)
def test_one_module_called_twice_is_two_that_share_all(name, tmp_path):
    """The same function of the same parameters, written in two ways."""
    row, method = expected(name), methods()[name]
    twice, tied = labelled("called-twice"), labelled("tied-with-bias")
    if "called-twice" not in row.cases or method.missing(twice):
        pytest.skip("is not tried on networks with shared modules")
    weights = [p.clone() for p in twice.params.values()]
    with torch.no_grad():
        for own, value in zip(tied.params.values(), weights, strict=True):
            own.copy_(value)
    net = tied.module
    with torch.no_grad():
        for own, value in zip(dict(net.named_parameters()).values(), weights, strict=True):
            own.copy_(value)
    tied = rebuilt(tied, net)
    scores = []
    for k, task in enumerate((twice, tied)):
        at, options = prepared(name, task, DAMPING, tmp_path / str(k))
        scores.append(scored(name, at, options).values)
    exact.close(scores[1], scores[0], row.rounding)
