"""Parts of parameters: vectors, gradients, chains, identity, and what needs whole ones."""

import pytest
import torch
from torch import nn

import bayesinf as bi
from bayesinf._gradients import ChainFunctions
from bayesinf.curvature import GaussNewtonProduct, HessianProduct
from bayesinf.curvature._hessian import dense_hessian
from tests import exact
from tests.cases import BY_NAME

DOUBLE = torch.float64


def mask_of(shape, *where):
    mask = torch.zeros(shape, dtype=torch.bool)
    for index in where:
        mask[index] = True
    return mask


MASKS = {
    "0.weight": mask_of((6, 4), (1,), (4, 2)),
    "2.bias": None,
    r"4\.(weight)": mask_of((3, 5), (slice(None), 3)),
}


@pytest.fixture(scope="module")
def tasks():
    """A task of whole parameters, and one of parts of them."""
    whole = BY_NAME["mlp-categorical"].task(parameters=["0.weight", "2.bias", "4.weight"])
    return whole, BY_NAME["mlp-categorical"].task(parameters=MASKS)


@pytest.fixture(scope="module")
def places(tasks):
    """Positions in the vector of whole parameters of the entries that count."""
    part = tasks[1]
    marks = [MASKS["0.weight"].flatten(), torch.ones(5, dtype=torch.bool)]
    marks.append(MASKS[r"4\.(weight)"].flatten())
    found = torch.cat(marks).nonzero()[:, 0]
    assert len(found) == part.dimension == 5 + 5 + 3
    return found


@pytest.mark.parametrize("lead", [(), (2,), (2, 3)])
def test_vectors_hold_the_entries_and_the_others_stay(tasks, places, rng, lead):
    whole, part = tasks
    center = whole.flatten(whole.params)
    torch.testing.assert_close(part.flatten(part.params), center[places], rtol=0, atol=0)
    flat = torch.randn(*lead, part.dimension, generator=rng, dtype=DOUBLE)
    expected = center.expand(*lead, -1).clone()
    expected[..., places] = flat
    params = part.unflatten(flat)
    torch.testing.assert_close(whole.flatten(params), expected, rtol=0, atol=0)
    torch.testing.assert_close(part.flatten(params), flat, rtol=0, atol=0)
    assert [p.shape for p in params.values()] == [(*lead, *p.shape) for p in part.params.values()]


