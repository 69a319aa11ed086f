r"""The engine of the classical methods: products of preconditioned query and train gradients.

``influence[q, t] = scale · ⟨M ∇φ_q, ∇ℓ_t⟩``. A method is its preconditioner ``M``, a function from
rows of query gradients to rows; rows are as in :mod:`bayesinf.curvature._rows`, one entry a layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from bayesinf._data import Batch
from bayesinf._scores import label_scores
from bayesinf._task import Task
from bayesinf.attribution._labels import Labels, make_labels
from bayesinf.attribution._scoring import Options
from bayesinf.attribution._sinks import Leading, MatrixSink, Sink, StoreSink, TopSink
from bayesinf.curvature._accounting import Costs
from bayesinf.curvature._inner import gram, inner, squared_norms
from bayesinf.curvature._rows import Explicit, Factored, Rows, unstack
from bayesinf.curvature._sources import Gradients, Tokens, token_grid

__all__ = ["Attribution", "require_damping", "score"]

_QUERY_ELEMENTS, _TRAIN_ELEMENTS = 2**27, 2**25
"""Most elements of explicit gradients of a block of queries, of train examples."""


@dataclass(frozen=True)
class Attribution:
    """What a method tells the engine.

    Attributes
    ----------
    name, estimand
        As in the registry.
    precondition
        ``M``; may overwrite the list that it is given, which frees memory early.
    scale
        ``−1/n`` for influences, ``−1`` for similarities.
    cosine
        Divide by the norms of both gradients; ``"layer"``: layer by layer.
    attrs
        The method's settings; they identify a store.
    report
        What the method learns as it works, to be recorded with the scores.
    """

    name: str
    estimand: str
    precondition: Callable[[list[Rows]], list[Rows]]
    scale: float
    cosine: bool | Literal["layer"] = False
    attrs: dict[str, Any] = field(default_factory=dict)
    report: dict[str, Any] = field(default_factory=dict)


def score(
    task: Task, source: Gradients, method: Attribution, options: Options, costs: Costs
) -> xr.Dataset:
    """Score pairs by a method, in blocks of bounded memory.

    Parameters
    ----------
    task
        Whose ids and checkpoint the scores bear.
    source
        Open source of gradients (of the same task, perhaps in another precision).
    method
        The method.
    options
        What to pair, and where scores go.
    costs
        Account to which seconds and passes are added.

    Returns
    -------
    xr.Dataset
        In the one format of scores.

    Raises
    ------
    ValueError
        If a gradient or a score is not finite, or tokens do not exist.
    """
    if options.pairs == "self":
        with costs.stage("scores"):
            return _self_scores(task, source, method, options, costs)
    query = make_labels(source.task, "query", options.query_tokens, options.batch_size)
    train = make_labels(source.task, "train", options.train_tokens, options.batch_size)
    sink = _sink(task, source, method, options, query, train)
    with costs.stage("scores"):
        for q, queries in _blocks(source.task, "query", options):
            rows = query.entries(q)
            columns = [train.entries(t) for t in _slices(source.task, "train", options)]
            if all(sink.done(rows, c) for c in columns):
                continue
            left = _gradients(source, "query", q, queries, options, query)
            norms = _norms(left, method) if method.cosine else None
            left = _stored(method.precondition(left), options, sink.errors)
            kept = _late_mask(query, q, options.query_tokens, source.task.device)
            for t, batch in _blocks(source.task, "train", options):
                if sink.done(rows, train.entries(t)):
                    continue
                right = _gradients(source, "train", t, batch, options, train)
                apart = options.modules or method.cosine == "layer"
                block = _products(left, right, apart, source.task.dtype)
                if norms is not None:
                    block = _cosines(block, norms, _norms(right, method))
                if options.relative is not None:
                    block = block * _per_size(method, right, options, train, t)
                late = _late_mask(train, t, options.train_tokens, source.task.device)
                block = block if kept is None else block[:, kept]
                block = block if late is None else block[:, :, late]
                values = (block * method.scale).detach().cpu().numpy()
                found = {"influence": values.sum(0)}
                if options.modules:
                    found["influence_by_module"] = values
                sink.write(rows, train.entries(t), found)
    more = dict(sink.errors)
    estimand = "similarity" if options.relative else method.estimand
    return sink.finish(method.name, estimand, _attrs(task, method, options, costs, more))


def require_damping(damping: Any, *, positive: bool = True) -> float:
    """Return the damping as a float, or say what it should be.

    Parameters
    ----------
    damping
        λ of the estimand.
    positive
        Whether 0 is refused.

    Raises
    ------
    ValueError
        If it is not a finite number, or negative, or 0 where that is refused.
    """
    number = isinstance(damping, (int, float)) and not isinstance(damping, bool)
    if not number or not math.isfinite(damping) or damping < 0 or (positive and damping == 0):
        wanted = "a positive number" if positive else "a number ≥ 0"
        raise ValueError(
            f"damping must be {wanted}; got {damping!r}. It is λ = γ/(nβ) + weight decay in units "
            f"of the mean loss (1e-3 … 1e-1 is usual for small networks); there is no default, "
            f"since it sets the answer."
        )
    return float(damping)


def _self_scores(
    task: Task, source: Gradients, method: Attribution, options: Options, costs: Costs
) -> xr.Dataset:
    values = []
    for t, batch in _blocks(source.task, "train", options):
        rows = source.gradients("train", t, batch)
        if method.cosine:
            found = (_norms(rows, method) > 0).to(source.task.dtype).sum(0) * method.scale
        else:
            found = inner(method.precondition(list(rows)), rows) * method.scale
        values.append(found.detach().cpu().numpy())
    labels = make_labels(task, "train", None, options.batch_size)
    return label_scores(
        {"influence": (("train",), np.concatenate(values))},
        labels.axis.coords(),
        method.name,
        method.estimand,
        _attrs(task, method, options, costs, {"pairs": "self"}),
    )


def _attrs(
    task: Task, method: Attribution, options: Options, costs: Costs, more: dict[str, Any]
) -> dict[str, Any]:
    return {
        "checkpoint": task.fingerprint()["checkpoint"],
        "n": task.n,
        "parameters": task.dimension,
        **options.attrs(),
        **costs.attrs(),
        **method.attrs,
        **method.report,
        **more,
    }


def _sink(
    task: Task,
    source: Gradients,
    method: Attribution,
    options: Options,
    query: Labels,
    train: Labels,
) -> Sink:
    leading: dict[str, Leading] = {}
    if options.modules:
        names = np.array([layer.name for layer in source.layers])
        leading["influence_by_module"] = ("module", names)
    if options.top_k is not None:
        return TopSink(query.axis, train.axis, options.top_k)
    if options.store is None:
        return MatrixSink(query.axis, train.axis, leading)
    config = {
        "method": method.name,
        "task": task.fingerprint(),
        "options": {**options.attrs(), "query_batch_size": options.query_batch_size},
        "settings": method.attrs,
    }
    dtype = str(source.task.dtype).removeprefix("torch.")
    variables = {"influence": None, **leading}
    return StoreSink(options.store, query.axis, train.axis, variables, config, dtype)


def _gradients(
    source: Gradients, split: str, where: slice, batch: Batch, options: Options, labels: Labels
) -> list[Rows]:
    query = split == "query"
    tokens = options.query_tokens if query else options.train_tokens
    measurement = options.measurement if query else "loss"
    rows = source.gradients(split, where, batch, measurement, tokens)
    if tokens == "position":
        keep = labels.keep(where, source.task.device)
        assert keep is not None
        if not bool(keep.all()):
            rows = [layer.part(keep) for layer in rows]
    return rows


def _late_mask(
    labels: Labels, where: slice, tokens: Tokens | None, device: torch.device
) -> Tensor | None:
    """Which entries of a block count, where rows could not be chosen before."""
    return labels.keep(where, device) if tokens == "loss" else None


def _products(left: list[Rows], right: list[Rows], modules: bool, dtype: torch.dtype) -> Tensor:
    """Inner products ``(1 or modules, rows, columns)``."""
    if not modules:
        return gram(left, right, dtype).unsqueeze(0)
    return torch.stack([gram([x], [y], dtype) for x, y in zip(left, right, strict=True)])


def _norms(rows: list[Rows], method: Attribution) -> Tensor:
    """Norms ``(1 or layers, rows)``."""
    parts = [[layer] for layer in rows] if method.cosine == "layer" else [rows]
    return torch.stack([squared_norms(part) for part in parts]).sqrt()


def _cosines(block: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Divide by norms; a gradient that is zero has cosine 0 with everything."""
    return block * _inverse(left)[:, :, None] * _inverse(right)[:, None]


