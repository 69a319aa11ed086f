"""The grid of small float64 networks with every structure that layers must get right, as data.

Each case says which kinds of layers its parameters must be found to be, by layer name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import bayesinf as bi
from tests.cases import BY_NAME

CAT, GAUSS, BERN, LM = bi.Categorical(), bi.Gaussian(), bi.Bernoulli(), bi.CausalLM()

Draw = Callable[[torch.Generator, int], Any]


@dataclass(frozen=True)
class Layered:
    """A network with its data and the kinds of its layers, in the order of the parameters."""

    name: str
    model: Callable[[], nn.Module]
    likelihood: Any
    data: Draw
    kinds: dict[str, str]
    n: int = 6
    queries: int = 3
    options: dict[str, Any] = field(default_factory=dict)

    def task(self, **options: Any) -> bi.Task:
        g = torch.Generator().manual_seed(7)
        with torch.random.fork_rng():
            torch.manual_seed(3)
            model = self.model().double()
        data = {"train": self.data(g, self.n), "query": self.data(g, self.queries)}
        return bi.Task(model, self.likelihood, **data, **{**self.options, **options})


# ---------------------------------------------------------------- data


def floats(*shape: int) -> Draw:
    return lambda g, n: torch.randn(n, *shape, generator=g, dtype=torch.float64)


def ids(vocabulary: int, *shape: int) -> Draw:
    return lambda g, n: torch.randint(vocabulary, (n, *shape), generator=g)


def bits(*shape: int) -> Draw:
    return lambda g, n: torch.randint(2, (n, *shape), generator=g).double()


def pairs(inputs: Draw, target: Draw) -> Draw:
    return lambda g, n: (inputs(g, n), target(g, n))


def text(vocabulary: int, length: int, side: str | None = None) -> Draw:
    """Sequences of unequal length, padded on a side; padding is masked and not predicted."""

    def draw(g: torch.Generator, n: int) -> dict[str, Tensor]:
        tokens = torch.randint(1, vocabulary, (n, length), generator=g)
        labels, mask = tokens.clone(), torch.ones_like(tokens)
        for i in range(n if side else 0):
            pad = (1 + i) % (length - 1)
            where = slice(length - pad, None) if side == "right" else slice(0, pad)
            tokens[i, where], labels[i, where], mask[i, where] = 0, -100, 0
            if side == "left":
                labels[i, pad] = -100  # predicted from padding
        return {"input_ids": tokens, "attention_mask": mask, "labels": labels}

    return draw


# ---------------------------------------------------------------- networks


class Sequence(nn.Module):
    """Linear layers on ``(B, T, M)`` with a mean over positions."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 4, bias=bias), nn.Linear(4, 3, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        h = self.last(torch.tanh(self.first(x)))
        return h.flatten(1, -2).mean(1)


class FoldedSequence(Sequence):
    """The same with positions folded into the batch, ``(B·T, M)``."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.last(torch.tanh(self.first(x.flatten(0, 1))))
        return h.view(len(x), -1, 3).mean(1)


class Twice(nn.Module):
    """One module called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(torch.tanh(self.body(x)))))


class Tied(nn.Module):
    """Two modules with one weight and biases of their own."""

    def __init__(self, share_bias: bool = False) -> None:
        super().__init__()
        self.one, self.two, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.two.weight = self.one.weight
        if share_bias:
            self.two.bias = self.one.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.two(torch.tanh(self.one(x)))))


class InPlace(nn.Module):
    """Activations that overwrite a layer's output."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(x).tanh_())


class Idle(nn.Module):
    """Layers that are never called, or whose output goes nowhere."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.idle, self.cut = (
            nn.Linear(3, 2),
            nn.Conv1d(4, 4, 1, groups=2),
            nn.Linear(3, 2),
        )
        self.norm, self.words = nn.LayerNorm(2), nn.Embedding(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        self.cut(x)
        return self.used(x)


class Words(nn.Module):
    """The mean of a bag of embedded tokens; padding is no word."""

    def __init__(self, padding_idx: int | None = None) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(5, 3, padding_idx=padding_idx), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.words(x)).flatten(1, -2).mean(1))


