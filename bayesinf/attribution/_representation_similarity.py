r"""Similarity of what a network makes of two inputs."""

from __future__ import annotations

import torch
import xarray as xr

from bayesinf._scores import make_scores
from bayesinf._task import Task
from bayesinf.attribution._features import features
from bayesinf.attribution._needs import LINEAR_LAYER
from bayesinf.attribution._registry import register
from bayesinf.curvature._accounting import Costs

__all__ = ["representation_similarity"]


@register("similarity", "cosine of hidden states", needs=(LINEAR_LAYER,))
def representation_similarity(
    task: Task, *, module: str | None = None, batch_size: int = 256
) -> xr.Dataset:
    r"""Negative cosines of hidden states, ``−⟨h_q, h_t⟩ / (‖h_q‖ ‖h_t‖)``.

    A sequence's hidden states ``(T, M)`` are averaged over the tokens that it attends to; those of
    other inputs are taken as one vector.

    Parameters
    ----------
    task
        Network and examples.
    module
        Name of the module whose output is compared, as in ``model.named_modules()``. Default: what
        the last linear layer reads, the last hidden states.
    batch_size
        Examples at a time.

    Returns
    -------
    xr.Dataset
        ``influence(query, train)``, negative = similar; attributes ``estimand = "similarity"`` and
        ``module``. An example whose hidden states are all 0 has cosine 0 with everything.

    Raises
    ------
    ValueError
        If there is no such module, it does not run, or it does not return one row per example.
    """
    costs = Costs()
    with costs.stage("scores"):
        query, train, name = features(task, module, batch_size, costs)
        unit = [h / torch.where((norm := h.norm(dim=1, keepdim=True)) > 0, norm, 1.0)
                for h in (query, train)]  # fmt: skip
        values = -(unit[0] @ unit[1].T).cpu().numpy()
    return make_scores(
        values,
        query=task.query.ids,
        train=task.train.ids,
        method="representation_similarity",
        estimand="similarity",
        attrs={
            "checkpoint": task.fingerprint()["checkpoint"],
            "n": task.n,
            "module": name,
            **costs.attrs(),
        },
    )