def _per_size(
    method: Attribution, rows: list[Rows], options: Options, train: Labels, where: slice
) -> Tensor:
    """One over the size of what each training example does; 0 for one that does nothing."""
    moved = method.precondition(list(rows))
    if options.relative == "parameters":
        return _inverse(squared_norms(moved).sqrt())
    own = inner(moved, rows)
    if bool((own < 0).any()):
        bad = train.axis.examples[where].tolist()[int((own < 0).nonzero()[0])]
        raise ValueError(
            f"relative='loss' divides by the root of the self-influence, and that of train example "
            f"{bad!r} has the wrong sign. Usual cause: a curvature that is not positive definite, "
            f"or a damping too small for precision; relative='parameters' has no such root."
        )
    return _inverse(own.sqrt())


def _inverse(size: Tensor) -> Tensor:
    return torch.where(size > 0, 1 / size, torch.zeros_like(size))


def _stored(rows: list[Rows], options: Options, errors: dict[str, float]) -> list[Rows]:
    """Query gradients as they are kept, with the relative error of that."""
    if options.query_rank is not None:
        rank = options.query_rank
        rows = [unstack(layer) for layer in rows]
        rows = _approximated(rows, lambda x: _low_rank(x, rank), "query_rank_error", errors)
    dtype = options.gradient_dtype
    if dtype is not None:
        rows = _approximated(rows, lambda x: x.to(dtype), "gradient_dtype_error", errors)
    return rows


