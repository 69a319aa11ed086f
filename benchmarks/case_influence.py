"""Which cases carry a conclusion, and what leaving them out does: ``python -m
benchmarks.case_influence``.

A Bayesian logistic regression on the breast-cancer data of scikit-learn (569 cases, the ten mean
features standardised, an intercept; every weight ~ N(0, 2.5²)), judged by refits. φ are the eleven
weights. Draws are those of Hamiltonian Monte Carlo whitened by Laplace's approximation, whose law
is exact; refits, of the posterior without the cases, by the same with many more chains.

The first table is of removals: *refit*, the change of the posterior means in posterior standard
deviations, root mean square over φ, whose error common random numbers make small; the *errors* of
first order, second order and PSIS, of the same form, relative to it; *k*, and which of them is
used; *signs*, the share of φ that it moves the right way, of those that move by more than 3 errors.
The second is of derivatives: coverage of 95 % intervals over runs against central differences of
the reference run weighted to b = 0.99 and 1.01; the share of right signs among intervals without 0
(a 95 % interval may miss on that side 2.5 times of 100); and of one run the correlation, for the
worst φ, of the sizes of effects with the shifts that ArviZ's leave-one-out expectations make, over
the cases that importance weights can leave out. The third table is of signs: every case is left out
by a refit, and of the effects (pairs of φ and case) that exceed so many Monte-Carlo errors those of
the wrong sign are counted, beside how many Student's t of these errors lets expect. The exit status
is 1 when a bar is missed.
"""  # noqa: D205

from __future__ import annotations

import argparse
import sys
import time
import warnings
from dataclasses import dataclass

import numpy as np
import xarray as xr
from scipy import stats

from bayesinf.bayesian import ParetoWarning, case_influence, case_removal
from benchmarks._table import format_table, verdict

__all__ = ["Logistic", "breast_cancer", "derivatives", "main", "removals", "signs"]

SCALE, LEAPFROG, STEP = 2.5, 6, 0.26


@dataclass(frozen=True)
class Logistic:
    """Logistic regression: ``x (n, d)``, ``y (n,)`` of ±1, weights ~ N(0, 2.5²)."""

    x: np.ndarray
    y: np.ndarray

    def log_p(self, w: np.ndarray) -> np.ndarray:
        """``(…, n)`` of weights ``(…, d)``."""
        result: np.ndarray = -np.logaddexp(0, -(w @ self.x.T) * self.y)
        return result

    def gradient(self, w: np.ndarray) -> np.ndarray:
        """Of the potential, ``(C, d)``."""
        margin = (w @ self.x.T) * self.y
        slope: np.ndarray = -(self.y / (1 + np.exp(margin))) @ self.x + w / SCALE**2
        return slope

    def potential(self, w: np.ndarray) -> np.ndarray:
        """``(C,)``."""
        value: np.ndarray = -self.log_p(w).sum(axis=-1) + (w**2).sum(axis=-1) / (2 * SCALE**2)
        return value

    def without(self, cases: list[int]) -> Logistic:
        """The same without some cases."""
        return Logistic(np.delete(self.x, cases, axis=0), np.delete(self.y, cases))

    def laplace(self) -> tuple[np.ndarray, np.ndarray]:
        """Mode and a square root of the inverse Hessian, by Newton's method."""
        w = np.zeros(self.x.shape[1])
        for _ in range(50):
            p = 1 / (1 + np.exp(-(self.x @ w)))
            hessian = (self.x.T * (p * (1 - p))) @ self.x + np.eye(len(w)) / SCALE**2
            w = w - np.linalg.solve(hessian, self.gradient(w[None])[0])
        return w, np.linalg.cholesky(np.linalg.inv(hessian))

    def draws(self, seed: int, chains: int, draws: int, warmup: int = 30) -> np.ndarray:
        """``(C, T, d)`` by Hamiltonian Monte Carlo in whitened coordinates."""
        rng = np.random.default_rng(seed)
        mode, root = self.laplace()
        z = rng.standard_normal((chains, len(mode)))
        kept = np.empty((chains, draws, len(mode)))
        energy = self.potential(mode + z @ root.T)
        for t in range(-warmup, draws):
            momentum = rng.standard_normal(z.shape)
            step = STEP * rng.uniform(0.8, 1.2)
            place, speed = z, momentum
            speed = speed - step / 2 * self.gradient(mode + place @ root.T) @ root
            for leap in range(LEAPFROG):
                place = place + step * speed
                factor = step if leap < LEAPFROG - 1 else step / 2
                speed = speed - factor * self.gradient(mode + place @ root.T) @ root
            proposed = self.potential(mode + place @ root.T)
            gain = energy - proposed + ((momentum**2).sum(1) - (speed**2).sum(1)) / 2
            taken = np.log(rng.random(chains)) < gain
            z, energy = np.where(taken[:, None], place, z), np.where(taken, proposed, energy)
            if t >= 0:
                kept[:, t] = mode + z @ root.T
        return kept

    def tree(self, w: np.ndarray) -> xr.DataTree:
        """Draws ``(C, T, d)`` as ArviZ has them."""
        dims = ("chain", "draw")
        groups = {
            "posterior": xr.Dataset({"w": ((*dims, "feature"), w)}),
            "log_likelihood": xr.Dataset({"y": ((*dims, "case"), self.log_p(w))}),
        }
        groups["log_likelihood"]["case"] = np.arange(len(self.y))
        groups["posterior"]["feature"] = np.arange(w.shape[2])
        return xr.DataTree.from_dict(groups)


