from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.func import grad, jacrev

import bayesinf as bi
from bayesinf._data import Batch
from bayesinf._gradients import ChainFunctions
from bayesinf._posterior import Potential
from tests import quadratic
from tests.cases import BY_NAME

CASES = ["linear-gaussian", "mlp-categorical", "mlp-bernoulli", "cnn"]
KINDS = ["tilted", "plain"]


def _potential(task: bi.Task, kind: str, batch: Tensor | None):
    """The potential written out from the definition, as a function of a flat position."""
    nb, gamma, wd = 50.0, 3.0, 0.2
    w0 = task.flatten(task.params)
    examples = task.train.batch(batch)

    def objective(w: Tensor) -> Tensor:
        loss = task.losses(task.unflatten(w), examples).mean()
        return nb * loss + nb * wd / 2 * w.square().sum()

    tilt = grad(objective)(w0) if kind == "tilted" else torch.zeros_like(w0)

    def value(w: Tensor) -> Tensor:
        return objective(w) + gamma / 2 * (w - w0).square().sum() - tilt @ (w - w0)

    return bi.LocalPosterior(task, nb, gamma, wd, kind), value, w0  # type: ignore[arg-type]


def _positions(w0: Tensor) -> Tensor:
    g = torch.Generator().manual_seed(2)
    return w0 + 0.3 * torch.randn(3, len(w0), generator=g, dtype=w0.dtype)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("vectorize", [True, False])
def test_full_batch_potential_is_its_definition(case: str, kind: str, vectorize: bool) -> None:
    task = BY_NAME[case].task()
    posterior, value, w0 = _potential(task, kind, None)
    potential = posterior.bind(vectorize=vectorize, chunk_size=5)  # 12 examples in uneven chunks
    w = _positions(w0)
    constant = potential.value(w0[None]) - value(w0)
    values, grads = potential.value_and_grad(w)
    torch.testing.assert_close(values - constant, torch.stack([value(x) for x in w]))
    torch.testing.assert_close(grads, torch.stack([grad(value)(x) for x in w]))
    torch.testing.assert_close(potential.grad(w), grads)
    loss = torch.stack([task.losses(task.unflatten(x), task.train.batch()).mean() for x in w])
    torch.testing.assert_close(potential.value_of_loss(w, loss), values)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", KINDS)
def test_minibatch_gradient_is_that_of_the_batch(case: str, kind: str) -> None:
    task = BY_NAME[case].task()
    w0 = task.flatten(task.params)
    w = _positions(w0)
    batches = torch.tensor([[0, 3, 5], [1, 2, 3], [9, 8, 7]])
    for c in range(3):
        posterior, value, _ = _potential(task, kind, batches[c])
        potential = posterior.bind()
        values, grads = potential.value_and_grad(w, batches)
        torch.testing.assert_close(grads[c], grad(value)(w[c]))
        constant = potential.value(w0.expand(3, -1), batches)[c] - value(w0)
        torch.testing.assert_close(values[c] - constant, value(w[c]))


@pytest.mark.parametrize("kind", KINDS)
def test_minibatch_gradients_average_to_the_full_gradient(kind: str) -> None:
    task = BY_NAME["mlp-categorical"].task()
    posterior, _, w0 = _potential(task, kind, None)
    potential = posterior.bind()
    w = _positions(w0)
    epoch = torch.randperm(12, generator=torch.Generator().manual_seed(0)).reshape(4, 3)
    parts = [potential.grad(w, rows.expand(3, -1)) for rows in epoch]
    torch.testing.assert_close(torch.stack(parts).mean(0), potential.grad(w))


def test_tilted_minibatch_gradient_vanishes_at_the_checkpoint() -> None:
    task = BY_NAME["mlp-categorical"].task()
    posterior, _, w0 = _potential(task, "tilted", None)
    noise = posterior.bind().grad(w0.expand(2, -1), torch.tensor([[0, 1], [5, 7]]))
    assert noise.abs().max() < 1e-12
    plain, _, _ = _potential(task, "plain", None)
    assert plain.bind().grad(w0.expand(2, -1), torch.tensor([[0, 1], [5, 7]])).abs().max() > 0.1


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", KINDS)
def test_hvp_is_the_hessian_times_a_vector(case: str, kind: str) -> None:
    task = BY_NAME[case].task()
    batch = torch.tensor([[0, 4, 6]]).expand(3, -1)
    for rows in (None, batch):
        posterior, value, w0 = _potential(task, kind, None if rows is None else rows[0])
        w, v = _positions(w0), _positions(torch.zeros_like(w0))
        exact = torch.stack([jacrev(grad(value))(x) @ u for x, u in zip(w, v, strict=True)])
        torch.testing.assert_close(posterior.bind(chunk_size=5).hvp(w, v, rows), exact)


