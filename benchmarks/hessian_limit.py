"""Low-temperature limit of the BIF: ``python -m benchmarks.hessian_limit``.

A 64-12-10 tanh network on digits is trained to a stationary point of ``L + (wd/2)‖w‖²`` in float64
and sampled at low temperature with ``γ = nβ·(λ − wd)``. There the BIF estimates the classical
influence with the **Hessian** and damping ``λ``; the table gives the slope of the BIF on that dense
influence, and on the one with the Gauss–Newton matrix at the same damping.

The step is ``ε = 4·bias/a_max`` with ``a_max = nβ·(h_max + λ)``: discretisation makes the variance
of the stiffest direction too large by about ``bias``, and less in all others. All chains start at
points of their own, and standard errors are taken over chains, so that they hold however slowly a
chain mixes. The exit status is 1 when ``|slope − 1| + 2·(standard error)`` exceeds 0.05.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from dataclasses import dataclass, replace

import numpy as np
import torch
import xarray as xr
from torch import nn

from bayesinf import (
    SGLD,
    Categorical,
    LocalPosterior,
    Task,
    TraceStore,
    bif,
    gauss_newton,
    hessian,
    sample,
)
from benchmarks._table import format_table, verdict
from benchmarks.tasks import get_task

__all__ = ["Agreement", "compare_slopes", "main", "stationary_network"]

BAR = 0.05
_HEADER = ("curvature", "slope", "standard error", "correlation", "bar", "")


@dataclass(frozen=True)
class Agreement:
    """How sampled and exact influence agree.

    Attributes
    ----------
    slope
        Of the regression of the sampled on the exact influence, through the origin.
    error
        Its standard error.
    correlation
        Pearson correlation over all pairs.
    """

    slope: float
    error: float
    correlation: float

    @property
    def holds(self) -> bool:
        """Whether the slope is within the bar of 1, two standard errors included."""
        return abs(self.slope - 1) + 2 * self.error <= BAR


def stationary_network(
    train: tuple[torch.Tensor, torch.Tensor], weight_decay: float, seed: int = 0
) -> nn.Module:
    """Train a 64-12-10 tanh network in float64 until the objective's gradient vanishes.

    Parameters
    ----------
    train
        Inputs and labels.
    weight_decay
        Of the objective, in units of the mean loss.
    seed
        Of the initial weights.

    Returns
    -------
    nn.Module
        The trained network.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(64, 12), nn.Tanh(), nn.Linear(12, 10)).double()
    x, y = train[0].double(), train[1]
    weights = list(net.parameters())
    optimizer = torch.optim.LBFGS(
        weights, max_iter=5000, max_eval=10_000, history_size=50, tolerance_grad=1e-9,
        tolerance_change=1e-14, line_search_fn="strong_wolfe",
    )  # fmt: skip

    def objective() -> torch.Tensor:
        optimizer.zero_grad()
        decay = sum(w.square().sum() for w in weights)
        value = nn.functional.cross_entropy(net(x), y) + 0.5 * weight_decay * decay
        value.backward()
        return value

    optimizer.step(objective)
    return net


def objective_gradient(posterior: LocalPosterior) -> float:
    """Norm of the gradient of ``L + (wd/2)‖w‖²`` at the checkpoint."""
    plain = replace(posterior, potential="plain").bind()
    return float(plain.grad(plain.center[None]).norm()) / posterior.n_beta


def largest_curvature(task: Task, steps: int = 50) -> float:
    """Largest eigenvalue of the mean loss' Hessian at the checkpoint, by power iteration."""
    bare = LocalPosterior(task, n_beta=1.0, gamma=0.0, potential="plain").bind(vectorize=False)
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(bare.center.shape, generator=generator, dtype=task.dtype)
    size = v.norm()
    for _ in range(steps):
        v = bare.hvp(bare.center[None], (v / v.norm())[None])[0]
        size = v.norm()
    return float(size)


