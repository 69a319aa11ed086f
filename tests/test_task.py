"""Tasks: data in every form, selection, the user's module untouched, identity, errors."""

import copy
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import Dataset, TensorDataset

import bayesinf as bi
from bayesinf._data import Examples, resolve_ids
from tests.cases import BY_NAME, CASES

DOUBLE = torch.float64


@pytest.fixture
def data(rng):
    x = torch.randn(10, 4, generator=rng, dtype=DOUBLE)
    return x, torch.randint(3, (10,), generator=rng)


def seeded(make):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return make().double()


@pytest.fixture
def linear():
    return seeded(lambda: nn.Linear(4, 3))


def make(model, data, **options):
    options = {"train": data, "query": data, **options}
    return bi.Task(model, bi.Categorical(), **options)


def losses(task, split="train"):
    return task.losses(task.params, task.examples(split).batch())


def plain(model, data):
    return F.cross_entropy(model(data[0]), data[1], reduction="none").detach()


def quick(task, **options):
    posterior = bi.LocalPosterior(task, n_beta=10.0, gamma=5.0)
    settings = {"draws": 30, "warmup": 5, "batch_size": 4, "progress": False, **options}
    return bi.sample(posterior, bi.SGLD(0.01), **settings)


# ---------------------------------------------------------------- forms of data


class Items(Dataset):
    def __init__(self, data, form):
        self.data, self.form = data, form

    def __len__(self):
        return len(self.data[0])

    def __getitem__(self, i):
        x, y = self.data[0][i], self.data[1][i]
        return {
            "tuple": (x, y),
            "dict": {"input": x, "labels": int(y)},
            "text": (x, "y"),
            "bare": x,
        }[self.form]


class Keyword(nn.Linear):
    """Called as ``model(input=…)``; answers as language models do."""

    def forward(self, input):
        return SimpleNamespace(logits=super().forward(input))


class TwoInputs(nn.Linear):
    def forward(self, one, two):
        return super().forward(one - 2 * two)


FORMS = {
    "tuple": lambda d: d,
    "arrays": lambda d: (d[0].numpy(), d[1].numpy()),
    "single precision": lambda d: (d[0].float().double(), d[1]),
    "dict": lambda d: {"input": d[0], "label": d[1]},
    "dict of arrays": lambda d: {"input": d[0].numpy(), "y": d[1].numpy()},
    "TensorDataset": lambda d: TensorDataset(*d),
    "dataset of tuples": lambda d: Items(d, "tuple"),
    "dataset of dicts": lambda d: Items(d, "dict"),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", [nn.Linear, Keyword])
def test_every_form_of_data(data, form, kind):
    model = seeded(lambda: kind(4, 3))
    if form == "single precision":
        data = (data[0].float(), data[1])
    given = data if form == "single precision" else FORMS[form](data)
    task = make(model, given)
    expected = F.cross_entropy(F.linear(data[0].double(), model.weight, model.bias), data[1],
                               reduction="none").detach()  # fmt: skip
    torch.testing.assert_close(losses(task), expected, rtol=1e-12, atol=0)
    index = torch.tensor([[3, 1, 4], [1, 5, 9]])
    inputs, target = task.train.batch(index)
    x = inputs["input"] if isinstance(inputs, dict) else inputs
    assert x.dtype == DOUBLE
    assert torch.equal(x, data[0].double()[index])
    assert torch.equal(target, data[1][index])
    parts = list(task.train.batches(4))
    assert [(w.start, w.stop) for w, _ in parts] == [(0, 4), (4, 8), (8, 10)]
    joined = torch.cat([task.losses(task.params, batch) for _, batch in parts])
    torch.testing.assert_close(joined, expected, rtol=1e-12, atol=0)
    assert task.n == len(task.query) == 10


def test_several_inputs_and_a_named_target(data, linear):
    x, y = data
    model = seeded(lambda: TwoInputs(4, 3))
    expected = plain(lambda x: model(x, x.flip(0)), data)
    for given, target in (
        ((x, x.flip(0), y), None),
        ({"one": x, "two": x.flip(0), "y": y}, None),
        ({"two": x.flip(0), "one": x, "answer": y}, "answer"),
    ):
        torch.testing.assert_close(losses(make(model, given, target=target)), expected)


@pytest.mark.parametrize("chunk", [3, 1000])
@pytest.mark.parametrize("vectorize", [True, False])
def test_a_keyword_model_samples_like_a_plain_one(data, vectorize, chunk):
    expected = quick(make(seeded(lambda: nn.Linear(4, 3)), data)).values("query").values
    got = quick(
        make(seeded(lambda: Keyword(4, 3)), Items(data, "dict")),
        vectorize=vectorize,
        chunk_size=chunk,
    )
    np.testing.assert_allclose(got.values("query").values, expected, rtol=1e-5)


# ---------------------------------------------------------------- ids


@pytest.mark.parametrize("ids", [[f"é{i}" for i in range(10)], np.arange(10) * 7 - 3, range(10)])
def test_ids(data, linear, ids):
    task = make(linear, data, train_ids=ids)
    assert task.train.ids.tolist() == list(ids)
    assert task.query.ids.tolist() == list(range(10))
    wanted = [list(ids)[k] for k in (7, 0, 3)]
    assert task.train.positions(wanted).tolist() == [7, 0, 3]


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        ([0.5] * 10, "must be 10 integers or strings.*float64"),
        (range(9), r"shape \(9,\)"),
        ([True] * 10, "bool"),
        ([0, 1, 1, 2, 3, 4, 5, 6, 2, 2], r"train_ids must be unique: 1 occurs 2 times"),
    ],
)
def test_bad_ids_are_refused(data, linear, ids, words):
    with pytest.raises(ValueError, match=words):
        make(linear, data, train_ids=ids)


