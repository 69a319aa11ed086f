"""Scores from an array, or from a ``.npy`` file of one."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from torch import Tensor

from bayesinf.scores._convention import Convention, Ids, convert
from bayesinf.scores._self_sign import Sign

__all__ = ["from_array", "read_npy"]


def from_array(
    matrix: np.ndarray | Tensor | Sequence[Any],
    *,
    query: Ids,
    train: Ids,
    sign: Sign,
    factor: float | None = None,
    dims: tuple[str, str] = ("query", "train"),
    self_influence: np.ndarray | Tensor | None = None,
    measurement: str = "loss",
    method: str = "scores",
    attrs: dict[str, Any] | None = None,
) -> xr.Dataset:
    r"""Label scores of any origin, in the sign and unit of this library's own.

    .. math:: \mathrm{influence}[q, t] = \pm\,\mathrm{factor} \cdot \mathrm{matrix}[q, t]

    with ``−`` where a positive score means that up-weighting the example lowers φ (for a loss:
    helpful). What was mapped stands in ``attrs``: ``source_sign``, ``source_orientation``, and
    ``factor`` with its sign.

    Parameters
    ----------
    matrix
        ``(query, train)``, or as ``dims`` says; or ``(train,)``, each training example with itself.
    query, train
        Ids, integers or strings; None for positions. ``query=None`` for ``(train,)``.
    sign
        What a positive score means. ``"helpful"``, ``"harmful"``: for the query, where φ is
        ``"loss"`` or ``"margin"``. ``"lowers"``, ``"raises"``: what up-weighting the example does
        to φ, whatever φ is.
    factor
        Makes the scores values of ``|d E[φ]/d b|``, such as ``1 / n`` for
        ``∇φᵀ (C + λI)⁻¹ ∇ℓ`` with the curvature ``C`` of the mean loss. None: they only rank, and
        the estimand is ``"similarity"``.
    dims
        What rows and columns are: ``("train", "query")`` for the transpose.
    self_influence
        ``(train,)``, in the same convention as ``matrix``: its sign is checked. Where it is not
        given, the scores of examples that are queries, too, are: shared names, or sets of numbers
        that are the same.
    measurement
        φ, as judges are asked for it.
    method
        Name of the method.
    attrs
        Further attributes, such as ``seconds`` or ``n``.

    Returns
    -------
    xr.Dataset
        ``influence (query, train)`` or ``influence (train)``, float64.

    Raises
    ------
    ValueError
        For a matrix that is transposed or of another shape than its ids, scores that are not
        finite, ids that repeat, a sign or factor that says nothing.

    Warns
    -----
    SignWarning
        If most self-influences say that up-weighting an example harms itself.

    Examples
    --------
    >>> scores = from_array([[3.0, -1.0]], query=["q"], train=["a", "b"], sign="helpful")
    >>> scores["influence"].values
    array([[-3.,  1.]])
    """
    convention = Convention("array", sign, dims, factor, attrs or {})
    return convert(
        matrix,
        query,
        train,
        convention,
        measurement=measurement,
        method=method,
        self_influence=self_influence,
    )


def read_npy(
    path: str | os.PathLike[str],
    *,
    sign: Sign,
    query: Ids = None,
    train: Ids = None,
    n: int | None = None,
    dims: tuple[str, str] = ("query", "train"),
    measurement: str = "loss",
    method: str | None = None,
) -> xr.Dataset:
    """Read scores from a ``.npy`` file.

    TRAK's ``scores/NAME.mmap`` is such a file too, with ``dims=("train", "query")`` and
    ``sign="helpful"``.

    Parameters
    ----------
    path
        The file.
    sign, query, train, dims, measurement
        As of :func:`from_array`; ids are positions by default.
    n
        Examples of the training set, for scores ``∇φᵀ (C + λI)⁻¹ ∇ℓ`` without the ``1/n``: they
        become influences. None: they only rank.
    method
        Name of the method; that of the file by default.

    Returns
    -------
    xr.Dataset
        As of :func:`from_array`.

    Raises
    ------
    ValueError
        As in :func:`from_array`, and if the file is no array, or holds objects.

    Warns
    -----
    SignWarning
        As in :func:`from_array`.
    """
    path = Path(path)
    try:
        matrix = np.load(path, mmap_mode="r", allow_pickle=False)
    except ValueError as reason:
        raise ValueError(
            f"{path.name} holds no array of numbers ({reason}). Objects are never unpickled; save "
            f"numbers alone: np.save(path, np.asarray(scores, dtype=float))."
        ) from reason
    if not isinstance(matrix, np.ndarray):
        raise ValueError(
            f"{path.name} is an archive of arrays. Read one of them: "
            f"from_array(np.load(path)['name'], ...)."
        )
    return convert(
        matrix,
        query,
        train,
        Convention("npy", sign, dims, notes={"source_file": path.name}),
        measurement=measurement,
        method=path.stem if method is None else method,
        n=n,
    )
