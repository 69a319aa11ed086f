"""K-FAC and EK-FAC factors against dense blocks of the Fisher."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import jacrev

import bayesinf as bi
from bayesinf.curvature import UntreatedParametersWarning, fit_factors
from bayesinf.curvature import _kronecker as kron
from bayesinf.curvature._accounting import Costs
from tests import exact
from tests.layered_cases import LAYERED, LAYERED_BY_NAME

FISHERS = ["enumerated", "empirical"]


def block(task, fisher, layer):
    where = exact.index(task, layer.weight, layer.bias)
    return exact.FISHER[fisher](task)[where][:, where]


def basis(factor):
    return torch.kron(factor.q_s.contiguous(), factor.q_a.contiguous())


@pytest.mark.parametrize("fisher", FISHERS)
@pytest.mark.parametrize("case", LAYERED, ids=lambda c: c.name)
def test_corrected_eigenvalues_are_the_diagonal_of_the_dense_block(case, fisher):
    task = case.task()
    for factor in fit_factors(task, fisher=fisher):
        truth = block(task, fisher, factor.layer)
        q = basis(factor)
        diagonal = (q.T @ truth @ q).diagonal()
        exact.close(factor.eigenvalues.flatten(), diagonal, 1e-10)
        assert factor.trace() == pytest.approx(float(truth.trace()), rel=1e-10)
        exact.close(factor.dense(), (q * diagonal) @ q.T, 1e-10)
        identity = q.T @ q - torch.eye(len(q), dtype=q.dtype)
        assert float(identity.abs().max()) < 1e-12


def layer_inputs(module, x):
    """Patches by convolving with one-hot kernels; positions as ``(n, T, M)``."""
    if isinstance(module, nn.Linear):
        return x.reshape(len(x), -1, x.shape[-1])
    size = module.weight[0].numel()
    kernels = torch.eye(size, dtype=x.dtype).view(size, *module.weight.shape[1:])
    return module._conv_forward(x, kernels, None).flatten(2).transpose(1, 2)


def dense_factors(task, site, fisher):
    """``A`` and ``S`` of a layer from perturbations added to its outputs."""
    module = dict(task.module.named_modules())[site]
    x, y = task.train.batch()
    seen = {}

    def add(_, args, output):
        seen["x"], seen["shape"] = args[0].detach(), output.shape
        return output + seen["noise"] if "noise" in seen else output

    handle = module.register_forward_hook(add)
    task.outputs(task.params, (x, y))
    zero = torch.zeros(seen["shape"], dtype=task.dtype)

    def outputs(noise):
        seen["noise"] = noise
        return task.outputs(task.params, (x, y)).flatten(1)

    def losses(noise):
        seen["noise"] = noise
        return task.losses(task.params, (x, y))

    jacobian = jacrev(losses if fisher == "empirical" else outputs)(zero)
    handle.remove()
    jacobian = jacobian.reshape(task.n, -1, task.n, *zero.shape[1:])  # (n, K, n, *outputs)
    own = torch.stack([jacobian[i, :, i] for i in range(task.n)])
    if isinstance(module, nn.Conv2d):
        own = own.flatten(3).transpose(2, 3)
    own = own.reshape(task.n, own.shape[1], -1, len(module.weight))  # (n, K, T, P)
    curvature = torch.ones(task.n, 1, 1, dtype=task.dtype)
    if fisher == "enumerated":
        curvature = exact.output_hessians(task)
    s = torch.einsum("nktp,nkl,nltq->pq", own, curvature, own) / (task.n * own.shape[2])
    a = layer_inputs(module, seen["x"])
    if module.bias is not None:
        a = F.pad(a, (0, 1), value=1.0)
    return torch.einsum("ntm,ntk->mk", a, a) / task.n, s


KFAC_CASES = [
    case for case in LAYERED if not case.name.startswith(("tied", "called", "sequence-folded"))
]


@pytest.mark.parametrize("fisher", FISHERS)
@pytest.mark.parametrize("case", KFAC_CASES, ids=lambda c: c.name)
def test_kronecker_factors_are_input_and_output_covariances(case, fisher):
    task = case.task()
    for factor in fit_factors(task, fisher=fisher, corrected=False):
        a, s = dense_factors(task, factor.layer.sites[0], fisher)
        exact.close((factor.q_a * factor.values_a) @ factor.q_a.T, a, 1e-10)
        exact.close((factor.q_s * factor.values_s) @ factor.q_s.T, s, 1e-10)
        exact.close(factor.dense(), torch.kron(s, a), 1e-10)


@pytest.mark.parametrize("name", ["mlp-categorical", "cnn", "sequence", "called-twice", "tied"])
@pytest.mark.parametrize("fisher", ["enumerated", "sampled", "empirical"])
@pytest.mark.parametrize("corrected", [True, False])
def test_factors_do_not_depend_on_the_batch_size(name, fisher, corrected):
    task = LAYERED_BY_NAME[name].task()
    options = {"fisher": fisher, "corrected": corrected, "seed": 4}
    whole = fit_factors(task, batch_size=99, **options)
    for size in (1, 5):
        for got, expected in zip(fit_factors(task, batch_size=size, **options), whole, strict=True):
            exact.close(got.dense(), expected.dense(), 1e-9)


def test_a_second_moment_in_chunks_is_the_same(rng, monkeypatch):
    a = torch.randn(7, 3, 4, generator=rng, dtype=torch.float64)
    ds = torch.randn(7, 3, 2, generator=rng, dtype=torch.float64)
    expected = sum((d.T @ x) ** 2 for x, d in zip(a, ds, strict=True))
    exact.close(kron.second_moment(a, ds), expected, 1e-12)
    monkeypatch.setattr(kron, "_CHUNK", 16)
    exact.close(kron.second_moment(a, ds), expected, 1e-12)


@pytest.mark.parametrize("corrected", [True, False])
def test_the_damped_inverse_solves_the_dense_system(rng, corrected):
    task = LAYERED_BY_NAME["cnn"].task()
    for factor in fit_factors(task, fisher="enumerated", corrected=corrected):
        v = torch.randn(2, *factor.layer.shape, generator=rng, dtype=torch.float64)
        for damping in (1e-3, 2.0):
            damped = factor.dense() + damping * torch.eye(factor.layer.size, dtype=v.dtype)
            expected = torch.linalg.solve(damped, v.flatten(1).T).T
            exact.close(factor.apply_inverse(v, damping).flatten(1), expected, 1e-9)


# ---------------------------------------------------------------- where theory says exact


def linear_task(rng, *, inputs=9, model=None, likelihood=None, classes=None):
    """A bias-free linear network, or ``model``, on random data."""
    model = model or nn.Sequential(*(nn.Linear(a, b, bias=False) for a, b in [(4, 5), (5, 3)]))
    x = torch.randn(inputs, 4, generator=rng, dtype=torch.float64)
    if classes:
        y = torch.randint(classes, (inputs,), generator=rng)
    else:
        y = torch.randn(inputs, 3, generator=rng, dtype=torch.float64)
    return bi.Task(model.double(), likelihood or bi.Gaussian(), train=(x, y), query=(x[:2], y[:2]))


def test_deep_linear_network_with_squared_loss_kfac_blocks_are_exact(rng):
    task = linear_task(rng)
    for corrected in (False, True):
        for factor in fit_factors(task, fisher="enumerated", corrected=corrected):
            exact.close(factor.dense(), block(task, "enumerated", factor.layer), 1e-12)


def test_a_single_input_makes_kfac_exact(rng):
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    task = linear_task(rng, inputs=1, model=model, likelihood=bi.Categorical(), classes=3)
    for corrected in (False, True):
        for factor in fit_factors(task, fisher="enumerated", corrected=corrected):
            exact.close(factor.dense(), block(task, "enumerated", factor.layer), 1e-12)


def test_softmax_regression_only_ekfac_has_the_right_trace(rng):
    model = nn.Linear(4, 3)
    with torch.no_grad():
        model.weight.mul_(6)  # confident on long inputs: |a|² and tr ∇² are far from independent
    task = linear_task(rng, model=model, likelihood=bi.Categorical(), classes=3)
    truth = block(task, "enumerated", fit_factors(task, fisher="enumerated")[0].layer)
    ekfac, kfac = (
        fit_factors(task, fisher="enumerated", corrected=corrected)[0]
        for corrected in (True, False)
    )
    assert ekfac.trace() / float(truth.trace()) == pytest.approx(1, abs=1e-12)
    assert abs(kfac.trace() / float(truth.trace()) - 1) > 0.05
    assert (ekfac.dense() - truth).norm() < (kfac.dense() - truth).norm()


def test_sampled_labels_average_to_the_enumerated_fisher():
    task = LAYERED_BY_NAME["mlp-categorical"].task()
    enumerated = fit_factors(task, fisher="enumerated")
    seeds = range(400)
    traces = np.array(
        [[f.trace() for f in fit_factors(task, fisher="sampled", seed=seed)] for seed in seeds]
    )
    error = traces.std(0, ddof=1) / np.sqrt(len(seeds))
    z = (traces.mean(0) - [f.trace() for f in enumerated]) / error
    assert np.abs(z).max() < 4.5  # false alarm 2e-5
    assert traces.std(0).min() > 0


@pytest.mark.parametrize("name", ["mlp-gaussian", "mlp-bernoulli", "cnn"])
def test_sampled_labels_come_from_the_seed_alone(name):
    task = LAYERED_BY_NAME[name].task()
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    one, two, other = (fit_factors(task, fisher="sampled", seed=seed) for seed in (3, 3, 4))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(one[0].eigenvalues, two[0].eigenvalues)
    assert not torch.equal(one[0].eigenvalues, other[0].eigenvalues)


# ---------------------------------------------------------------- costs and refusals


def test_costs_count_passes_and_seconds():
    task, costs = LAYERED_BY_NAME["mlp-categorical"].task(), Costs()
    fit_factors(task, fisher="enumerated", costs=costs)
    check, passes = 12, 2
    assert costs.forward_examples == check + passes * 12
    assert costs.backward_examples == check + passes * 12 * 3
    assert set(costs.seconds) == {"covariance", "eigendecomposition", "eigenvalue correction"}
    assert all(spent > 0 for spent in costs.seconds.values())


def test_unknown_fisher():
    task = LAYERED_BY_NAME["linear-gaussian"].task()
    with pytest.raises(ValueError, match=r"fisher must be one of .* got 'true'"):
        fit_factors(task, fisher="true")


class OnlyLoss:
    def loss(self, outputs, target):
        return (outputs - target).abs().sum(1)


@pytest.mark.parametrize(
    ("fisher", "part"), [("enumerated", "fisher_factor"), ("sampled", "sample")]
)
def test_a_likelihood_without_the_part_says_which(fisher, part):
    x = torch.ones(3, 2)
    task = bi.Task(nn.Linear(2, 2), OnlyLoss(), train=(x, 2 * x), query=(x, x))
    with pytest.raises(NotImplementedError, match=f"needs `{part}`"):
        fit_factors(task, fisher=fisher)
    assert len(fit_factors(task, fisher="empirical")) == 1


def test_a_gradient_that_is_not_finite_is_named():
    class Root(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(2, 2, bias=False)

        def forward(self, x):
            return self.fc(x).abs().sqrt()

    x = torch.ones(40, 2)
    x[33] = 0.0
    ids = [f"row-{i}" for i in range(40)]
    task = bi.Task(Root(), bi.Gaussian(), train=(x, x), query=(x[:1], x[:1]), train_ids=ids)
    with pytest.raises(ValueError, match=r"layer 'fc': .* train example 'row-33' is NaN"):
        fit_factors(task, fisher="empirical", batch_size=16)
    early = bi.Task(Root(), bi.Gaussian(), train=(x[30:], x[30:]), query=(x[:1], x[:1]))
    with pytest.raises(ValueError, match=r"layer 'fc': .* train example 3 is NaN"):
        fit_factors(early, fisher="empirical")


class Steep:
    def loss(self, outputs, target):
        return 1e10 * outputs.sum(1)


def test_overflowing_products_are_told_apart():
    x = torch.full((3, 2), 1e15)
    task = bi.Task(nn.Linear(2, 2), Steep(), train=(x, x), query=(x, x))
    with pytest.raises(ValueError, match=r"are finite, but their products overflow torch\.float32"):
        fit_factors(task, fisher="empirical")


def test_the_warning_about_other_layers_comes_once():
    model = nn.Sequential(nn.LayerNorm(3), nn.Linear(3, 2))
    x = torch.eye(3)
    task = bi.Task(model, bi.Gaussian(), train=(x, x[:, :2]), query=(x, x[:, :2]))
    with pytest.warns(UntreatedParametersWarning, match="LayerNorm") as seen:
        factors = fit_factors(task, fisher="enumerated")
    assert len(seen) == 1
    assert [f.layer.name for f in factors] == ["1"]