def breast_cancer(features: int = 10) -> Logistic:
    """The data, standardised, with an intercept first."""
    from sklearn.datasets import load_breast_cancer

    x, y = load_breast_cancer(return_X_y=True)
    x = x[:, :features]
    x = (x - x.mean(axis=0)) / x.std(axis=0)
    return Logistic(np.column_stack([np.ones(len(x)), x]), 2.0 * y - 1)


def removals(
    model: Logistic, *, chains: int = 4, draws: int = 2000, refit_chains: int = 64,
    refit_draws: int = 500, top: int = 10,
) -> xr.Dataset:  # fmt: skip
    """The most influential case, each of the ``top`` and all of these together, against refits.

    Returns
    -------
    xr.Dataset
        Dim ``removed``: ``refit``, ``refit_mcse`` and the errors of ``first_order``,
        ``second_order``, ``psis`` and ``change``, all root mean squares over φ in posterior
        standard deviations; ``signs``, ``pareto_k``, ``uses``.
    """
    tree = model.tree(model.draws(0, chains, draws))
    scores = case_influence(tree)
    size = ((scores["influence"] / scores["posterior_sd"]) ** 2).mean("query") ** 0.5
    order = np.argsort(-size.values)[:top]
    sets = {f"case {i}": [int(i)] for i in order}
    sets[f"these {top // 2}"] = [int(i) for i in order[: top // 2]]
    sets[f"these {top}"] = [int(i) for i in order]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ParetoWarning)  # k is in the table
        found = case_removal(tree, sets)
    base = model.draws(1, refit_chains, refit_draws)
    sd, rows = base.std(axis=(0, 1)), list[dict[str, float]]()
    for column, members in enumerate(sets.values()):
        refit = model.without(members).draws(1, refit_chains, refit_draws)
        shifts = (refit - base).mean(axis=1) / sd  # the same random numbers: chains stay together
        shift, error = shifts.mean(axis=0), shifts.std(axis=0, ddof=1) / np.sqrt(refit_chains)
        row = {"refit": _rms(shift), "refit_mcse": _rms(error)}
        for name in ("first_order", "second_order", "psis", "change"):
            told = found[name].values[:, column] / sd
            row[name] = _rms(told - shift)
        clear = abs(shift) > 3 * np.hypot(error, found["change_mcse"].values[:, column] / sd)
        row["signs"] = float((told * shift > 0)[clear].mean())
        rows.append(row)
    table = {name: ("removed", np.array([row[name] for row in rows])) for name in rows[0]}
    return xr.Dataset(
        {**table, "pareto_k": found["pareto_k"], "uses": found["uses"]},
        attrs={"pareto_threshold": found.attrs["pareto_threshold"]},
    )


def derivatives(
    model: Logistic, *, runs: int = 50, draws: int = 500, reference_chains: int = 128
) -> dict[str, float]:
    """Coverage of intervals over runs of 4 chains, share of right signs, agreement with LOO.

    The truth is a central difference at b = 0.99 and 1.01, by weights ``p_i^{±0.01}`` (k near 0) on
    a long run; its own standard error widens the intervals.
    """
    long = model.draws(10_000, reference_chains, draws)
    truth, error = _central_differences(model, long)
    several = model.draws(20_000, 4 * runs, draws)
    covered, right, clear = [], 0, 0
    for run in range(runs):
        found = case_influence(model.tree(several[4 * run : 4 * run + 4]))
        value, mcse = found["influence"].values, found["mcse"].values
        t = stats.t.ppf(0.975, found.attrs["mcse_df"])
        covered.append(float((abs(value - truth) < t * np.hypot(mcse, error)).mean()))
        shown = abs(value) > t * mcse
        right, clear = right + int((value * truth > 0)[shown].sum()), clear + int(shown.sum())
    return {
        "coverage": float(np.mean(covered)),
        "coverage_error": float(np.std(covered) / np.sqrt(runs)),
        "signs": right / clear,
        "clear": clear / (truth.size * runs),
        "truth_error": _rms(error) / _rms(mcse),
        **_against_arviz(model, several[:4]),
    }


def signs(
    model: Logistic, *, draws: int = 2000, refit_chains: int = 16, refit_draws: int = 200,
    cases: int | None = None, beyond: tuple[float, ...] = (1, 2, 3),
) -> xr.Dataset:  # fmt: skip
    """Signs of one run's influences against refits without each case.

    A refit shares its random numbers with that of all cases, so that its error is small: pairs
    whose change is within three of these errors have no known sign and are left out.

    Parameters
    ----------
    model
        The model.
    draws
        Of each of the 4 chains that are judged.
    refit_chains, refit_draws
        Of each refit.
    cases
        How many are left out, one by one, spread over the data; all by default.
    beyond
        Effects count that exceed so many of their Monte-Carlo errors.

    Returns
    -------
    xr.Dataset
        By ``beyond``: ``pairs``, the ``wrong`` of them and how many are ``expected``; ``known``,
        the share of all pairs whose sign is known.
    """
    n = len(model.y)
    own = np.unique(np.linspace(0, n - 1, cases or n).round().astype(int))
    found = case_influence(model.tree(model.draws(0, 4, draws)))
    value, mcse = (found[name].values[:, own] for name in ("influence", "mcse"))
    base, truth, error = model.draws(1, refit_chains, refit_draws), [], []
    for case in own.tolist():
        shifts = (base - model.without([case]).draws(1, refit_chains, refit_draws)).mean(axis=1)
        truth.append(shifts.mean(axis=0))
        error.append(shifts.std(axis=0, ddof=1) / np.sqrt(refit_chains))
    exact = np.array(truth).T
    known = abs(exact) > 3 * np.array(error).T
    rows = []
    for limit in beyond:
        shown = known & (abs(value) > limit * mcse)
        chance = stats.t.cdf(-(limit + abs(exact) / mcse), found.attrs["mcse_df"])
        rows.append((shown.sum(), (shown & (value * exact < 0)).sum(), chance[known].sum()))
    columns = dict(zip(("pairs", "wrong", "expected"), np.array(rows).T, strict=True))
    return xr.Dataset(
        {name: ("beyond", column) for name, column in columns.items()},
        coords={"beyond": list(beyond)},
        attrs={"known": float(known.mean()), "cases": len(own)},
    )


def _against_arviz(model: Logistic, w: np.ndarray) -> dict[str, float]:
    """Correlations with ArviZ's leave-one-out shifts, over cases of good k, of the worst φ."""
    from arviz_stats import loo_expectations

    tree = model.tree(w)
    log_p = tree["log_likelihood"].to_dataset()["y"]
    posterior = tree["posterior"].to_dataset()["w"]
    tree["observed_data"] = xr.DataTree(xr.Dataset({"y": ("case", model.y)}))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Pareto's k, by both
        found, means = case_removal(tree), []
        for feature in range(w.shape[2]):
            phi = posterior.isel(feature=feature, drop=True)
            predictive = (phi + xr.zeros_like(log_p)).transpose(*log_p.dims)
            tree["posterior_predictive"] = xr.DataTree(predictive.to_dataset(name="y"))
            means.append(loo_expectations(tree, var_name="y", kind="mean")[0].values)
    good = found["pareto_k"].values < found.attrs["pareto_threshold"]
    shifts = np.array(means) - w.mean(axis=(0, 1))[:, None]
    held = np.isfinite(shifts).all(axis=0)  # ArviZ 0.8 has NaN where log p varies below rounding
    good, shifts = good & held, shifts[:, good & held]
    return {"missing": float((~held).sum())} | {
        name: min(
            float(np.corrcoef(abs(a), abs(b))[0, 1])
            for a, b in zip(found[name].values[:, good], shifts, strict=True)
        )
        for name in ("change", "first_order", "second_order")
    }


def _central_differences(model: Logistic, w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Truth and its standard error over blocks of chains, ``(d, n)``."""
    parts = []
    for block in range(16):
        flat = w[block::16].reshape(-1, w.shape[2])
        log_p = model.log_p(flat)
        ends = []
        for change in (0.01, -0.01):
            weight = np.exp(change * log_p)
            ends.append(flat.T @ weight / weight.sum(axis=0))
        parts.append((ends[0] - ends[1]) / 0.02)
    estimates = np.array(parts)
    return estimates.mean(axis=0), estimates.std(axis=0, ddof=1) / np.sqrt(len(parts))


def _rms(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(values**2)))


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.case_influence",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--runs", type=int, default=50, help="of the coverage (default: %(default)s)")
    add("--draws", type=int, default=500, help="a chain of these (default: %(default)s)")
    add("--refit-draws", type=int, default=500, help="a chain, of 64 (default: %(default)s)")
    add("--cases", type=int, help="left out for the table of signs (default: all)")
    add("--features", type=int, default=10, help="of 30 (default: %(default)s)")
    args = parser.parse_args(argv)
    began, model = time.perf_counter(), breast_cancer(args.features)
    table = removals(model, draws=4 * args.draws, refit_draws=args.refit_draws)
    header = (
        "removed", "refit", "± mcse", "first order", "second order", "PSIS", "k", "used",
        "its error", "signs",
    )  # fmt: skip
    rows = []
    for i, name in enumerate(table["removed"].values.tolist()):
        row = table.isel(removed=i)
        size = float(row["refit"])
        shares = [f"{float(row[k]) / size:.1%}" for k in ("first_order", "second_order", "psis")]
        rows.append(
            [name, f"{size:.4f}", f"{float(row['refit_mcse']):.4f}", *shares,
             f"{float(row['pareto_k']):.2f}", str(row["uses"].item()),
             f"{float(row['change']) / size:.1%}", f"{float(row['signs']):.0%}"]
        )  # fmt: skip
    print(format_table(header, rows), end="\n\n", flush=True)
    found = derivatives(model, runs=args.runs, draws=args.draws)
    bars = [
        ("coverage of 95 % intervals", f"{found['coverage']:.1%} ± {found['coverage_error']:.1%}",
         "93–97 %", 0.93 <= found["coverage"] <= 0.97),
        (f"right signs, of the {found['clear']:.0%} without 0", f"{found['signs']:.2%}",
         "≥ 97.5 %", found["signs"] >= 0.975),
        (f"sizes of changes against ArviZ's shifts ({found['missing']:.0f} NaN)",
         f"{found['change']:.4f}", "≥ 0.99", found["change"] >= 0.99),
        ("… of second order", f"{found['second_order']:.4f}", "", None),
        ("… of first order", f"{found['first_order']:.4f}", "", None),
    ]  # fmt: skip
    judged = [(*bar[:3], verdict(bar[3])) for bar in bars]
    print(format_table(("judge", "value", "bar", ""), judged), end="\n\n", flush=True)
    half = max(20, args.refit_draws // 2)
    told = signs(model, draws=4 * args.draws, refit_draws=half, cases=args.cases)
    last, lines = int(told["wrong"][-1]), []
    for k, limit in enumerate(told["beyond"].values.tolist()):
        pairs, wrong, chance = (told[x].values[k] for x in ("pairs", "wrong", "expected"))
        bar = ("0", verdict(last == 0)) if limit == told["beyond"][-1] else ("", "")
        lines.append((f"{limit:g} errors", f"{pairs:.0f}", f"{wrong:.0f}", f"{chance:.1f}", *bar))
    print(format_table(("effect beyond", "pairs", "wrong sign", "by chance", "bar", ""), lines))
    print(
        f"truth's error {found['truth_error']:.2f} of a run's; {time.perf_counter() - began:.0f} s"
    )
    return int(last > 0 or any(bar[3] is False for bar in bars))


if __name__ == "__main__":
    sys.exit(main())