class Features(nn.Module):
    """One embedded category ``(B,)`` an example beside numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.kind, self.head = nn.Embedding(4, 3), nn.Linear(3, 3)

    def forward(self, kind: Tensor, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.kind(kind) + x))


class Flattened(nn.Module):
    """All tokens of a batch embedded as one vector of ids."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(5, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.words(x.flatten())).view(*x.shape, 3).mean(1))


class Positions(nn.Module):
    """Token and position embeddings; the index of positions is the same for a whole batch."""

    def __init__(self, index: str) -> None:
        super().__init__()
        self.words, self.places, self.head = nn.Embedding(5, 3), nn.Embedding(4, 3), nn.Linear(3, 3)
        self.index = index

    def forward(self, x: Tensor) -> Tensor:
        places = torch.arange(x.shape[1])
        if self.index == "row":
            h = self.places(places.unsqueeze(0))
        elif self.index == "vector":
            h = self.places(places)
        else:
            h = self.places(places).unsqueeze(0)  # a shape that leaves no room for a batch
        b, t, m = (self.words(x) + h).shape
        return self.head(torch.tanh(self.words(x) + h).reshape(b, t, m).mean(1))


class RootMeanSquare(nn.Module):
    def __init__(self, size: int, plus_one: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(size))
        self.plus_one = plus_one

    def forward(self, hidden_states: Tensor) -> Tensor:
        x = hidden_states
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
        return x * (1 + self.weight) if self.plus_one else self.weight * x


class OwnRMSNorm(RootMeanSquare):
    """``w ⊙ x̂`` as in Llama."""

    def __init__(self, size: int) -> None:
        super().__init__(size, False)


class ShiftedRMSNorm(RootMeanSquare):
    """``(1 + w) ⊙ x̂`` as in Gemma."""

    def __init__(self, size: int) -> None:
        super().__init__(size, True)


class GatedRMSNorm(RootMeanSquare):
    """A norm with a second input, whose weight is no plain scale."""

    def __init__(self, size: int) -> None:
        super().__init__(size, False)

    def forward(self, hidden_states: Tensor, gate: Tensor) -> Tensor:
        return super().forward(hidden_states * gate.tanh())


class ScalarRMSNorm(nn.Module):
    """One number for all channels."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(1.3))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x / x.square().mean(-1, keepdim=True).sqrt()


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.norm, self.other = nn.Linear(4, 3), GatedRMSNorm(3), ScalarRMSNorm()

    def forward(self, x: Tensor) -> Tensor:
        h = self.fc(x)
        return self.other(self.norm(h, gate=h)) + self.norm(hidden_states=h, gate=h)


class ByKeyword(nn.Module):
    """A norm that is called with its input by name."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.norm, self.head = nn.Linear(4, 3), OwnRMSNorm(3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(input=self.norm(hidden_states=self.fc(x)))


class Attention(nn.Module):
    """``nn.MultiheadAttention``, which uses its weights outside their modules."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))


class Raw(nn.Module):
    """Parameters without a module: a matrix, a vector, a number, a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix, self.shift = nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(3))
        self.scale = nn.Parameter(torch.tensor(0.7))
        self.cube = nn.Parameter(torch.randn(2, 3, 2))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(x @ self.matrix.T + self.shift) * self.scale
        return torch.einsum("bi,oij,bj->bo", h, self.cube, h[:, :2])


class Bilinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Bilinear(3, 2, 2)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.tanh(self.layer(x, y))


class LoRA(nn.Module):
    """Two small layers beside a frozen one."""

    def __init__(self) -> None:
        super().__init__()
        self.base, self.head = nn.Linear(4, 4), nn.Linear(4, 3)
        self.down, self.up = nn.Linear(4, 2, bias=False), nn.Linear(2, 4, bias=False)
        self.base.requires_grad_(False)
        self.head.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.base(x) + 2 * self.up(self.down(x))))