@pytest.mark.parametrize("vectorize", [True, False])
@pytest.mark.parametrize("shared", [True, False])
def test_gradients_are_those_in_the_entries(tasks, places, rng, vectorize, shared):
    whole, part = tasks
    position = part.flatten(part.params) + 0.3 * torch.randn(
        3, part.dimension, generator=rng, dtype=DOUBLE
    )
    index = torch.arange(5) if shared else torch.randint(12, (3, 5), generator=rng)
    batch = part.train.batch(index)
    functions = ChainFunctions(part, vectorize)
    got, losses = functions.loss_grad(position, batch, shared=shared)
    everywhere = whole.flatten(part.unflatten(position))
    known = ChainFunctions(whole, False).loss_grad(everywhere, batch, shared=shared)
    torch.testing.assert_close(got, known[0][:, places], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(losses, known[1], rtol=1e-10, atol=1e-12)
    assert functions.vectorize is vectorize


def test_second_derivatives_are_those_in_the_entries(tasks, places, rng):
    whole, part = tasks
    expected = exact.loss_hessian(whole)[places][:, places]
    torch.testing.assert_close(dense_hessian(part), expected, rtol=1e-8, atol=1e-10)
    potential = bi.LocalPosterior(part, n_beta=3.0, gamma=2.0).bind()
    vector = torch.randn(1, part.dimension, generator=rng, dtype=DOUBLE)
    got = potential.hvp(potential.center[None], vector)
    torch.testing.assert_close(got, 3.0 * vector @ expected + 2.0 * vector, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("potential", ["plain", "tilted"])
def test_chains_of_a_part_are_those_of_the_network_that_has_no_more(rng, potential):
    """Features 1 and 3 of a regression; the other two, frozen, move to the targets."""
    x = torch.randn(20, 4, generator=rng, dtype=DOUBLE)
    y = torch.randn(20, 1, generator=rng, dtype=DOUBLE)
    model = nn.Linear(4, 1, bias=False, dtype=DOUBLE)
    small = nn.Linear(2, 1, bias=False, dtype=DOUBLE)
    small.weight.data = model.weight.data[:, 1::2].clone()
    rest = y - x[:, ::2] @ model.weight.data[:, ::2].T
    mask = torch.tensor([[False, True, False, True]])
    part = bi.Task(
        model, bi.Gaussian(), train=(x, y), query=(x[:3], y[:3]), parameters={"weight": mask}
    )
    alone = bi.Task(small, bi.Gaussian(), train=(x[:, 1::2], rest), query=(x[:3, 1::2], rest[:3]))
    traces = [
        bi.sample(
            bi.LocalPosterior(task, 20.0, 5.0, 0.01 * (potential == "tilted"), potential),
            bi.SGLD(0.02), draws=30, warmup=5, batch_size=5, max_excess=1.0, progress=False,
        )
        for task in (part, alone)
    ]  # fmt: skip
    for group in ("train", "query"):
        one, other = (t.values(group).values for t in traces)
        assert one.std(axis=1).min() > 0
        torch.testing.assert_close(
            torch.from_numpy(one), torch.from_numpy(other), rtol=1e-5, atol=1e-6
        )


def test_identity_knows_the_entries(tasks):
    whole, part = tasks
    names = ["0.weight", "2.bias", "4.weight"]
    digests = {
        task.fingerprint()["parameters"]
        for task in (
            whole,
            part,
            part.restrict({"0.weight": mask_of((6, 4), (1,))}),
            part.restrict({"0.weight": mask_of((6, 4), (2,))}),
            part.restrict("0.weight"),
        )
    }
    assert len(digests) == 5
    for same in (
        dict.fromkeys(names),
        {name: torch.ones_like(whole.params[name], dtype=torch.bool) for name in names[::-1]},
    ):
        assert part.restrict(same).fingerprint() == whole.fingerprint()
    assert whole.restrict(MASKS).fingerprint() == part.fingerprint()


def test_several_masks_of_one_parameter_add_up(tasks):
    one, other = mask_of((6, 4), (1,)), mask_of((6, 4), (slice(None), 0))
    both = tasks[0].restrict({"0.weight": one, r"0\.w.*": other})
    assert both.fingerprint() == tasks[0].restrict({"0.weight": one | other}).fingerprint()
    assert tasks[0].restrict({"0.weight": one, r"0\.w.*": None}).dimension == 24


def test_a_part_of_a_tied_weight(rng):
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Tanh(), nn.Linear(3, 3, bias=False))
    model[2].weight = model[0].weight
    model = model.double()
    x = torch.randn(6, 3, generator=rng, dtype=DOUBLE)
    mask = mask_of((3, 3), (1,))
    task = bi.Task(model, bi.Gaussian(), train=(x, x), query=(x, x), parameters={"2.weight": mask})
    assert list(task.params) == ["0.weight"]
    assert task.dimension == 3
    full = exact.gradients(task.restrict(None))
    torch.testing.assert_close(exact.gradients(task), full[:, 3:6])


def test_what_needs_whole_parameters_says_so(tasks):
    whole, part = tasks
    curvature = bi.fit_curvature(whole, fisher="enumerated")
    for refused in (
        lambda: bi.fit_curvature(part, fisher="empirical"),
        lambda: GaussNewtonProduct(part),
        lambda: HessianProduct(part),
        lambda: bi.grad_dot(part),
        lambda: bi.hessian(part, damping=1.0),
        lambda: curvature.require_task(part),
        lambda: bi.ekfac(part, damping=0.1, curvature=curvature),
    ):
        with pytest.raises(ValueError, match=r"needs whole parameters.*'0.weight', '4.weight'"):
            refused()
    kernel = bi.SGLD(0.1, preconditioner=bi.Preconditioner(curvature.inverse(0.1), 10.0))
    with pytest.raises(ValueError, match="the preconditioner is of 44 parameters"):
        bi.sample(bi.LocalPosterior(part, 10.0, 1.0), kernel, draws=4, warmup=0, progress=False)
    whole.require_whole_parameters("anything")


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({}, "parameters is empty"),
        ([], "parameters is empty"),
        ({"0.weight": torch.ones(6, 4)}, "must be None .* or a bool tensor.*got torch.float32"),
        ({"0.weight": [True]}, "must be None .* or a bool tensor.*got list"),
        ({"0.weight": mask_of((4,), (0,))}, r"mask of shape \(4,\), and '0.weight' has shape"),
        ({r".*\.weight": mask_of((6, 4), (0,))}, "matches parameters of several shapes"),
        ({"0.weight": mask_of((6, 4))}, "a mask without a single True"),
        ({"nothing": None}, "'nothing' matches no parameter"),
    ],
)
def test_errors_of_masks(tasks, parameters, words):
    with pytest.raises(ValueError, match=words):
        tasks[0].restrict(parameters)


