"""Scores by module, by token and of examples with themselves, for every classical method."""

import itertools
from functools import cache

import numpy as np
import pytest
import torch
from torch import nn

import bayesinf as bi
from bayesinf import fit_curvature
from bayesinf.attribution import _pairwise
from tests import exact
from tests.layered_cases import CAT, LAYERED_BY_NAME, Layered, ids, pairs, text

DAMPING = 0.2
METHODS = {
    "ekfac": lambda task, **o: bi.ekfac(task, fisher="empirical", damping=DAMPING, **o),
    "kfac": lambda task, **o: bi.kfac(task, fisher="empirical", damping=DAMPING, **o),
    "woodbury": lambda task, **o: bi.gauss_newton(task, damping=DAMPING, solver="woodbury", **o),
    "dense": lambda task, **o: bi.gauss_newton(task, damping=DAMPING, solver="dense", **o),
    "hessian": lambda task, **o: bi.hessian(task, damping=40.0, **o),
    "grad_dot": bi.grad_dot,
}
DECODERS = ["decoder-tied", "decoder-left", "decoder-transposed"]
PART = {"loss": exact.loss_tokens, "position": lambda task, split: positions(task, split)}


def preconditioner(method, task):
    """``M`` of ``influence = left M rightᵀ``, dense."""
    eye = torch.eye(task.dimension, dtype=torch.float64)
    if method == "grad_dot":
        return -eye
    if method in ("ekfac", "kfac"):
        matrix = fit_curvature(task, fisher="empirical", form=method).dense()
    elif method == "hessian":
        matrix = exact.loss_hessian(task)
    else:
        matrix = exact.gauss_newton(task)
    damping = 40.0 if method == "hessian" else DAMPING
    return -torch.linalg.inv(matrix + damping * eye) / task.n


def mask(task, split):
    inputs = task.examples(split).batch()[0]
    if isinstance(inputs, dict):
        return inputs["attention_mask"].bool()
    return torch.ones(inputs.shape[:2], dtype=torch.bool)


def positions(task, split):
    """Parts of gradients by position, of tokens that are not padding."""
    return exact.position_tokens(task, split)[mask(task, split)]


# ---------------------------------------------------------------- the oracle itself


TOKENWISE = {**dict.fromkeys([*DECODERS, "sequence"], ".*"), "words": "words.*",
             "positions-row": "words.*|places.*"}  # fmt: skip


@pytest.mark.parametrize("name", TOKENWISE)
def test_parts_of_the_oracle_sum_to_gradients(name):
    task = LAYERED_BY_NAME[name].task(parameters=TOKENWISE[name])
    exact.close(exact.position_tokens(task).sum(1), exact.gradients(task), 1e-12)


# ---------------------------------------------------------------- tokens


@cache
def parts(name):
    """Rows of gradients by split and kind of token."""
    task = LAYERED_BY_NAME[name].task()
    return {
        split: {
            None: exact.gradients(task, split),
            "loss": exact.loss_tokens(task, split),
            "position": positions(task, split),
        }
        for split in ("train", "query")
    }


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", DECODERS)
def test_token_scores_of_a_language_model(name, method):
    """Every combination of whole examples, positions and losses on both sides."""
    task, rows = LAYERED_BY_NAME[name].task(), parts(name)
    m = preconditioner(method, task)
    for q, t in itertools.product((None, "loss", "position"), repeat=2):
        scores = METHODS[method](task, query_tokens=q, train_tokens=t, batch_size=3)
        dims = ("query" if q is None else "query_token", "train" if t is None else "train_token")
        assert scores.influence.dims == dims
        exact.close(scores.influence, rows["query"][q] @ m @ rows["train"][t].T, 1e-9)


@pytest.mark.parametrize("kind", ["position", "loss"])
@pytest.mark.parametrize("method", METHODS)
def test_token_scores_sum_to_the_sequence_score(method, kind):
    """By the labels that the scores carry, in blocks of any size."""
    for name in DECODERS if method == "ekfac" else ["decoder-tied"]:
        task = LAYERED_BY_NAME[name].task(train_ids=[f"t{i}" for i in range(4)])
        whole = METHODS[method](task).influence
        options = {"batch_size": 1, "query_batch_size": 2}
        train = METHODS[method](task, train_tokens=kind, **options).influence
        exact.close(train.groupby("train").sum().transpose("query", "train"), whole, 1e-10)
        query = METHODS[method](task, query_tokens=kind, **options).influence
        exact.close(query.groupby("query").sum(), whole, 1e-10)
        both = METHODS[method](task, query_tokens=kind, train_tokens=kind, **options).influence
        exact.close(both.groupby("query").sum().groupby("train").sum(), whole, 1e-10)