def compare_slopes(traces: TraceStore, sampled: xr.Dataset, exact: xr.Dataset) -> Agreement:
    """Regress sampled on exact influence; the standard error is taken over chains.

    Parameters
    ----------
    traces
        The draws that ``sampled`` was made from.
    sampled, exact
        Scores of the same examples.

    Returns
    -------
    Agreement
        Slope, its standard error and the correlation.
    """
    x, y = exact["influence"].values, sampled["influence"].values
    slope = float((x * y).sum() / (x * x).sum())
    config = traces.config
    scale = -config["posterior"]["n_beta"] / config["task"]["n"]
    losses = traces.values("train").values.astype(np.float64)
    queries = traces.values("query").values.astype(np.float64)
    losses -= losses.mean((0, 1))
    queries -= queries.mean((0, 1))
    single = [  # slope from each chain: <Cov_c, x> / <x, x>, without forming Cov_c
        scale * float(((q @ x) * t).sum()) / len(t) / float((x * x).sum())
        for q, t in zip(queries, losses, strict=True)
    ]
    error = float(np.std(single, ddof=1) / len(single) ** 0.5)
    return Agreement(slope, error, float(np.corrcoef(x.ravel(), y.ravel())[0, 1]))


def _row(name: str, a: Agreement) -> tuple[str, ...]:
    judged = name == "Hessian"
    bar = f"|slope − 1| + 2 s.e. ≤ {BAR}" if judged else "none, for contrast"
    figures = (f"{a.slope:.4f}", f"{a.error:.4f}", f"{a.correlation:.4f}")
    return (name, *figures, bar, verdict(a.holds if judged else None))


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.hessian_limit", description=__doc__)
    add = parser.add_argument
    add("--train", type=int, default=200, help="training examples (default: %(default)s)")
    add("--query", type=int, default=50, help="query examples (default: %(default)s)")
    add("--damping", type=float, default=0.05, help="λ (default: %(default)s)")
    add("--weight-decay", type=float, default=1e-3, help="of the objective (default: %(default)s)")
    add("--n-beta", type=float, default=1e7, help="inverse temperature (default: %(default)s)")
    add("--bias", type=float, default=0.01, help="εa/4 of the stiffest direction")
    add("--chains", type=int, default=64, help="default: %(default)s")
    add("--draws", type=int, default=600, help="per chain (default: %(default)s)")
    add("--thin", type=int, default=40, help="steps per draw (default: %(default)s)")
    add("--warmup", type=int, default=8000, help="steps (default: %(default)s)")
    add("--seed", type=int, default=0)
    add("--threads", type=int, default=1, help="default: %(default)s")
    args = parser.parse_args(argv)
    if not args.damping > args.weight_decay:
        parser.error("--damping is γ/nβ + weight decay, so it must exceed --weight-decay")
    torch.set_num_threads(args.threads)

    (x, y), (query_x, query_y) = get_task("digits-mlp").data()
    train, query = (
        (x[: args.train], y[: args.train]),
        (query_x[: args.query], query_y[: args.query]),
    )
    net = stationary_network(train, args.weight_decay)
    task = Task(net.float(), Categorical(), train=train, query=query)
    posterior = LocalPosterior(
        task,
        n_beta=args.n_beta,
        gamma=args.n_beta * (args.damping - args.weight_decay),
        weight_decay=args.weight_decay,
    )
    exact = {"Hessian": hessian(task, damping=posterior.damping)}
    exact["Gauss–Newton"] = gauss_newton(task, damping=posterior.damping)
    stiffest = args.n_beta * (largest_curvature(task) + posterior.damping)
    began = time.perf_counter()
    traces = sample(
        posterior, SGLD(step_size=4 * args.bias / stiffest), chains=args.chains, draws=args.draws,
        warmup=args.warmup, thin=args.thin, superchains=args.chains, seed=args.seed,
    )  # fmt: skip
    seconds = time.perf_counter() - began
    with warnings.catch_warnings():  # slow directions are what the jackknife is for
        warnings.simplefilter("ignore")
        sampled = bif(traces, center="grand")
    found = {name: compare_slopes(traces, sampled, scores) for name, scores in exact.items()}
    rest = objective_gradient(posterior)
    print(
        f"BIF against dense influence: {task.dimension} parameters, {task.n} train × {args.query} "
        f"query, n_beta {args.n_beta:g}, damping {posterior.damping:g}, λ_min(H) + λ "
        f"{exact['Hessian'].attrs['lambda_min']:.3g}, gradient of the objective {rest:.1e}, "
        f"{args.chains} chains × {args.draws} draws × {args.thin} steps, {seconds:.0f} s\n"
    )
    print(format_table(_HEADER, [_row(name, agreement) for name, agreement in found.items()]))
    return 0 if found["Hessian"].holds else 1


if __name__ == "__main__":
    sys.exit(main())