def test_ids_are_stored_in_64_bits():
    assert resolve_ids(np.arange(3, dtype=np.uint8), 3, "train").dtype == np.int64


def test_unknown_ids_are_named(data, linear):
    task = make(linear, data, query_ids=[f"q{i}" for i in range(10)])
    with pytest.raises(
        KeyError, match=r"unknown query ids \['q10'\]; ids run from 'q0' to 'q9' \(10 of"
    ):
        task.query.positions(["q3", "q10"])


# ---------------------------------------------------------------- parameters


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))


ALL = ["first.weight", "first.bias", "second.bias", "head.weight", "head.bias"]


@pytest.mark.parametrize(
    ("given", "chosen"),
    [
        (None, ALL),
        (".*", ALL),
        (["head.bias", "first.weight"], ["first.weight", "head.bias"]),
        ("second.weight", ["first.weight"]),
        (r"second\..*", ["first.weight", "second.bias"]),
        ([r".*\.bias", "head.weight"], ["first.bias", "second.bias", "head.weight", "head.bias"]),
    ],
)
def test_selection(data, given, chosen):
    model = seeded(Tied)
    task = make(model, data, parameters=given)
    assert list(task.params) == chosen
    assert task.dimension == sum(model.get_parameter(name).numel() for name in chosen)
    assert "second.weight" not in task.params
    torch.testing.assert_close(losses(task), plain(model, data), rtol=1e-12, atol=0)
    # moving the selected ones moves both ends of a tie, and nothing that was not selected
    moved = {name: value + 0.1 for name, value in task.params.items()}
    other = copy.deepcopy(model)
    with torch.no_grad():
        for name in chosen:
            other.get_parameter(name).add_(0.1)
    got = task.losses(moved, task.train.batch())
    torch.testing.assert_close(got, plain(other, data), rtol=1e-12, atol=0)


def test_a_tied_gradient_sums_both_uses(data):
    model = seeded(Tied)
    task = make(model, data)
    F.cross_entropy(model(data[0]), data[1]).backward()
    expected = torch.cat([model.get_parameter(name).grad.flatten() for name in ALL])
    posterior = bi.LocalPosterior(task, n_beta=1.0, gamma=0.0, potential="plain")
    got = posterior.bind().grad(task.flatten(task.params)[None])[0]
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-14)


def test_frozen_parameters_are_left_out_by_default(data):
    model = seeded(Tied)
    model.first.requires_grad_(False)
    assert list(make(model, data).params) == ["second.bias", "head.weight", "head.bias"]


@pytest.mark.parametrize("lead", [(), (3,), (2, 3)])
def test_flatten_and_unflatten(data, lead):
    task = make(seeded(Tied), data)
    flat = torch.arange(float(np.prod(lead, dtype=int) * task.dimension)).reshape(*lead, -1)
    parts = task.unflatten(flat)
    for name, value in parts.items():
        assert value.shape == (*lead, *task.params[name].shape)
    assert torch.equal(task.flatten(parts), flat)
    one = task.flatten(task.params)
    start = 0
    for p in task.params.values():
        assert torch.equal(one[start : start + p.numel()], p.flatten())
        start += p.numel()
    assert start == task.dimension == len(one)