@pytest.mark.parametrize("name", DECODERS)
def test_labels_of_tokens(name):
    """Padded and uncounted tokens are absent; the others say where they stand and what they are."""
    task = LAYERED_BY_NAME[name].task(train_ids=list("abcd"))
    inputs, labels = task.train.batch()
    counted = {
        "position": inputs["attention_mask"].bool(),
        "loss": task.likelihood.token_mask(labels),
    }
    held = {"position": inputs["input_ids"], "loss": labels}
    for kind in ("position", "loss"):
        scores = bi.grad_dot(task, train_tokens=kind)
        where = counted[kind].nonzero()
        assert not bool(counted[kind].all())
        assert scores.sizes["train_token"] == len(where)
        assert scores.train.values.tolist() == ["abcd"[i] for i in where[:, 0]]
        np.testing.assert_array_equal(scores.train_position, where[:, 1])
        np.testing.assert_array_equal(scores.train_token_id, held[kind][counted[kind]])
        one = scores.influence[:, (scores.train == "b") & (scores.train_position == 2)]
        assert one.shape == (3, int(counted[kind][1, 2]))


@pytest.mark.parametrize("name", ["sequence", "words", "positions-row"])
def test_positions_of_other_networks(name):
    """Numbers or ids as inputs; layers that see every position."""
    task = LAYERED_BY_NAME[name].task(parameters=TOKENWISE[name])
    scores = bi.grad_dot(task, train_tokens="position", query_tokens="position")
    left, right = (exact.position_tokens(task, s).flatten(0, 1) for s in ("query", "train"))
    exact.close(scores.influence, -(left @ right.T), 1e-10)
    assert ("train_token_id" in scores.coords) == (name != "sequence")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("words", "layer 'head' has 1 positions for 4 tokens, .*a layer after pooling"),
        ("called-twice", "layer 'body' has 2 positions for 4 tokens"),
        # channels first: what it calls tokens are channels
        ("tagging", r"layer '\(model\)' has 4 positions for 3 tokens"),
        ("conv1d-groups", "layer '0' has 4 positions for 2 tokens"),
    ],
)
def test_layers_that_see_no_positions(name, message):
    task = LAYERED_BY_NAME[name].task()
    with pytest.raises(ValueError, match=message):
        bi.grad_dot(task, train_tokens="position")
    with pytest.raises(ValueError, match=message):
        bi.grad_dot(task, query_tokens="position")


class Recurrent(nn.Module):
    """One layer called twice on a sequence: a token's part holds both calls."""

    def __init__(self):
        super().__init__()
        self.words, self.body, self.head = nn.Embedding(5, 3), nn.Linear(3, 3), nn.Linear(3, 5)

    def forward(self, input_ids, attention_mask):
        h = self.body(torch.tanh(self.body(self.words(input_ids))))
        return self.head(h.cumsum(1))


def test_both_calls_of_a_layer_belong_to_the_token():
    case = Layered("recurrent", Recurrent, bi.CausalLM(), text(5, 4, "right"), {}, n=4)
    task = case.task()
    scores = bi.grad_dot(task, train_tokens="position")
    expected = -(exact.gradients(task, "query") @ positions(task, "train").T)
    exact.close(scores.influence, expected, 1e-10)


@pytest.mark.parametrize("name", ["segmentation", "tagging"])
def test_losses_of_positions(name):
    """Labels of images are tokens too, row by row."""
    task = LAYERED_BY_NAME[name].task()
    rows = {split: exact.loss_tokens(task, split) for split in ("train", "query")}
    scores = bi.grad_dot(task, train_tokens="loss", query_tokens="loss", batch_size=4)
    exact.close(scores.influence, -(rows["query"] @ rows["train"].T), 1e-10)
    _, y = task.train.batch()
    np.testing.assert_array_equal(scores.train_token_id, y.flatten())
    np.testing.assert_array_equal(scores.train_position, np.tile(np.arange(4), 6))


@pytest.mark.parametrize("kind", ["loss", "position"])
def test_cosines_of_tokens(kind):
    task = LAYERED_BY_NAME["decoder-left"].task()
    left, right = (PART[kind](task, split) for split in ("query", "train"))
    expected = -(nn.functional.normalize(left) @ nn.functional.normalize(right).T)
    scores = bi.grad_cos(task, train_tokens=kind, query_tokens=kind)
    exact.close(scores.influence, expected, 1e-10)


def test_blocks_of_tokens_are_bounded(monkeypatch):
    task = LAYERED_BY_NAME["decoder-tied"].task()
    options = {"train_tokens": "loss", "query_tokens": "position"}
    whole = METHODS["ekfac"](task, **options).influence
    monkeypatch.setattr(_pairwise, "_QUERY_ELEMENTS", 9 * task.dimension)  # 2 queries of 4 tokens
    monkeypatch.setattr(_pairwise, "_TRAIN_ELEMENTS", 4 * task.dimension)
    exact.close(METHODS["ekfac"](task, **options).influence, whole, 1e-12)


# ---------------------------------------------------------------- tokens that do not exist


