"""Small problems with the structures that layer-wise gradients must get right."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import bayesinf as bi
from tests.cases import CASES, Case


class Sequence(nn.Module):
    """Linear layers on ``(B, T, M)`` with a mean over positions."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 4, bias=bias), nn.Linear(4, 3, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x))).mean(1)


class FoldedSequence(Sequence):
    """The same with positions folded into the batch, ``(B·T, M)``."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(0, 1).unsqueeze(1)).view(len(x), -1, 3).mean(1)


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


def conv(**options: object) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 3, **options), nn.Tanh(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        nn.Linear(12, 2),
    )  # fmt: skip


CAT = bi.Categorical()
LAYERED = [
    *CASES,
    Case("sequence", Sequence, CAT, (4, 3), 3),
    Case("sequence-no-bias", lambda: Sequence(False), CAT, (4, 3), 3),
    Case("sequence-folded", FoldedSequence, CAT, (4, 3), 3),
    Case("called-twice", Twice, CAT, (4,), 3),
    Case("tied", Tied, CAT, (4,), 3),
    Case("tied-with-bias", lambda: Tied(True), CAT, (4,), 3),
    Case("in-place", InPlace, CAT, (4,), 3),
    Case("conv-valid", lambda: conv(kernel_size=(3, 2)), CAT, (2, 5, 6), 2),
    Case("conv-string", lambda: conv(kernel_size=2, padding="valid"), CAT, (2, 5, 6), 2),
    Case("conv-stride", lambda: conv(kernel_size=3, stride=(2, 1), padding=1), CAT, (2, 6, 5), 2),
    Case("conv-dilated", lambda: conv(kernel_size=2, dilation=(2, 1)), CAT, (2, 6, 5), 2),
    Case(
        "conv-same",
        lambda: conv(kernel_size=(3, 2), padding="same", dilation=(1, 2)),
        bi.Gaussian(),
        (2, 5, 4),
        2,
    ),
    Case(
        "conv-reflect",
        lambda: conv(kernel_size=(3, 5), padding=(1, 2), padding_mode="reflect"),
        CAT,
        (2, 5, 4),
        2,
    ),
    Case(
        "conv-circular",
        lambda: conv(kernel_size=(2, 3), padding="same", padding_mode="circular"),
        CAT,
        (2, 5, 4),
        2,
    ),
]
LAYERED_BY_NAME = {case.name: case for case in LAYERED}