class Scaled(nn.Linear):
    """With a parameter of no dimensions."""

    def __init__(self):
        super().__init__(4, 3)
        self.scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, x):
        return self.scale * super().forward(x)


def test_scalar_parameters(data):
    model = seeded(Scaled)
    task = make(model, data)
    assert task.unflatten(task.flatten(task.params))["scale"].shape == ()
    values = quick(task, vectorize=True).values("train").values
    looped = quick(task, vectorize=False).values("train").values
    np.testing.assert_allclose(values, looped, rtol=1e-5)


# ---------------------------------------------------------------- the user's module


def snapshot(model):
    return {
        "weights": {k: v.clone() for k, v in model.state_dict().items()},
        "places": {k: p.data_ptr() for k, p in model.named_parameters()},
        "requires": {k: p.requires_grad for k, p in model.named_parameters()},
        "grads": {k: copy.deepcopy(p.grad) for k, p in model.named_parameters()},
        "training": {k: m.training for k, m in model.named_modules()},
        "hooks": {
            k: [
                list(h)
                for h in (
                    m._forward_hooks,
                    m._forward_pre_hooks,
                    m._backward_hooks,
                    m._backward_pre_hooks,
                )
            ]
            for k, m in model.named_modules()
        },
    }  # fmt: skip


def same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def everything():
    return nn.Sequential(
        nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Tanh(), nn.Linear(6, 3)
    )


