"""SOURCE and TracIn: against dense matrices, exact unrolling, and each other's limits."""

import json
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.linalg import expm
from torch import nn

import bayesinf as bi
from bayesinf.attribution._segments import carried, responded
from bayesinf.attribution._source import source
from bayesinf.attribution._tracin import tracin
from bayesinf.curvature._accounting import Costs
from bayesinf.curvature._estimates import Form
from bayesinf.curvature._find import find_layers
from bayesinf.curvature._fit import choose_forms, fit_curvature
from bayesinf.curvature._mean_fit import mean_blocks
from bayesinf.evaluation._alignment import check_same_kind
from bayesinf.training import CheckpointRecorder, open_checkpoints, unrolled_response
from tests import exact
from tests.recorded_runs import ADAM, ADAMW, SGD, N, Tied, batches, numbers, recorded

RUNS = {
    "sgd": (SGD, {"scale": 0.5}),
    "adamw": (ADAMW, {"scale": 0.5}),
    "tied": (ADAMW, {"make": Tied}),
}


@pytest.fixture(scope="module", params=RUNS)
def case(request, tmp_path_factory):
    optimizer, options = RUNS[request.param]
    task, run = recorded(optimizer, tmp_path_factory.mktemp(request.param), **options)
    return SimpleNamespace(name=request.param, task=task, run=run, sgd=request.param == "sgd")


# ---------------------------------------------------------------- functions of eigenvalues


def test_limits_of_the_functions():
    """At 0, beside it, for large and for negative eigenvalues; series where those are exact."""
    values = torch.tensor([0.0, 1e-300, 1e-12, 1e-5, 0.3, 1e4, -1e-12, -0.3], dtype=torch.float64)
    s = 3.0
    x = s * values.numpy().astype(np.longdouble)
    expected = np.where(np.abs(x) < 1e-4, s * (1 - x / 2 + x**2 / 6), 0)
    large = np.abs(x) >= 1e-4
    expected[large] = s * (1 - np.exp(-x[large])) / x[large]
    np.testing.assert_allclose(responded(values, s), expected.astype(float), rtol=1e-12)
    np.testing.assert_allclose(carried(values, s), np.exp(-x).astype(float), rtol=1e-12)
    sigma = torch.logspace(-6, 6, 2000, dtype=torch.float64)
    ratio = responded(sigma, s) * (sigma + 1 / s)
    assert ratio.min() > 1 - 1e-12
    assert abs(float(ratio.max()) - 1.298) < 1e-3  # how far damping 1/s is away, at most
    assert abs(s * float(sigma[ratio.argmax()]) - 1.79) < 0.02


# ---------------------------------------------------------------- the whole formula


def blocks_of(matrix, task):
    out = torch.zeros_like(matrix)
    for layer in find_layers(task):
        where = exact.index(task, layer)
        out[where[:, None], where] = matrix[where[:, None], where]
    return out.numpy()


def mean_weights(run, steps, parts):
    each = [run.weights(int(step)) for step in steps]
    return {k: sum(w * own[k] for w, own in zip(parts, each, strict=True)) for k in each[0]}