# ---------------------------------------------------------------- one evaluation for two uses


def test_an_evaluation_is_kept_for_the_same_tensor_only() -> None:
    task = BY_NAME["mlp-categorical"].task()
    posterior, _, w0 = _potential(task, "tilted", None)
    potential = posterior.bind(chunk_size=5)
    w = _positions(w0)
    gradient, losses = potential.evaluate(w)
    exact = torch.stack([task.losses(task.unflatten(x), task.train.batch()) for x in w])
    torch.testing.assert_close(losses, exact)
    assert potential.evaluated(w)
    assert potential.evaluate(w)[0] is gradient
    before = potential.grad(w)
    assert not potential.evaluated(w.clone())
    w[1] = w0  # as the driver does to a chain that failed
    assert not potential.evaluated(w)
    after = potential.grad(w)
    assert torch.equal(after[0], before[0])
    assert not torch.equal(after[1], before[1])


def _counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every pass over all training examples, by what it was for."""
    seen: list[str] = []
    evaluate, observe = Potential._all, ChainFunctions.observe

    def count_gradient(self: Potential, position: Tensor) -> tuple[Tensor, Tensor]:
        seen.append("gradient" if len(position) > 1 else "checkpoint")
        return evaluate(self, position)

    def count_observation(self: ChainFunctions, position: Tensor, batch: Batch, wanted: Any) -> Any:
        if len(batch[1]) == 12:
            seen.append("train" if len(position) > 1 else "checkpoint")
        return observe(self, position, batch, wanted)

    monkeypatch.setattr(Potential, "_all", count_gradient)
    monkeypatch.setattr(ChainFunctions, "observe", count_observation)
    return seen


@pytest.mark.parametrize("kernel", [bi.SGLD(1e-3), bi.Underdamped(1e-3, 2.0)], ids=repr)
@pytest.mark.parametrize("thin", [1, 3])
def test_losses_come_with_the_full_batch_gradient(
    kernel: Any, thin: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = BY_NAME["mlp-categorical"].task()
    posterior = bi.LocalPosterior(task, 10.0, 2.0)

    def run(**options: Any) -> bi.TraceStore:
        settings = {"draws": 6, "warmup": 2, "thin": thin, "progress": False, "vectorize": False}
        return bi.sample(posterior, kernel, **{**settings, **options})

    seen = _counted(monkeypatch)
    shared = run()
    steps = 2 + 6 * thin
    assert seen.count("gradient") == steps + 1  # Underdamped's first, SGLD's at the last draw
    assert "train" not in seen
    seen.clear()
    some = run(observe={"train": task.train.ids[:11]})  # must be observed by themselves
    same = shared.values("train").values[..., :11]
    np.testing.assert_allclose(some.values("train").values, same, rtol=1e-5)
    assert seen.count("gradient") == steps + (not isinstance(kernel, bi.SGLD))
    # the chains are the same to the bit, whoever asks for losses in between
    for store in (shared, some):
        assert store.tree["sample_stats"]["distance"].shape == (4, 6)
    assert np.array_equal(*(s.tree["sample_stats"]["distance"].values for s in (shared, some)))
    parts = run(draws=2)
    assert np.array_equal(run(store=parts).values("train").values, shared.values("train").values)


def test_minibatches_observe_by_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    task = BY_NAME["mlp-categorical"].task()
    seen = _counted(monkeypatch)
    bi.sample(
        bi.LocalPosterior(task, 10.0, 2.0), bi.SGLD(1e-3), draws=6, warmup=2, batch_size=4,
        progress=False, vectorize=False,
    )  # fmt: skip
    assert seen.count("train") == 6
    assert "gradient" not in seen


def test_damping_and_prior_precision() -> None:
    task = quadratic.make().task
    posterior = bi.LocalPosterior(task, n_beta=200.0, gamma=5.0, weight_decay=0.01)
    assert posterior.prior_precision == pytest.approx(7.0)
    assert posterior.damping == pytest.approx(0.035)
    assert bi.LocalPosterior(task, n_beta=0.0, gamma=1.0).damping == float("inf")


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"n_beta": -1.0}, "n_beta must be finite"),
        ({"gamma": float("nan")}, "gamma must be finite"),
        ({"weight_decay": float("inf")}, "weight_decay must be finite"),
        ({"potential": "centred"}, "potential must be"),
    ],
)
def test_errors(options: dict[str, object], match: str) -> None:
    task = quadratic.make().task
    with pytest.raises(ValueError, match=match):
        bi.LocalPosterior(task, **{"n_beta": 1.0, "gamma": 1.0, **options})  # type: ignore[arg-type]