class RawLoRA(nn.Module):
    """The same with parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(4, 3)
        self.base.requires_grad_(False)
        self.down, self.up = nn.Parameter(torch.randn(2, 4)), nn.Parameter(torch.randn(3, 2))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.base(x) + x @ (self.up @ self.down).T)


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight.sin()


def parametrised() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    parametrize.register_parametrization(model[0], "weight", Doubled())
    return model


class Conv1D(nn.Module):
    """A linear layer whose weight is stored as ``(inputs, outputs)``."""

    def __init__(self, outputs: int, inputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs) / inputs**0.5)
        self.bias = nn.Parameter(torch.randn(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


Conv1D.__module__ = "transformers.pytorch_utils"  # what such a layer is recognised by


class Block(nn.Module):
    """Causal attention with one head, and an MLP, both on normalised inputs."""

    def __init__(self, width: int, kind: str) -> None:
        super().__init__()
        linear = (lambda a, b: Conv1D(b, a)) if kind == "hf" else nn.Linear
        norm = OwnRMSNorm if kind == "llama" else nn.LayerNorm
        self.norm, self.qkv, self.out = norm(width), linear(width, 3 * width), linear(width, width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).chunk(3, dim=-1)
        t = x.shape[1]
        allowed = torch.ones(t, t, dtype=torch.bool).tril() & mask[:, None, :].bool()
        allowed = allowed | torch.eye(t, dtype=torch.bool)  # padding sees itself
        weights = (q @ k.mT).masked_fill(~allowed, float("-inf")).softmax(-1)
        return x + torch.tanh(self.out(weights @ v))


class Decoder(nn.Module):
    """A causal language model; position ids count what is not padding."""

    def __init__(self, kind: str, vocabulary: int = 5, width: int = 3, length: int = 4) -> None:
        super().__init__()
        self.words = nn.Embedding(vocabulary, width)
        self.places = nn.Embedding(length, width)
        self.block, self.norm = Block(width, kind), nn.LayerNorm(width, bias=False)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.kind = kind
        if kind == "tied":
            self.head.weight = self.words.weight

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        if self.kind == "hf":
            places = torch.arange(input_ids.shape[1])[None]
        else:
            places = (attention_mask.cumsum(1) - 1).clamp_min(0)
        h = self.words(input_ids) + self.places(places)
        return self.head(self.norm(self.block(h, attention_mask)))


def conv(**options: Any) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 3, **options), nn.Tanh(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        nn.Linear(12, 2),
    )  # fmt: skip


def grouped(**options: Any) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(4, 4, 2, **options), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(4, 2),
    )  # fmt: skip


def conv1d(**options: Any) -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(2, 4, 2, **options), nn.Tanh(), nn.AdaptiveAvgPool1d(2), nn.Flatten(),
        nn.Linear(8, 2),
    )  # fmt: skip


def conv3d() -> nn.Module:
    layer = nn.Conv3d(2, 3, (2, 1, 2), stride=(1, 2, 1), padding=(1, 0, 1), dilation=(1, 1, 2))
    return nn.Sequential(layer, nn.Tanh(), nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(3, 2))


def normed(layer: nn.Module, first: nn.Module, features: int) -> nn.Module:
    """A norm with affine parameters, and running statistics where it has any, off their start."""
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(0.5 * torch.randn_like(p))
    if getattr(layer, "running_var", None) is not None:
        layer.running_mean.normal_()
        layer.running_var.uniform_(0.5, 2)
    return nn.Sequential(first, layer, nn.Tanh(), nn.Flatten(), nn.Linear(features, 2))


def flat_norm(layer: nn.Module) -> nn.Module:
    return normed(layer, nn.Linear(3, 4), 4)


def image_norm(layer: nn.Module) -> nn.Module:
    return normed(layer, nn.Conv2d(2, 4, 1), 16)


def convolutions(*names: str) -> dict[str, str]:
    return dict.fromkeys(names[:-1], "conv") | {names[-1]: "linear"}


def linears(*names: str) -> dict[str, str]:
    return dict.fromkeys(names, "linear")


# ---------------------------------------------------------------- the grid


def _plain(name: str, kinds: dict[str, str]) -> Layered:
    """A case of the common grid."""
    case = BY_NAME[name]
    if isinstance(case.likelihood, bi.Categorical):
        target = ids(case.outputs)
    else:
        target = (bits if isinstance(case.likelihood, bi.Bernoulli) else floats)(case.outputs)
    data = pairs(floats(*case.features), target)
    return Layered(name, case.model, case.likelihood, data, kinds, n=case.n, queries=case.queries)


_IMAGE, _TWO = pairs(floats(2, 5, 4), ids(2)), pairs(floats(3), ids(2))
_ALONE = linears("(model)")
_CONV = convolutions("0", "4")
_NORM = {"0": "linear", "1": "affine", "4": "linear"}
_IMAGE_NORM = {**_NORM, "0": "conv"}
_BAG = {"words": "embedding", "head": "linear"}
_BLOCK = {"block.norm": "affine", "block.qkv": "linear", "block.out": "linear", "norm": "affine"}
_WORDS = {"words": "embedding", "places": "embedding"}

LAYERED = [
    _plain("linear-gaussian", _ALONE),
    _plain("linear-gaussian-2", _ALONE),
    _plain("softmax-regression", _ALONE),
    _plain("logistic", _ALONE),
    _plain("mlp-categorical", linears("0", "2", "4")),
    _plain("mlp-no-bias", linears("0", "2")),
    _plain("mlp-gaussian", linears("0", "2")),
    _plain("mlp-bernoulli", linears("0", "2")),
    _plain("cnn", convolutions("0", "2", "5")),
    _plain("cnn-no-bias", convolutions("0", "2", "5")),
    Layered("sequence", Sequence, CAT, pairs(floats(4, 3), ids(3)), linears("first", "last")),
    Layered(
        "sequence-no-bias", lambda: Sequence(False), CAT, pairs(floats(4, 3), ids(3)),
        linears("first", "last"),
    ),
    Layered(
        "sequence-planes", Sequence, GAUSS, pairs(floats(2, 2, 3), floats(3)),
        linears("first", "last"),
    ),
    Layered(
        "sequence-folded", FoldedSequence, CAT, pairs(floats(4, 3), ids(3)),
        linears("first", "last"),
    ),
    Layered("called-twice", Twice, CAT, pairs(floats(4), ids(3)), linears("body", "head")),
    Layered(
        "tied", Tied, CAT, pairs(floats(4), ids(3)),
        linears("one", "one.bias", "two.bias", "head"),
    ),
    Layered("tied-with-bias", lambda: Tied(True), CAT, pairs(floats(4), ids(3)),
            linears("one", "head")),
    Layered("in-place", InPlace, CAT, pairs(floats(4), ids(3)), linears("one", "two")),
    Layered("idle", Idle, GAUSS, pairs(floats(3), floats(2)),
            {"used": "linear", "idle": "conv", "cut": "linear", "norm": "affine",
             "words": "embedding"}),
    Layered("conv-valid", lambda: conv(kernel_size=(3, 2)), CAT, _IMAGE, _CONV),
    Layered("conv-string", lambda: conv(kernel_size=2, padding="valid"), CAT, _IMAGE, _CONV),
    Layered("conv-stride", lambda: conv(kernel_size=3, stride=(2, 1), padding=(1, 2)), CAT,
            _IMAGE, _CONV),
    Layered("conv-dilated", lambda: conv(kernel_size=2, dilation=(2, 1), bias=False), CAT, _IMAGE,
            _CONV),
    Layered("conv-same", lambda: conv(kernel_size=(3, 2), padding="same", dilation=(1, 2)), GAUSS,
            pairs(floats(2, 5, 4), floats(2)), _CONV),
    Layered("conv-reflect",
            lambda: conv(kernel_size=(3, 5), padding=(1, 2), padding_mode="reflect"), CAT, _IMAGE,
            _CONV),
    Layered("conv-circular",
            lambda: conv(kernel_size=(2, 3), padding="same", padding_mode="circular"), CAT, _IMAGE,
            _CONV),
    Layered("conv-groups", lambda: grouped(groups=2, stride=(1, 2)), CAT,
            pairs(floats(4, 3, 4), ids(2)), _CONV),
    Layered("conv-depthwise", lambda: grouped(groups=4, bias=False, padding=1), BERN,
            pairs(floats(4, 2, 3), bits(2)), _CONV),
    Layered("conv1d", lambda: conv1d(stride=2, padding=1, dilation=2), CAT,
            pairs(floats(2, 7), ids(2)), _CONV),
    Layered("conv1d-groups", lambda: conv1d(groups=2, padding="same", padding_mode="replicate"),
            CAT, pairs(floats(2, 4), ids(2)), _CONV),
    Layered("conv3d", conv3d, CAT, pairs(floats(2, 2, 3, 3), ids(2)), _CONV),
    Layered("conv-transposed",
            lambda: nn.Sequential(nn.ConvTranspose1d(2, 2, 2), nn.Flatten(), nn.Linear(6, 2)), CAT,
            pairs(floats(2, 2), ids(2)), {"0.weight": "free", "0.bias": "free", "2": "linear"}),
    Layered("segmentation", lambda: nn.Sequential(nn.Conv2d(2, 3, 2, padding=1), nn.Tanh(),
                                                  nn.Conv2d(3, 2, 2)), CAT,
            pairs(floats(2, 2, 2), ids(2, 2, 2)), {"0": "conv", "2": "conv"}),
    Layered("tagging", lambda: nn.Conv1d(3, 2, 3, padding=1), CAT, pairs(floats(3, 4), ids(2, 4)),
            {"(model)": "conv"}),
    Layered("stored-transposed", lambda: nn.Sequential(Conv1D(4, 3), nn.Tanh(), Conv1D(2, 4)), CAT,
            _TWO, linears("0", "2")),
    Layered("words", Words, CAT, pairs(ids(5, 4), ids(3)), _BAG),
    Layered("words-padded", lambda: Words(0), CAT, pairs(ids(5, 4), ids(3)), _BAG),
    Layered("words-planes", Words, CAT, pairs(ids(5, 2, 2), ids(3)), _BAG),
    Layered("words-flattened", Flattened, CAT, pairs(ids(5, 4), ids(3)), _BAG),
    Layered("words-alone", lambda: nn.Embedding(4, 3), GAUSS, pairs(ids(4), floats(3)),
            {"(model)": "embedding"}),
    Layered("category", Features, CAT, lambda g, n: (ids(4)(g, n), floats(3)(g, n), ids(3)(g, n)),
            {"kind": "embedding", "head": "linear"}),
    *(
        Layered(f"positions-{index}", lambda index=index: Positions(index), CAT,  # type: ignore[misc]
                pairs(ids(5, 4), ids(3)), {**_WORDS, "head": "linear"}, n=4 + (index == "row"))
        for index in ("row", "vector")
    ),
    Layered("positions-unsqueezed", lambda: Positions("unsqueezed"), CAT,
            pairs(ids(5, 4), ids(3)),
            {"words": "embedding", "places.weight": "free", "head": "linear"}),
    Layered("layer-norm", lambda: flat_norm(nn.LayerNorm(4)), CAT, _TWO, _NORM),
    Layered("layer-norm-no-bias", lambda: flat_norm(nn.LayerNorm(4, bias=False)), CAT, _TWO, _NORM),
    Layered("layer-norm-planes", lambda: normed(nn.LayerNorm((2, 2)), nn.Linear(3, 2), 8), CAT,
            pairs(floats(2, 2, 3), ids(2)), _NORM),
    Layered("rms-norm", lambda: flat_norm(nn.RMSNorm(4)), CAT, _TWO, _NORM),
    Layered("rms-norm-own", lambda: flat_norm(OwnRMSNorm(4)), CAT, _TWO, _NORM),
    Layered("rms-norm-shifted", lambda: normed(ShiftedRMSNorm(4), nn.Linear(3, 4), 8), CAT,
            pairs(floats(2, 3), ids(2)), _NORM),
    Layered("rms-norm-by-keyword", ByKeyword, CAT, pairs(floats(4), ids(3)),
            {"fc": "linear", "norm": "affine", "head": "linear"}),
    Layered("rms-norm-gated", Gated, GAUSS, pairs(floats(4), floats(3)),
            {"fc": "linear", "norm.weight": "free", "other.weight": "free"}),
    Layered("group-norm", lambda: image_norm(nn.GroupNorm(2, 4)), CAT,
            pairs(floats(2, 2, 2), ids(2)), _IMAGE_NORM),
    Layered("batch-norm", lambda: flat_norm(nn.BatchNorm1d(4)), CAT, _TWO, _NORM),
    Layered("batch-norm-1d", lambda: normed(nn.BatchNorm1d(4), nn.Conv1d(1, 4, 1), 8), CAT,
            pairs(floats(1, 2), ids(2)), _IMAGE_NORM),
    Layered("batch-norm-2d", lambda: image_norm(nn.BatchNorm2d(4)), CAT,
            pairs(floats(2, 2, 2), ids(2)), _IMAGE_NORM),
    Layered("instance-norm", lambda: image_norm(nn.InstanceNorm2d(4, affine=True)), CAT,
            pairs(floats(2, 2, 2), ids(2)), _IMAGE_NORM),
    Layered("attention", Attention, CAT, pairs(floats(3, 4), ids(2)),
            {"attention.in_proj_weight": "free", "attention.in_proj_bias": "free",
             "attention.out_proj.weight": "free", "attention.out_proj.bias": "free",
             "head": "linear"}, n=4),
    Layered("raw", Raw, GAUSS, pairs(floats(4), floats(2)),
            dict.fromkeys(("matrix", "shift", "scale", "cube"), "free")),
    Layered("lora", LoRA, CAT, pairs(floats(4), ids(3)), linears("down", "up")),
    Layered("lora-raw", RawLoRA, BERN, pairs(floats(4), bits(3)), {"down": "free", "up": "free"}),
    Layered("parametrised", parametrised, CAT, pairs(floats(4), ids(2)),
            {"0.bias": "linear", "0.parametrizations.weight.original": "free", "2": "linear"}),
    Layered("prelu", lambda: nn.Sequential(nn.Linear(3, 4), nn.PReLU(4), nn.Linear(4, 2)), CAT,
            _TWO, {"0": "linear", "1.weight": "free", "2": "linear"}),
    Layered("bilinear", Bilinear, GAUSS,
            lambda g, n: (floats(3)(g, n), floats(2)(g, n), floats(2)(g, n)),
            {"layer.weight": "free", "layer.bias": "free"}),
    Layered("decoder-tied", lambda: Decoder("tied"), LM, text(5, 4, "right"),
            {"words": "tied", "places": "embedding", **_BLOCK}, n=4),
    Layered("decoder-left", lambda: Decoder("llama"), LM, text(5, 4, "left"),
            {**_WORDS, **_BLOCK, "head": "linear"}, n=4),
    Layered("decoder-transposed", lambda: Decoder("hf"), LM, text(5, 4, "right"),
            {**_WORDS, **_BLOCK, "head": "linear"}, n=4),
]  # fmt: skip
LAYERED_BY_NAME = {case.name: case for case in LAYERED}