def test_parameters_without_positions_are_named():
    scaled = Layered("scaled", Scaled, CAT, pairs(ids(5, 4), ids(3)), {})
    for case, name in (
        (LAYERED_BY_NAME["attention"], "attention.in_proj_weight"),
        (scaled, "scale"),
    ):
        with pytest.raises(ValueError, match=f"{name}: this gradient has no positions"):
            bi.grad_dot(case.task(), train_tokens="position")


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale, self.words = nn.Parameter(torch.ones(3)), nn.Embedding(5, 3)

    def forward(self, x):
        return (self.words(x) * self.scale).mean(1)


def test_inputs_without_tokens():
    task = LAYERED_BY_NAME["words-alone"].task()
    message = r"token scores need inputs \(B, T, …\) or a dict with 'input_ids' .*got \(6,\)"
    with pytest.raises(ValueError, match=message):
        bi.grad_dot(task, train_tokens="position")
    pair = LAYERED_BY_NAME["category"].task()
    with pytest.raises(ValueError, match=r"got \(3,\)"):
        bi.grad_dot(pair, query_tokens="position")
    other = Layered(
        "named", Scaled, CAT, lambda g, n: {"x": ids(5, 4)(g, n), "labels": ids(3)(g, n)}, {}
    ).task()
    with pytest.raises(ValueError, match="got NoneType"):
        bi.grad_dot(other, query_tokens="position")


def test_one_loss_an_example_has_no_tokens():
    task = LAYERED_BY_NAME["softmax-regression"].task()
    for side in ("train_tokens", "query_tokens"):
        with pytest.raises(ValueError, match=r"need one loss a token, \(B, T, …\); targets here"):
            bi.grad_dot(task, **{side: "loss"})


def test_a_likelihood_without_token_losses():
    task = LAYERED_BY_NAME["mlp-gaussian"].task()
    with pytest.raises(NotImplementedError, match="tokens='loss' needs `token_mask`"):
        bi.grad_dot(task, train_tokens="loss")


# ---------------------------------------------------------------- modules


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["cnn", "raw", "layer-norm", "decoder-tied", "decoder-transposed"])
def test_modules_sum_to_the_total(name, method):
    task = LAYERED_BY_NAME[name].task()
    m = preconditioner(method, task)
    if method == "hessian":
        low = float(torch.linalg.eigvalsh(exact.loss_hessian(task))[0])
        assert low > -40
    scores = METHODS[method](task, modules=True)
    by_module = scores.influence_by_module
    assert by_module.dims == ("module", "query", "train")
    exact.close(by_module.sum("module"), scores.influence, 1e-12)
    exact.close(scores.influence, METHODS[method](task).influence, 1e-12)
    left, right = exact.gradients(task, "query") @ m, exact.gradients(task)
    layers = fit_curvature(task, fisher="empirical", form="identity").layers
    assert scores.module.values.tolist() == [layer.name for layer in layers]
    for layer in layers:
        where = exact.index(task, layer)
        expected = left[:, where] @ right[:, where].T
        exact.close(by_module.sel(module=layer.name), expected, 1e-9)


def test_modules_with_tokens():
    task = LAYERED_BY_NAME["decoder-left"].task()
    options = {"train_tokens": "position", "query_tokens": "loss"}
    scores = METHODS["ekfac"](task, modules=True, **options)
    assert scores.influence_by_module.dims == ("module", "query_token", "train_token")
    exact.close(scores.influence, METHODS["ekfac"](task, **options).influence, 1e-12)
    exact.close(scores.influence_by_module.sum("module"), scores.influence, 1e-12)


# ---------------------------------------------------------------- self-influence


@pytest.mark.parametrize("method", [*METHODS, "grad_cos"])
@pytest.mark.parametrize("name", ["cnn", "raw", "decoder-tied"])
def test_self_influence_is_the_diagonal(name, method):
    case = LAYERED_BY_NAME[name]
    task = case.task()
    same = bi.Task(
        task.module, task.likelihood, parameters=list(task.params),
        train=flat(task.train.batch()), query=flat(task.train.batch()),
        train_ids=[f"x{i}" for i in range(task.n)],
    )  # fmt: skip
    run = METHODS.get(method, bi.grad_cos)
    scores = run(same, pairs="self", batch_size=3)
    assert scores.influence.dims == ("train",)
    assert scores.train.values.tolist() == [f"x{i}" for i in range(task.n)]
    exact.close(scores.influence, np.diag(run(same).influence), 1e-10)
    assert scores.attrs["pairs"] == "self"
    if method == "grad_cos":
        np.testing.assert_allclose(scores.influence, -1, rtol=1e-12)


def flat(batch):
    x, y = batch
    return {**x, "labels": y} if isinstance(x, dict) else (x, y)


def test_an_example_without_gradient_has_no_influence_on_itself():
    x = torch.tensor([[0.0, 0.0], [1.0, 2.0]], dtype=torch.float64)
    model = nn.Linear(2, 1, bias=False).double()
    task = bi.Task(model, bi.Gaussian(), train=(x, x[:, :1] + 5), query=(x, x[:, :1]))
    exact.close(bi.grad_cos(task, pairs="self").influence, [0.0, -1.0], 1e-12)