# ---------------------------------------------------------------- the same task elsewhere


def test_restricting_shares_the_network_and_the_data(tasks):
    whole = tasks[0]
    other = whole.restrict(MASKS)
    assert other.module is whole.module
    assert other.train is whole.train
    assert whole.dimension == 44
    assert whole.restrict(None).dimension == sum(p.numel() for p in whole.module.parameters())
    model = nn.ModuleDict({"a": nn.Linear(2, 1), "b": nn.Linear(2, 1).double()})
    model.forward = lambda x: model["a"](x)
    data = torch.ones(2, 2), torch.ones(2, 1)
    mixed = bi.Task(model, bi.Gaussian(), train=data, query=data, parameters="a.*")
    with pytest.raises(
        TypeError, match=r"of torch.float64, and the task computes in torch.float32"
    ):
        mixed.restrict("b.*")


@pytest.mark.parametrize("form", ["state", "module", "pt", "safetensors"])
def test_at_another_checkpoint(tasks, tmp_path, form):
    part = tasks[1]
    with torch.random.fork_rng():
        torch.manual_seed(8)
        model = BY_NAME["mlp-categorical"].model().double()
    given = {"state": model.state_dict(), "module": model}.get(form, tmp_path / f"w.{form}")
    if form == "pt":
        torch.save(model.state_dict(), given)
    if form == "safetensors":
        pytest.importorskip("safetensors").torch.save_file(model.state_dict(), given)
    moved = part.at(given)
    fresh = BY_NAME["mlp-categorical"].task(parameters=MASKS)
    before = {name: p.clone() for name, p in part.params.items()}
    batch = fresh.train.batch()
    expected = fresh.likelihood.loss(model(batch[0]), batch[1]).detach()
    torch.testing.assert_close(moved.losses(moved.params, batch), expected)
    assert moved.train is part.train
    assert moved.fingerprint()["checkpoint"] != part.fingerprint()["checkpoint"]
    assert moved.fingerprint()["parameters"] == part.fingerprint()["parameters"]
    exact.same(part.flatten(before), part.flatten(part.params))


def test_errors_of_checkpoints(tasks, tmp_path):
    whole, state = tasks[0], dict(tasks[0].module.state_dict())
    for given, words in (
        (nn.Linear(4, 3), r"are missing and \['weight', 'bias'\] are not its own"),
        ({**state, "0.weight": torch.ones(1, 4)}, "does not fit Sequential.*size mismatch"),
        ({k: v for k, v in state.items() if k != "2.bias"}, r"\['2.bias'\] are missing"),
        ({k: v * torch.nan for k, v in state.items()}, "is not finite at the checkpoint"),
        (tmp_path, "is a folder, and a checkpoint is a file"),
    ):
        with pytest.raises(ValueError, match=f"(?s){words}"):
            whole.at(given)


def test_one_name_of_a_tied_weight_is_enough():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    x = torch.ones(4, 3)
    task = bi.Task(model, bi.Gaussian(), train=(x, x), query=(x, x))
    state = {k: v + 1 for k, v in model.state_dict().items() if k != "1.weight"}
    torch.testing.assert_close(task.at(state).params["0.weight"], model[0].weight.detach() + 1)
