"""Options that all classical methods share: what is paired with what, at which precision, where to.

Every classical method takes them as keywords::

    bi.ekfac(task, fisher="sampled", damping=0.01, train_tokens="position", top_k=20)
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, Literal, TypedDict

import torch

from bayesinf._task import Measurement, measurement_name
from bayesinf.curvature._sources import Tokens

__all__ = ["Options", "Scoring", "resolve"]


class Scoring(TypedDict, total=False):
    """Keywords that every classical method takes.

    Attributes
    ----------
    measurement
        φ of the queries: ``"loss"`` (default), ``"margin"``, or ``f(task, params, batch) -> (B,)``.
    batch_size
        Train examples at a time, 256 by default; query examples as many as fit into about 0.5 GiB
        of gradients. Scores do not depend on either beyond rounding.
    query_batch_size
        Most query examples at a time.
    pairs
        ``"all"`` (default): every query with every training example. ``"self"``: every training
        example with itself (its self-influence), dims ``train``.
    modules
        Also ``influence_by_module(module, query, train)``, which sums to ``influence``.
    train_tokens, query_tokens
        ``"position"``: the part of an example's gradient that layers form at each position (a
        token acts through its later positions too, by attention). ``"loss"``: the gradient of the
        loss of each predicted token. Both sum to the example's. Tokens are flat, dims
        ``train_token`` and ``query_token``, with coordinates ``train``, ``train_position`` and,
        where inputs are ids, ``train_token_id`` (or ``query``, …); padded and masked tokens are
        absent.
    relative
        Divide scores by the size of what the training example does to the network (RelatIF,
        Barshan et al. 2020), so that examples with large gradients do not lead for every query; a
        similarity. ``"loss"``: by the root of ``∇ℓ_tᵀ M ∇ℓ_t``, the change of the losses;
        ``"parameters"``: by ``‖M ∇ℓ_t‖``, that of the weights. ``M`` is the method's inverse
        curvature, which is applied to every training example.
    query_rank
        Keep preconditioned query gradients as matrices of this rank, layer by layer (SVD; Grosse
        et al. 2023 §3.2.2 use 32); the relative error is in ``attrs["query_rank_error"]``.
    gradient_dtype
        Keep preconditioned query gradients in this precision (``torch.bfloat16``); products are
        still in the model's. The relative error is in ``attrs["gradient_dtype_error"]``.
    top_k
        Keep only the ``k`` most helpful and the ``k`` most harmful for each query, dims
        ``(query, side, rank)``; the whole matrix never exists.
    store
        Path of a Zarr store that scores stream to, block by block. A run that was killed resumes
        there; the result is read from it lazily.
    """

    measurement: Measurement
    batch_size: int
    query_batch_size: int | None
    pairs: Literal["all", "self"]
    modules: bool
    train_tokens: Tokens | None
    query_tokens: Tokens | None
    relative: Literal["loss", "parameters"] | None
    query_rank: int | None
    gradient_dtype: torch.dtype | None
    top_k: int | None
    store: str | os.PathLike[str] | None


@dataclass(frozen=True)
class Options:
    """The same, complete and checked."""

    measurement: Measurement = "loss"
    batch_size: int = 256
    query_batch_size: int | None = None
    pairs: str = "all"
    modules: bool = False
    train_tokens: Tokens | None = None
    query_tokens: Tokens | None = None
    relative: str | None = None
    query_rank: int | None = None
    gradient_dtype: torch.dtype | None = None
    top_k: int | None = None
    store: str | os.PathLike[str] | None = None

    def attrs(self) -> dict[str, Any]:
        """What is worth recording with the scores."""
        dtype = self.gradient_dtype
        return {
            "measurement": measurement_name(self.measurement),
            "batch_size": self.batch_size,
            "train_tokens": self.train_tokens,
            "query_tokens": self.query_tokens,
            "relative": self.relative,
            "query_rank": self.query_rank,
            "gradient_dtype": None if dtype is None else str(dtype),
        }


def resolve(scoring: Scoring) -> Options:
    """Check the options and fill in the defaults.

    Raises
    ------
    ValueError
        If one is out of range, or two exclude each other.
    TypeError
        If one is unknown.
    """
    unknown = sorted(set(scoring) - set(Options.__dataclass_fields__))
    if unknown:
        raise TypeError(
            f"unknown option {unknown}; options of every method are "
            f"{sorted(Options.__dataclass_fields__)}."
        )
    options = Options(**scoring)
    for name in ("batch_size", "query_batch_size", "query_rank", "top_k"):
        value = getattr(options, name)
        if value is None and name != "batch_size":
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} must be a positive integer; got {value!r}.")
    if options.pairs not in ("all", "self"):
        raise ValueError(f"pairs must be 'all' or 'self'; got {options.pairs!r}.")
    for name in ("train_tokens", "query_tokens"):
        value = getattr(options, name)
        _require(
            value in (None, "position", "loss"),
            f"{name} must be None, 'position' or 'loss'; got {value!r}.",
        )
    _require(
        options.relative in (None, "loss", "parameters"),
        f"relative must be None, 'loss' or 'parameters'; got {options.relative!r}.",
    )
    _require(
        options.relative is None or options.train_tokens is None,
        f"relative= is of whole training examples; drop train_tokens={options.train_tokens!r}.",
    )
    dtype = options.gradient_dtype
    _require(
        dtype is None or (isinstance(dtype, torch.dtype) and dtype.is_floating_point),
        f"gradient_dtype must be a floating dtype such as torch.bfloat16; got {dtype!r}.",
    )
    if options.query_tokens is not None:
        _require(
            options.measurement == "loss",
            f"query_tokens= split the loss; got measurement={options.measurement!r}.",
        )
    if options.pairs == "self":
        clash = [
            name
            for name in (
                "modules",
                "train_tokens",
                "query_tokens",
                "relative",
                "query_rank",
                "gradient_dtype",
                "top_k",
                "store",
            )
            if getattr(options, name)
        ]
        _require(not clash, f"pairs='self' gives one number an example; drop {clash}.")
    if options.top_k is not None:
        clash = [name for name in ("modules", "store") if getattr(options, name)]
        _require(not clash, f"top_k= keeps no whole matrix; drop {clash}.")
    return options


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ValueError(message)
