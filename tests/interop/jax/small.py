"""A small network in JAX and in torch: the same weights, data and losses."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import torch

import bayesinf as bi
from tests.cases import BY_NAME

N_BETA, GAMMA, DECAY = 40.0, 20.0, 0.1


def torch_task() -> bi.Task:
    """A 4-6-3 tanh network without biases on 12 examples and 5 queries, float64."""
    return BY_NAME["mlp-no-bias"].task()


def params(dtype: str = "float32") -> dict:
    """The torch network's own weights, laid end to end in the same order."""
    names = {"0.weight": "first", "2.weight": "second"}
    return {names[k]: v.detach().numpy().astype(dtype) for k, v in torch_task().params.items()}


def data(split: str) -> tuple[np.ndarray, np.ndarray]:
    x, y = torch_task().examples(split).batch()
    return x.numpy(), y.numpy()


def logits(p, x):
    return jnp.tanh(x @ p["first"].T) @ p["second"].T


def loss(p, batch):
    x, y = batch
    scores = jax.nn.log_softmax(logits(p, x))
    return -jnp.take_along_axis(scores, y[:, None], axis=1)[:, 0]


def margin(p, batch):
    """The likelihood's own: the log odds of the right class."""
    x, y = batch
    scores = logits(p, x)
    own = jax.nn.one_hot(y, 3, dtype=bool)
    return jnp.where(own, scores, 0).sum(1) - jax.nn.logsumexp(jnp.where(own, -jnp.inf, scores), 1)


def posterior(potential: str = "tilted", **changes: float) -> bi.LocalPosterior:
    given = {"n_beta": N_BETA, "gamma": GAMMA, "weight_decay": DECAY, **changes}
    return bi.LocalPosterior(torch_task(), potential=potential, **given)  # type: ignore[arg-type]


OPTIONS = {
    "n_beta": N_BETA, "gamma": GAMMA, "weight_decay": DECAY, "draws": 20, "warmup": 10,
    "thin": 2, "progress": False, "max_excess": 10.0,
}  # fmt: skip

KERNELS = {
    "SGLD": bi.SGLD(0.01),
    "RMSpropSGLD": bi.RMSpropSGLD(0.004, alpha=0.9),
    "Underdamped": bi.Underdamped(0.02, 3.0),
    "SGHMC": bi.SGHMC(0.01, 3.0, 0.1),
    "SGNHT": bi.SGNHT(0.01, 3.0),
    "MALA": bi.MALA(0.02),
}


def tensor(array: jax.Array) -> torch.Tensor:
    return torch.from_numpy(np.array(array))