def _approximated(
    rows: list[Rows],
    approximate: Callable[[Rows], Rows],
    name: str,
    errors: dict[str, float],
) -> list[Rows]:
    kept = [approximate(layer) for layer in rows]
    lost = total = 0.0
    for exact, approximation in zip(rows, kept, strict=True):
        for where, part in exact.chunks():
            full = part.matrices().double()
            lost += float((full - approximation.part(where).matrices().double()).square().sum())
            total += float(full.square().sum())
    error = math.sqrt(lost / total) if total else 0.0
    errors[name] = max(error, errors.get(name, 0.0))
    return kept


def _low_rank(rows: Rows, rank: int) -> Rows:
    """The best approximation of every matrix by one of lower rank."""
    if not isinstance(rows, Explicit) or min(rows.matrix_shape) <= rank:
        return rows
    matrices = rows.matrices().flatten(0, 1)
    u, s, v = torch.linalg.svd(matrices, full_matrices=False)
    values = (u[:, :, :rank] * s[:, None, :rank]).mT.unsqueeze(1)  # (Q, 1, r, P)
    return Factored(values, v[:, :rank])


def _blocks(task: Task, split: str, options: Options) -> Iterator[tuple[slice, Batch]]:
    for where in _slices(task, split, options):
        yield where, task.examples(split).batch(where)


def _slices(task: Task, split: str, options: Options) -> Iterator[slice]:
    """Blocks of examples."""
    query = split == "query"
    tokens = options.query_tokens if query else options.train_tokens
    elements = _QUERY_ELEMENTS if query else _TRAIN_ELEMENTS
    rows = (
        1
        if tokens is None or (tokens == "position" and not query)
        else _length(task, split, tokens)
    )
    most = options.query_batch_size if query else options.batch_size
    size = max(1, elements // (task.dimension * rows))
    size = min(size, most or size)
    n = len(task.examples(split))
    for start in range(0, n, size):
        yield slice(start, min(start + size, n))


def _length(task: Task, split: str, tokens: Tokens) -> int:
    """Tokens of an example."""
    batch = task.examples(split).batch(slice(0, 1))
    return int(batch[1].numel() if tokens == "loss" else token_grid(batch)[0].numel())