def dense_source(case, segments, average="gradients"):
    """``S`` and ``R`` as matrices, multiplied from the last segment to the first."""
    task, run = case.task, case.run
    tasks = [task.at(run.weights(int(step))) for step in run.steps]
    if average == "parameters":  # the same network at each checkpoint of a segment
        counts = run.learning_rates.reshape(segments, 6 // segments, -1).sum(2)
        shares = counts / counts.sum(1, keepdims=True)
        steps = np.split(run.steps, segments)
        means = [mean_weights(run, own, w) for own, w in zip(steps, shares, strict=True)]
        tasks = [task.at(own) for own in means for _ in range(6 // segments)]
    curvatures = [blocks_of(exact.gauss_newton(own), own) for own in tasks]
    gradients = [exact.gradients(own).numpy() for own in tasks]
    each = len(tasks) // segments
    steps = run.total // segments
    decay, scale = (0.02, 0.5) if case.sgd else (0.1, run.loss_scale)
    left = exact.gradients(task, "query").numpy()
    total, eye = 0.0, np.eye(task.dimension)
    for k in reversed(range(segments)):
        rates = run.learning_rates[k * steps : (k + 1) * steps]
        parts = [float(part.sum()) for part in np.split(rates, each)]
        mean = partial(np.average, axis=0, weights=parts)
        own = slice(k * each, (k + 1) * each)
        h, g = mean(curvatures[own]), mean(gradients[own])
        if case.sgd:
            time, p = rates.sum() * scale / (1 - 0.6), eye
            generator = h + decay / scale * eye
        else:
            moments = [task.flatten(run.second_moments(int(s))).numpy() for s in run.steps[own]]
            time, p = rates.sum(), np.diag(scale / (np.sqrt(mean(moments)) + 1e-8))
            generator = p @ h + decay * eye
        s = expm(-time * generator)
        r = (eye - s) @ np.linalg.solve(generator, p)
        total = total - left @ r @ g.T / task.n
        left = left @ s
    return total


@pytest.mark.parametrize("average", ["gradients", "parameters"])
@pytest.mark.parametrize("segments", [1, 3])
def test_against_matrix_exponentials(case, segments, average):
    """Order of segments, means over checkpoints, train gradients of each, sums of the schedule."""
    found = source(
        case.task, checkpoints=case.run, fisher="enumerated", segments=segments, form="dense",
        average=average,
    )  # fmt: skip
    exact.close(found.influence, dense_source(case, segments, average), 1e-7)
    assert found.attrs["checkpoints"] == 1  # of one network, which is what may be compared
    assert len(json.loads(found.attrs["checkpoint_steps"])) == 6
    assert found.attrs["segments"] == segments
    assert found.attrs["optimizer"] == case.run.rule.kind
    if segments == 3:
        ekfac = source(
            case.task, checkpoints=case.run, fisher="enumerated", average=average
        ).influence
        assert np.corrcoef(np.ravel(ekfac), np.ravel(found.influence))[0, 1] > 0.97


def test_tracin_is_a_sum_of_gradient_products(case):
    task, run = case.task, case.run
    tasks = [task.at(run.weights(int(step))) for step in run.steps]
    products = [(exact.gradients(own, "query") @ exact.gradients(own).T).numpy() for own in tasks]
    times = run.learning_rates.reshape(6, 5).sum(1) * (0.5 / (1 - 0.6) if case.sgd else 1.0)
    expected = -sum(w * own for w, own in zip(times, products, strict=True)) / N
    exact.close(tracin(task, checkpoints=run).influence, expected, 1e-9)
    weights = np.zeros((6, N))
    for step, ids in enumerate(batches()):
        rate = run.learning_rates[step] * (0.5 / (1 - 0.6) if case.sgd else 1.0)
        weights[step // 5, ids] += rate / len(ids)
    expected = -sum(w * own for w, own in zip(weights, products, strict=True))
    exact.close(tracin(task, checkpoints=run, order="recorded").influence, expected, 1e-9)


def test_scoring_options(case):
    """Batches, modules, tops, stores and pairs with oneself change nothing."""
    task, run = case.task, case.run
    method = partial(source, fisher="enumerated")
    if case.name == "adamw":
        method = partial(tracin, order="recorded")
    whole = method(task, checkpoints=run)
    parts = method(task, checkpoints=run, batch_size=5, query_batch_size=2, modules=True)
    exact.close(parts.influence, whole.influence)
    exact.close(parts.influence_by_module.sum("module"), whole.influence)
    assert len(parts["module"]) == 6 * len(find_layers(task))
    assert str(parts["module"].values[-1]).endswith(" @ 27")
    top = method(task, checkpoints=run, top_k=2)
    exact.close(top.influence.sel(side="helpful", rank=0), whole.influence.min("train"))
    order = torch.randperm(N, generator=torch.Generator().manual_seed(0))
    x, y = task.train.batch(order)
    mixed = bi.Task(
        task.module, task.likelihood, train=(x, y), query=task.train.batch(),
        train_ids=order.numpy(), parameters=".*",
    )  # fmt: skip
    pairs = method(mixed, checkpoints=run)
    own = method(mixed, checkpoints=run, pairs="self")
    exact.close(own.influence, [pairs.influence.sel(query=i, train=i) for i in own.train])
    again = bi.Task(task.module, task.likelihood, train=(x, y), query=task.query.batch(),
                    train_ids=order.numpy(), parameters=".*")  # fmt: skip
    exact.close(method(again, checkpoints=run).influence.sel(train=range(N)), whole.influence)


def test_scores_go_to_a_store(tmp_path):
    task, run = recorded(SGD, tmp_path / "run")
    options = {"checkpoints": run, "fisher": "enumerated", "batch_size": 5}
    kept = source(task, **options, store=tmp_path / "scores")
    exact.close(kept.influence, source(task, **options).influence)
    with pytest.raises(ValueError, match="of another run"):
        source(task, **options, store=tmp_path / "scores", segments=1)


# ---------------------------------------------------------------- means over checkpoints


@pytest.mark.parametrize("form", ["ekfac", "diagonal", "dense"])
def test_means_over_checkpoints_are_means(case, form: Form):
    """Of one checkpoint twice: itself, not its double; of two: the mean in the shared basis."""
    tasks = [case.task.at(case.run.weights(step)) for step in (2, 27)]
    layers = find_layers(case.task)
    forms = choose_forms(layers, form)
    fit = partial(mean_blocks, layers=layers, forms=forms, fisher="enumerated", costs=Costs())
    single = fit_curvature(tasks[0], fisher="enumerated", form=form)
    (blocks,) = fit([tasks[0]] * 2, np.array([[0.25, 0.75]]))
    both, one, other = fit(tasks, np.array([[0.25, 0.75], [1, 0], [0, 1]]))
    for block, mean, a, b, alone in zip(blocks, both, one, other, single.blocks, strict=True):
        exact.close(block.dense(), alone.dense(), 1e-9)
        exact.close(a.dense(), alone.dense(), 1e-9)
        expected = 0.25 * a.dense() + 0.75 * b.dense()
        assert abs(mean.trace() / float(expected.trace()) - 1) < 1e-9
        if mean.form != "ekfac":
            exact.close(mean.dense(), expected, 1e-9)


# ---------------------------------------------------------------- limits and truths


def regression(folder, steps, rate, *, ridge=0.0, size=40, every=None, least=0.2, seed=5):
    """Descent from 0 on a linear regression whose directions differ in curvature."""
    g = torch.Generator().manual_seed(0)
    draw = partial(torch.randn, generator=g, dtype=torch.float64)
    spread, w = torch.linspace(least, 1.5, 8, dtype=torch.float64), draw(8, 1)
    (x, y), query = (
        (inputs, inputs @ w + 0.5 * draw(len(inputs), 1))
        for inputs in (draw(40, 8) * spread, draw(10, 8) * spread)
    )
    model = nn.Linear(8, 1, bias=False).double()
    nn.init.zeros_(model.weight)
    optimizer = torch.optim.SGD(model.parameters(), rate, weight_decay=ridge)
    order = torch.Generator().manual_seed(seed)
    with CheckpointRecorder(folder, model, optimizer, every=every or steps // 6) as recorder:
        for _ in range(steps):
            ids = torch.randperm(40, generator=order)[:size]
            optimizer.zero_grad()
            (0.5 * (model(x[ids]) - y[ids]).square().sum(1)).mean().backward()
            optimizer.step()
            recorder.step(ids)
    task = bi.Task(model, bi.Gaussian(), train=(x, y), query=query)
    return task, open_checkpoints(folder)


def correlation(one, other):
    return np.corrcoef(np.ravel(one), np.ravel(other))[0, 1]


@pytest.mark.parametrize("steps", [12, 60, 240])
def test_three_segments_follow_the_exact_response(steps, tmp_path):
    task, run = regression(tmp_path, steps, 0.1)
    truth = unrolled_response(task, run).influence
    fit = partial(source, task, checkpoints=run, fisher="enumerated")
    found = fit(segments=3).influence
    assert correlation(found, truth) > 0.999
    assert np.abs(found - truth).max() < 0.1 * np.abs(truth).max()
    assert correlation(fit(segments=1).influence, truth) < 0.9965  # one is not enough


def test_mean_weights_are_a_network_a_segment(tmp_path):
    """A quadratic loss has the same scores; half the passes, with two checkpoints a segment."""
    task, run = regression(tmp_path, 60, 0.1)
    both = [
        source(task, checkpoints=run, fisher="enumerated", average=average, modules=True)
        for average in ("gradients", "parameters")
    ]
    exact.close(both[1].influence, both[0].influence, 1e-9)
    assert len(both[0].module) == 6
    assert list(both[1].module.values) == [f"(model) @ segment {k}" for k in range(3)]
    spent = [own.attrs["forward_examples"] for own in both]
    assert spent[1] < 0.6 * spent[0]


ORDERS = ("expected", "recorded")


def test_batches_average_to_the_expected_response(tmp_path):
    truths = []  # at fixed seeds: nothing here is left to chance
    for seed in range(8):
        task, run = regression(tmp_path / str(seed), 36, 0.1, size=20, seed=seed)
        truths.append(unrolled_response(task, run).influence.values)
    found = source(task, checkpoints=run, fisher="enumerated").influence
    assert correlation(found, np.mean(truths, axis=0)) > 0.995
    assert max(correlation(found, own) for own in truths) < 0.995  # single runs differ
    recorded_order = [tracin(task, checkpoints=run, order=o).influence for o in ORDERS]
    assert 0.9 < correlation(*recorded_order) < 0.9999


def test_long_and_short_training(tmp_path):
    """Converged: the influence function at damping 1/s. Hardly begun: gradients times s/n."""
    task, run = regression(tmp_path / "long", 1200, 0.5, least=0.8)
    found = source(task, checkpoints=run, fisher="enumerated", segments=1).influence
    damping = bi.source_damping(run.learning_rates)
    truth = bi.ekfac(task, fisher="enumerated", damping=damping).influence
    exact.close(found, truth, 0.02)
    exact.close(found, exact.influence(task, exact.gauss_newton(task), 1e-12), 1e-6)
    task, run = regression(tmp_path / "short", 6, 1e-7)
    truth = 6e-7 / task.n * bi.grad_dot(task).influence
    for scores in (
        source(task, checkpoints=run, fisher="enumerated"),
        tracin(task, checkpoints=run),
    ):
        exact.close(scores.influence, truth, 1e-5)


def test_scores_of_one_run_may_be_compared_with_those_of_its_end(tmp_path):
    task, run = regression(tmp_path, 4, 0.3, every=2)
    methods = {
        "SOURCE": source(task, checkpoints=run, fisher="enumerated"),
        "TracIn": tracin(task, checkpoints=run),
        "GradDot": bi.grad_dot(task),
    }
    check_same_kind(list(methods.values()), list(methods))
    twice = bi.ensemble([methods["GradDot"], methods["GradDot"]])
    with pytest.raises(ValueError, match="different numbers of checkpoints"):
        check_same_kind([twice, methods["SOURCE"]], ["twice", "SOURCE"])


def test_tracin_of_one_checkpoint_is_the_gradient_product(tmp_path):
    task, run = regression(tmp_path, 1, 0.3, every=1)
    scores = tracin(task.at(run.weights(1)), checkpoints=run)
    at_start = bi.grad_dot(task.at(run.weights(0))).influence
    exact.close(scores.influence, 0.3 / task.n * at_start)
    assert scores.attrs["checkpoints"] == 1
    assert scores.attrs["checkpoint_steps"] == "[0]"


def test_tracin_sums_to_the_change_of_the_measurement(tmp_path):
    """With a checkpoint at every step of gradient flow, to first order in its rate."""
    task, run = regression(tmp_path, 40, 0.005, every=1)
    first, last = (task.at(run.weights(step)) for step in (0, run.total))
    change = [t.losses(t.params, task.query.batch()).numpy() for t in (first, last)]
    found = tracin(task, checkpoints=run, order="recorded").influence.sum("train").values
    np.testing.assert_allclose(found, change[1] - change[0], rtol=0.02, atol=0.01)


def test_signs_against_exact_removal_of_ridge_regression(tmp_path):
    ridge = 0.1
    task, run = regression(tmp_path, 900, 0.4, ridge=ridge)
    x, y = task.train.batch()
    qx, qy = task.query.batch()

    def losses(keep):
        gram = x[keep].T @ x[keep] + ridge * len(x) * torch.eye(8, dtype=torch.float64)
        w = torch.linalg.solve(gram, x[keep].T @ y[keep])
        return 0.5 * (qx @ w - qy).square().sum(1)

    every = torch.arange(40)
    removal = torch.stack([losses(every[every != i]) - losses(every) for i in range(40)], dim=1)
    found = -source(task, checkpoints=run, fisher="enumerated").influence
    assert correlation(found, removal) > 0.99
    gram = x.T @ x + ridge * 40 * torch.eye(8, dtype=torch.float64)
    leverage = float((x @ torch.linalg.inv(gram) * x).sum(1).max())
    slope = float((found.values * removal.numpy()).sum() / (found.values**2).sum())
    assert 1 < slope < 1 / (1 - leverage)  # what removal adds to a derivative
    assert correlation(-tracin(task, checkpoints=run).influence, removal) > 0.5


# ---------------------------------------------------------------- refusals


def test_refusals(tmp_path):
    task, run = recorded(SGD, tmp_path / "sgd")
    other, adam = recorded(ADAM, tmp_path / "adam")
    for call, kind, words in (
        (lambda: source(task, checkpoints=adam, fisher="enumerated"), ValueError, "another run"),
        (lambda: source(task, checkpoints=run, fisher="enumerated", form="kfac"), ValueError,
         r"form must be one of \('ekfac', 'diagonal', 'dense'\)"),
        (lambda: source(task, checkpoints=run, fisher="enumerated", average="weights"), ValueError,
         r"average must be one of \('gradients', 'parameters'\); got 'weights'"),
        (lambda: source(task, checkpoints=run, fisher="enumerated", segments=40), ValueError,
         "segments must be between 1 and the 30 steps"),
        (lambda: source(other, checkpoints=adam, fisher="enumerated"), NotImplementedError,
         r"weight decay in the gradients of Adam.*Use torch\.optim\.AdamW"),
        (lambda: tracin(task, checkpoints=run, order="random"), ValueError, "order must be one of"),
    ):  # fmt: skip
        with pytest.raises(kind, match=words):
            call()
    x, y = numbers(N, 1)
    strange = bi.Task(task.module, task.likelihood, train=(x, y), query=(x, y), parameters=".*",
                      train_ids=np.arange(N) + 100)  # fmt: skip
    with pytest.raises(ValueError, match=r"no id in the recorded batches.*train_ids="):
        tracin(strange, checkpoints=run, order="recorded")