def test_the_users_module_is_left_as_it_was(data):
    model = seeded(everything)
    F.cross_entropy(model(data[0]), data[1]).backward()
    model[0].bias.requires_grad_(False)
    model[1].eval()
    fired = []
    model[0].register_full_backward_hook(lambda *_: fired.append("module"))
    model[0].weight.register_hook(lambda _: fired.append("tensor"))
    before = snapshot(model)
    task = make(model, data)
    traces = quick(task, measurements=["margin"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", bi.ConvergenceWarning)
        bi.bif(traces)
    bi.diagnose(traces)
    from bayesinf.attribution._grad_dot import grad_dot

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        grad_dot(task)
    assert same(snapshot(model), before)
    assert fired == []
    # and the other way round: training on does not reach the task
    kept = losses(task)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.add_(1)
    assert torch.equal(losses(task), kept)
    assert not any(p.requires_grad for p in task.module.parameters())


def test_forward_hooks_are_part_of_the_network(data, linear):
    linear.register_forward_hook(lambda module, args, out: 3 * out)
    task = make(linear, data)
    torch.testing.assert_close(losses(task), plain(linear, data), rtol=1e-12, atol=0)
    assert len(linear._forward_hooks) == 1


def test_dropout_and_batch_norm_are_frozen(data):
    model = seeded(everything)
    for _ in range(3):
        model(data[0] + 1)
    norm, x = model[1], model[0](data[0])
    assert norm.num_batches_tracked == 3
    x = (x - norm.running_mean) / (norm.running_var + norm.eps).sqrt() * norm.weight + norm.bias
    expected = F.cross_entropy(model[4](torch.tanh(x)), data[1], reduction="none").detach()
    task = make(model, data)
    torch.testing.assert_close(losses(task), expected, rtol=1e-10, atol=0)
    torch.testing.assert_close(expected, plain(copy.deepcopy(model).eval(), data))
    one = task.losses(task.params, task.train.batch(slice(3, 4)))
    torch.testing.assert_close(one, expected[3:4], rtol=1e-10, atol=0)
    assert model.training
    buffers = [b.clone() for b in task.module.buffers()]
    quick(task)
    assert all(torch.equal(a, b) for a, b in zip(buffers, task.module.buffers(), strict=True))


# ---------------------------------------------------------------- identity and devices


def changed(model, edit):
    other = copy.deepcopy(model)
    with torch.no_grad():
        edit(other)
    return other


def test_fingerprint(data):
    x, y = data
    model = seeded(everything)
    model.register_buffer("hidden", torch.zeros(2), persistent=False)
    base = make(model, data).fingerprint()
    again = changed(model, lambda m: None).train()
    assert make(again, (x.clone(), y.numpy())).fingerprint() == base
    assert make(model, TensorDataset(x, y)).fingerprint() == base
    assert make(model, data, device="cpu").fingerprint() == base
    twice = make(model, data, train=(torch.cat([x, x]), torch.cat([y, y])))
    assert twice.n == 20

    def nudged(place):
        def nudge(m):
            place(m).view(-1)[0] += 1e-9

        return make(changed(model, nudge), data)

    swapped = copy.deepcopy(model)
    swapped[3] = nn.ReLU()
    variants = {
        "a weight": (nudged(lambda m: m[0].weight), {"checkpoint"}),
        "a buffer": (nudged(lambda m: m[1].running_mean), {"checkpoint"}),
        "a volatile buffer": (nudged(lambda m: m.hidden), {"checkpoint"}),
        "an activation": (make(swapped, data), {"checkpoint"}),
        "selection": (make(model, data, parameters=r"0\..*"), {"parameters"}),
        "an input": (make(model, data, train=(x + 1e-9, y)), {"train"}),
        "a target": (make(model, data, train=(x, (y + 1) % 3)), {"train"}),
        "order": (make(model, data, train=(x.flip(0), y.flip(0))), {"train"}),
        "an id": (make(model, data, train_ids=[*range(9), 10]), {"train"}),
        "a query": (make(model, data, query=(x[:9], y[:9])), {"query"}),
        "count": (twice, {"train", "n"}),
    }  # fmt: skip
    for what, (task, keys) in variants.items():
        found = task.fingerprint()
        assert {k for k in base if found[k] != base[k]} == keys, what
    other = bi.Task(model, Mine(), train=data, query=data).fingerprint()
    assert {k for k in base if other[k] != base[k]} == {"likelihood"}
    assert other == bi.Task(model, Mine(), train=data, query=data).fingerprint()


class Mine:
    def loss(self, outputs, target):
        return 2 * bi.Categorical().loss(outputs, target)


def test_fingerprint_of_dict_data_knows_names_and_not_order(data):
    x, y = data
    model = seeded(lambda: TwoInputs(4, 3))
    one = make(model, {"one": x, "two": x + 1, "y": y}).fingerprint()["train"]
    assert make(model, {"y": y, "two": x + 1, "one": x}).fingerprint()["train"] == one
    assert make(model, {"one": x + 1, "two": x, "y": y}).fingerprint()["train"] != one


def test_fingerprint_of_many_examples_takes_an_even_sample(linear):
    x = torch.arange(9000.0, dtype=DOUBLE)[:, None].expand(-1, 4).contiguous()
    y = torch.zeros(9000, dtype=torch.long)

    def of(x):
        return Examples((x, y), None, "train", torch.device("cpu"), DOUBLE).fingerprint()

    base = of(x)
    assert of(x.clone()) == base
    for seen, position in ((True, 0), (True, 8997), (False, 1)):
        other = x.clone()
        other[position] = -1
        assert (of(other) != base) is seen


def test_to_another_device(data):
    task = make(seeded(everything), data)
    assert task.to("cpu") is task
    moved = task.to("meta")
    assert moved.device.type == "meta"
    assert {p.device.type for p in moved.module.parameters()} == {"meta"}
    assert {p.device.type for p in moved.params.values()} == {"meta"}
    assert moved.train.batch()[0].device.type == moved.query.batch()[1].device.type == "meta"
    assert task.device.type == "cpu"
    assert {p.device.type for p in task.params.values()} == {"cpu"}
    torch.testing.assert_close(losses(task), plain(task.module, data))
    assert list(moved.params) == list(task.params)
    assert moved.n == task.n
    assert moved.losses(moved.params, moved.train.batch()).shape == (10,)


# ---------------------------------------------------------------- errors


class Random(nn.Linear):
    def forward(self, x):
        return super().forward(x + torch.rand_like(x))


class InPlace(nn.Linear):
    def forward(self, x):
        return super().forward(x.sub_(1))


class MeanLoss:
    def loss(self, outputs, target):
        return F.cross_entropy(outputs, target)


def nan_weight(m):
    m.weight[0, 0] = float("nan")


@pytest.mark.parametrize(
    ("words", "kind", "options"),
    [
        ("must be tensors .* got int", TypeError, {"train": 3}),
        ("query= must be tensors .* got Tensor", TypeError, {"query": torch.zeros(3)}),
        ("holds no examples", ValueError, {"query": (torch.zeros(0, 4), torch.zeros(0).long())}),
        ("exactly one must be the target", ValueError, {"train": {"x": torch.zeros(2, 4)}}),
        ("Name it: Task", ValueError, {"train": {"y": torch.zeros(2), "labels": torch.zeros(2)}}),
        ("exactly one", ValueError,
         {"train": {"x": torch.zeros(2, 4), "y": [0, 1]}, "target": "z"}),
        (r"first dimension; got lengths \[2, 3\]", ValueError,
         {"train": (torch.zeros(2, 4), torch.zeros(3))}),
        (r"parameters='biass' matches no parameter.*\['bias', 'weight'\]", ValueError,
         {"parameters": "biass"}),
    ],
)  # fmt: skip
def test_errors_of_data_and_selection(data, linear, words, kind, options):
    with pytest.raises(kind, match=words):
        make(linear, data, **options)


@pytest.mark.parametrize(
    ("form", "words", "kind"),
    [("text", "must collate to tensors; got a (list|tuple)|got a str", TypeError),
     ("bare", r"items must be \(x, y\) or dicts; got Tensor", ValueError)],
)  # fmt: skip
def test_errors_of_datasets(data, linear, form, words, kind):
    with pytest.raises(kind, match=words):
        make(linear, data, train=Items(data, form))


def test_errors_of_models(data, linear):
    with pytest.raises(ValueError, match="ReLU has no parameters"):
        make(nn.ReLU(), data)
    with pytest.raises(ValueError, match=r"no parameter has requires_grad.*parameters='\.\*'"):
        make(copy.deepcopy(linear).requires_grad_(False), data)
    mixed = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3).double())
    for model in (mixed, copy.deepcopy(linear).to(torch.float8_e5m2)):
        with pytest.raises(TypeError, match=r"all be of one floating dtype .*got \['torch.float"):
            make(model, data)
    with pytest.raises(ValueError, match="two evaluations of the same train examples differ"):
        make(seeded(lambda: Random(4, 3)), data)
    kept = data[0].clone()
    for given in (data, Items(data, "tuple")):
        with pytest.raises(ValueError, match="InPlace changes its inputs in place"):
            make(seeded(lambda: InPlace(4, 3)), given)
    assert torch.equal(data[0], kept)
    with pytest.raises(ValueError, match="loss of a train example is not finite"):
        make(changed(linear, nan_weight), data)
    with pytest.raises(ValueError, match=r"one loss per example, shape \(2,\) here; got \(\)"):
        bi.Task(linear, MeanLoss(), train=data, query=data)
    with pytest.raises(ValueError, match="Categorical got labels"):
        make(linear, data, query=(data[0], data[1] + 3))


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_losses_of_the_grid(case):
    task = case.task()
    x, y = task.train.batch()
    model = task.module
    if case.likelihood == bi.Categorical():
        expected = F.cross_entropy(model(x), y, reduction="none")
    elif case.likelihood == bi.Gaussian():
        expected = 0.5 * ((model(x) - y) ** 2).sum(1)
    else:
        expected = F.binary_cross_entropy_with_logits(model(x), y, reduction="none").sum(1)
    torch.testing.assert_close(losses(task), expected, rtol=1e-11, atol=1e-14)


def test_a_measurement_of_the_users_own():
    task = BY_NAME["softmax-regression"].task()

    def second_logit(task, params, batch):
        return task.outputs(params, batch)[:, 1]

    batch = task.query.batch()
    got = task.measure(second_logit, task.params, batch)
    assert torch.equal(got, task.module(batch[0])[:, 1])


def test_a_label_out_of_range_is_found_wherever_it_stands():
    x, y = torch.randn(9, 4), torch.tensor([0, 1, 2, 0, 1, 2, 0, 3, 1])
    with pytest.raises(ValueError, match="labels from 0 to 3 for 3 classes"):
        bi.Task(nn.Linear(4, 3), bi.Categorical(), train=(x, y), query=(x[:2], y[:2]))
    with pytest.raises(ValueError, match="labels from 0 to 3 for 3 classes"):
        bi.Task(nn.Linear(4, 3), bi.Categorical(), train=(x[:2], y[:2]), query=(x, y))
