# ---
# jupyter:
#   jupytext:
#     formats: ipynb,scripts//py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Which observations carry the conclusion?
#
# A Bayesian model has been sampled, and a coefficient is almost surely positive. Before that goes
# into a report: does it rest on all of the data, or on a handful of cases? The draws know already.
# This tutorial
#
# 1. fits a logistic regression in **NumPyro** and states a conclusion,
# 2. says what **influence** is here: which loss, which weight, which sign,
# 3. finds the cases behind the conclusion, with **intervals**,
# 4. turns one case's weight up and down: **first order, second order, importance weights**,
# 5. leaves out one case and groups of ten, and lets **refits judge**, and
# 6. says what is **believable** and what is not.
#
# You need to know what a posterior is and how to read a NumPyro model; no networks appear. Install
# with `pip install 'bayesinf[numpyro,plots]' scikit-learn`. It takes about half a minute.

# %%
import warnings

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import numpyro
import numpyro.distributions as dist
import pandas as pd
from numpyro import handlers
from numpyro.infer import MCMC, NUTS, init_to_value
from scipy.stats import t as student
from sklearn.datasets import load_breast_cancer

import bayesinf as bi
from bayesinf.interop.numpyro import sample_numpyro
from bayesinf.plots import plot_case_influence, plot_forest

numpyro.enable_x64()  # JAX's default of 32 bits rounds small differences of log-likelihoods away
plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "figure.dpi": 100})
INK, ORANGE, GREEN, GREY = "#1f4e79", "#d95f02", "#1b7837", "0.6"

# %% [markdown]
# ## 1. A model and a conclusion
#
# 569 tumours, 212 of them malignant; of each, cell nuclei were measured under a microscope. Four of
# these measurements, standardised, are to predict malignancy; of several sets of four we took one
# whose conclusion turned out fragile, as that is what there is to see. Every case has a **weight**
# $b_i$, the power to which its likelihood is raised, and all are 1: this is the usual model. They
# stand in it so that we can change them later.

# %%
data = load_breast_cancer()
COLUMNS = {"radius": 0, "texture": 1, "smoothness": 4, "concave points": 7}
measured = data.data[:, list(COLUMNS.values())]
x = jnp.array((measured - measured.mean(axis=0)) / measured.std(axis=0))
y = jnp.array(1 - data.target)  # 1 = malignant
ONES = jnp.ones(len(y))


def model(x, y, b):
    intercept = numpyro.sample("intercept", dist.Normal(0, 2.5))
    with numpyro.plate("feature", x.shape[1]):
        beta = numpyro.sample("beta", dist.Normal(0, 2.5))
    with numpyro.plate("case", len(y)), handlers.scale(scale=b):
        numpyro.sample("malignant", dist.Bernoulli(logits=intercept + x @ beta), obs=y)


mcmc = MCMC(
    NUTS(model, dense_mass=True), num_warmup=250, num_samples=250, num_chains=16,
    chain_method="vectorized", jit_model_args=True, progress_bar=False,
)  # fmt: skip
mcmc.run(jax.random.key(0), x, y, ONES)

PHI, SURE = "beta[smoothness]", "smoothness > 0"
quantities = {SURE: lambda p: 1.0 * (p["beta"].sel(feature="smoothness") > 0)}
tree, influence = sample_numpyro(mcmc, coords={"feature": list(COLUMNS)}, var_names="beta")

draws = tree["posterior"]["beta"]
summary = pd.DataFrame(
    {
        "mean": draws.mean(("chain", "draw")),
        "sd": draws.std(("chain", "draw")),
        "2.5 %": draws.quantile(0.025, ("chain", "draw")),
        "97.5 %": draws.quantile(0.975, ("chain", "draw")),
        "P(β > 0)": (draws > 0).mean(("chain", "draw")),
        "R-hat": influence["rhat_query"],
    },
    index=list(COLUMNS),
)
summary.round(3)

# %% [markdown]
# `mcmc` was run by NumPyro; `sample_numpyro` takes the draws as they are, computes every case's
# log-likelihood, and returns both in ArviZ's form, with the influences. (Given a model instead, it
# runs NUTS itself. For draws of PyMC or Stan, `bi.case_influence(data)` does the same.)
#
# Three coefficients are beyond doubt. **Smoothness** is the one to write about: its 95 % interval
# excludes 0, just so. That is the conclusion whose carriers we look for.
#
# ## 2. What influence means here
#
# With weights, the posterior is
#
# $$p_b(\theta) \;\propto\; p(\theta) \prod_i p(y_i \mid \theta)^{b_i}
#   \;=\; p(\theta)\, \exp\Big(-\sum_i b_i\, \ell_i(\theta)\Big),
#   \qquad \ell_i = -\log p(y_i \mid \theta).$$
#
# So the **loss** of a case is $-\log$ of its likelihood: no choice of ours, it is what the
# posterior adds up. $b_i = 0$ leaves case $i$ out, $b_i = 2$ counts it twice. Differentiate the
# posterior mean of any quantity $\varphi(\theta)$:
#
# $$\mathrm{influence}_i \;=\; \frac{\partial\, E[\varphi]}{\partial\, b_i}\bigg|_{b=1}
#   \;=\; -\mathrm{Cov}(\varphi, \ell_i) \;=\; \mathrm{Cov}(\varphi, \log p_i).$$
#
# A covariance over draws that we have: no refit and no gradient. **The sign**: positive = the case
# pulls $\varphi$ *up*, so that leaving it out brings $\varphi$ down. For networks, $\varphi$ is
# the loss of a query and negative means helpful; here $\varphi$ is a coefficient, neither good nor
# bad, and the sign is just a direction.
#
# The draws also tell by how much each number is to be trusted, its Monte-Carlo error `mcse`.

# %%
sd = float(influence["posterior_sd"].sel(query=PHI))
t95 = student.ppf(0.975, influence.attrs["mcse_df"])
own = influence[["influence", "mcse"]].sel(query=PHI) / sd
clear = abs(own["influence"]) > t95 * own["mcse"]
log_p = tree["log_likelihood"]["malignant"]
by_hand = np.cov(draws[..., 2].values.ravel(), log_p[..., 112].values.ravel())[0, 1] / sd
print(f"by hand:  {by_hand:+.3f}")
print(
    f"case 112: {float(own['influence'][112]):+.3f} ± {t95 * float(own['mcse'][112]):.3f} "
    "posterior standard deviations"
)
print(
    f"{int(clear.sum())} of 569 intervals exclude 0; by chance alone about "
    f"{0.05 * len(y):.0f} would"
)

# %% [markdown]
# ## 3. The cases behind the conclusion

# %%
with warnings.catch_warnings():
    warnings.simplefilter("error")  # nothing to warn of: chains have met, no transition diverged
    cases = bi.case_summary(tree, var_names="beta")

fig, axes = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained", width_ratios=(3, 2))
plot_case_influence(influence, PHI, summary=cases, named=6, ax=axes[0])
kind = {i: f"{i} ({'malignant' if y[i] else 'benign'})" for i in range(len(y))}
plot_forest(influence, PHI, k=8, labels=kind, ax=axes[1])

ranked = np.argsort(-own["influence"].values)
up, down = ranked[:10].tolist(), ranked[::-1][:10].tolist()
eta = draws.values @ np.array(x.T) + tree["posterior"]["intercept"].values[..., None]
chance = 1 / (1 + np.exp(-eta))
shown = [*up[:3], *down[:3]]
table = pd.DataFrame(np.array(x)[shown], index=shown, columns=list(COLUMNS))
table.insert(0, "truth", [("benign", "malignant")[int(y[i])] for i in shown])
table.insert(1, "P(malignant)", chance.mean(axis=(0, 1))[shown])
table["influence / sd"] = own["influence"].values[shown]
table["p_waic"] = cases["p_waic"].values[shown]
table["Pareto k"] = cases["pareto_k"].values[shown]
table.round(2)

# %% [markdown]
# One case stands out: counting number 112 once more would raise the coefficient by half of its
# standard deviation. It is a benign tumour with the concave points of a malignant one and an
# unusually low smoothness: the model understands it only if low smoothness speaks for benign. On
# the other side stand number 537, benign with a high smoothness, and 40, malignant with a low one.
# All six are cases that the model is **unsure or wrong** about. One that it predicts with certainty
# has a log-likelihood that hardly varies, and so can have no influence.
#
# `case_summary` has more on every case. `p_waic`, the variance of its log-likelihood, is the
# influence on its own fit: high means hard, unusual or mislabelled. **Pareto's $\hat k$** tells
# whether the draws can be reweighted to a posterior without the case; a diamond would mark one for
# which they cannot ($\hat k \ge 0.7$ with this many draws), and there is none.
#
# ## 4. One weight, turned up and down
#
# An influence is a slope at $b = 1$; leaving out is a step to $b = 0$. Three ways to make the step
# from the draws that we have:
#
# * **first order**: along the slope, $-\mathrm{Cov}(\varphi, \log p_i)$;
# * **second order**: plus half the curvature, $\tfrac12 \kappa_3(\varphi, \log p_i, \log p_i)$, a
#   third cumulant;
# * **PSIS**: draws reweighted by $1 / p_i$, the largest weights smoothed by a Pareto tail.
#
# And there is a judge, NUTS once more with other weights. It starts at the mean
# of the first run and keeps its step size and metric, which makes it quick and leaves its law
# exact. (NumPyro wants positive weights: "0" is $10^{-9}$.)

# %%
adapted = mcmc.last_state.adapt_state
means = {name: jnp.array(v.mean(("chain", "draw"))) for name, v in tree["posterior"].items()}
kernel = NUTS(
    model, step_size=float(adapted.step_size.mean()), adapt_step_size=False,
    inverse_mass_matrix={k: m.mean(axis=0) for k, m in adapted.inverse_mass_matrix.items()},
    dense_mass=True, adapt_mass_matrix=False, init_strategy=init_to_value(values=means),
)  # fmt: skip
again = MCMC(
    kernel, num_warmup=30, num_samples=300, num_chains=8,
    chain_method="vectorized", jit_model_args=True, progress_bar=False,
)  # fmt: skip
OUT = 1e-9


def refit(members, weight, seed):
    b = ONES.at[jnp.array(members)].set(weight)
    again.run(jax.random.key(seed), x, y, b)
    return np.array(again.get_samples(group_by_chain=True)["beta"])


def mean_and_error(w):
    """Over chains, which are independent."""
    by_chain = w.mean(axis=1)
    return by_chain.mean(axis=0), by_chain.std(axis=0, ddof=1) / len(w) ** 0.5


top = up[0]
turned = {w: refit([top], w, seed) for seed, w in enumerate((OUT, 3.0), start=1)}
turned_at = {w: [v[2] for v in mean_and_error(beta)] for w, beta in turned.items()}

phi = draws.sel(feature="smoothness").values
case = log_p[..., top].values
slope, bend = (float(influence[v].sel(query=PHI)[top]) for v in ("influence", "second_order"))
b = np.linspace(0, 3, 61)
lines = {
    "first order": (phi.mean() + slope * (b - 1), GREY),
    "second order": (phi.mean() + slope * (b - 1) + bend * (b - 1) ** 2 / 2, GREEN),
    "reweighted draws": ([np.average(phi, weights=np.exp((w - 1) * case)) for w in b], INK),
}
fig, ax = plt.subplots(figsize=(6.5, 3.6), layout="constrained")
for name, (line, colour) in lines.items():
    ax.plot(b, line, color=colour, label=name)
here = {1.0: [v[2] for v in mean_and_error(draws.values)], **turned_at}
centre, error = np.array(list(here.values())).T
ax.errorbar(list(here), centre, yerr=student.ppf(0.975, 7) * error, fmt="o", capsize=3,
            color=ORANGE, label="NUTS, 95 % interval")  # fmt: skip
ax.set(xlabel=f"weight $b$ of case {top}", ylabel="posterior mean of β, smoothness")
ax.legend(frameon=False)
ax.minorticks_off()

# %% [markdown]
# The dependence on the weight is bent: the more a case counts already, the less counting it again
# adds. The slope is right at $b = 1$. For leaving this case out all three come near the judge, the
# first order a little short and the others a little far, about as far as their errors allow. At
# $b = 3$ the line is well off, and of the others the reweighted draws are closest. (For *more*
# weight the draws are reweighted by a likelihood, which is bounded: the easy direction.)
#
# ## 5. Leaving out, and the judge
#
# Now the case alone, the ten that hold the coefficient up most, the ten that hold it down, and ten
# at random.

# %%
groups = {
    f"case {top}": [top],
    "ten that hold it up": up,
    "ten that hold it down": down,
    "ten at random": np.random.default_rng(0).choice(len(y), 10, replace=False).tolist(),
}
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    removal = bi.case_removal(tree, groups, var_names="beta", quantities=quantities)
warned = " ".join(str(w.message) for w in caught)
print(warned)

names = list(groups)
refits = {names[0]: turned[OUT]}
refits |= {n: refit(groups[n], OUT, seed) for seed, n in enumerate(names[1:], start=4)}
base, base_error = mean_and_error(draws.values)
scale = draws.values.std(axis=(0, 1))
truth = np.array([mean_and_error(w)[0] - base for w in refits.values()]) / scale
error = np.array([np.hypot(mean_and_error(w)[1], base_error) for w in refits.values()]) / scale
HOW = ("first_order", "second_order", "psis")
told = {k: removal[k].values[:4].T / scale for k in HOW}
told_error = {k: removal[f"{k}_mcse"].values[:4].T / scale for k in HOW}

columns = {"refit": [f"{v:+.2f} ± {e:.2f}" for v, e in zip(truth[:, 2], error[:, 2], strict=True)]}
for k in HOW:
    pairs = zip(told[k][:, 2], told_error[k][:, 2], strict=True)
    columns[k.replace("_", " ")] = [f"{v:+.2f} ± {e:.2f}" for v, e in pairs]
columns["k̂"] = removal["pareto_k"].values.round(2)
columns["used"] = removal["uses"].values
pd.DataFrame(columns, index=names)

# %% [markdown]
# Shifts of the smoothness coefficient, in posterior standard deviations, with standard errors.
# Every sign is right. The amounts part where the step is long: for both chosen tens the first order
# tells about seven tenths of the truth. It is the sum of the single influences, and does not know
# that when one carrier has gone, the next carries more. The second order knows a part of that.
#
# $\hat k$ says beforehand where importance weights fail: below 0.7 they agree with the refits, to
# some hundredths; above, a few draws rule the answer, and it is off by three tenths and more.
# There `change` falls back to first order, which is off as well, and the warning says: **refit**.
# All four coefficients in all four removals:

# %%
fig, axes = plt.subplots(1, 3, figsize=(11, 3.6), layout="constrained", sharey=True)
heavy = removal["pareto_k"].values >= removal.attrs["pareto_threshold"]
for ax, k in zip(axes, HOW, strict=True):
    for group, name in enumerate(names):
        ax.errorbar(truth[group], told[k][group], xerr=error[group], yerr=told_error[k][group],
                    fmt="D" if heavy[group] else "o", markersize=4, label=name)  # fmt: skip
    ax.axline((0, 0), slope=1, color=GREY, linewidth=0.8)
    ax.set(title=k.replace("_", " "), xlabel="shift by refitting, sd")
axes[0].set_ylabel("predicted shift, sd")
axes[0].legend(frameon=False, fontsize=8)
loose = {k: np.hypot(error, told_error[k]) for k in HOW}
sure = {k: (abs(truth) > 3 * error) & (abs(told[k]) > 3 * told_error[k]) for k in HOW}
for k in HOW:
    right = (truth * told[k] > 0)[sure[k]]
    off = np.sqrt(((told[k] - truth) ** 2).mean(axis=1))
    print(f"{k:12s} signs right {right.sum()} of {right.size}; error in sd, by removal: "
          + ", ".join(f"{value:.2f}" for value in off))  # fmt: skip

# %% [markdown]
# (Diamonds: $\hat k \ge 0.7$.) And the conclusion itself?

# %%
certain = {"all 569 cases": float((draws.sel(feature="smoothness") > 0).mean())}
certain |= {f"without {n}": float((w[..., 2] > 0).mean()) for n, w in refits.items()}
lower = {"all 569 cases": float(np.quantile(phi, 0.025))}
lower |= {f"without {n}": float(np.quantile(w[..., 2], 0.025)) for n, w in refits.items()}
by_psis = (removal["posterior_mean"] + removal["psis"]).sel(query=SURE).values
verdicts = pd.DataFrame({"P(β > 0)": certain, "2.5 % quantile": lower})
verdicts["P(β > 0) by PSIS"] = [np.nan, *np.where(heavy, np.nan, by_psis)]
verdicts.round(3)

# %% [markdown]
# **One case of 569 decides whether the 95 % interval excludes 0.** Without ten, less than 2 % of
# the data, even the sign is open. That is not to say that smoothness has no effect: ten *chosen*
# cases can move much, and the ten at random move nothing. It says what the evidence consists of,
# and which records to look at before the sentence is printed.
#
# ## 6. What is believable, and what is not
#
# * **The sign and the order of magnitude of single influences**: where the interval excludes 0.
#   Intervals are for each case by itself; among 569, some 28 miss.
# * **The size of a removal**: where first and second order agree, or $\hat k$ is below its
#   threshold. Then no refit is needed.
# * **Not: first order for chosen groups.** It says too little for cases that support each other.
#   Second order is better here, and nothing promises it: it is one more term of a series.
# * **Not: importance weights with $\hat k$ above the threshold**, nor their error bars.
# * **Not: "influential, therefore wrong".** Case 112 may well be right; it is merely alone. An
#   influence is a reason to look at a record, none to delete it. Leaving out those who disagree
#   makes any model surer: see what "ten that hold it down" does to the other coefficients above.
# * **Not: causes.** All of it is about this model with these four measurements and this prior. With
#   other columns other cases carry.
# * **The chains first.** Influences are covariances of draws: R-hat, ESS and divergences come
#   before everything, and `sample_numpyro` warns of them.
#
# To report: the conclusion, the cases that carry it with their intervals, $\hat k$ of their
# removal, and one refit without them.
#
# The cell below holds this page to its numbers.

# %%
assert summary["R-hat"].max() < 1.02
assert abs(by_hand - float(own["influence"][112])) < 1e-6
assert summary.loc["smoothness", "2.5 %"] > 0
assert top == 112
value, reach = own["influence"].values, t95 * own["mcse"].values
assert value[112] - reach[112] > np.delete(value + reach, 112).max()
assert float(cases["pareto_k"].max()) < cases.attrs["pareto_threshold"]
assert abs(lines["second order"][0][0] - turned_at[OUT][0]) < 0.2 * scale[2]
assert abs(lines["first order"][0][-1] - turned_at[3.0][0]) < 0.6 * scale[2]
assert all((truth * told[k] > 0)[sure[k]].all() and sure[k].sum() >= 6 for k in HOW)
assert heavy.tolist() == [False, True, True, False]
assert "2 of 4 removals" in warned
for k in ("second_order", "psis"):
    assert (abs(told[k] - truth) < 4.5 * loose[k])[~heavy].all()
share = told["first_order"][[1, 2], 2] / truth[[1, 2], 2]
assert share.min() > 0.55
assert share.max() < 0.85
assert error.max() < 0.06
size = {k: np.sqrt(((told[k] - truth) ** 2).mean(axis=1)) for k in HOW}
assert (size["second_order"] < size["first_order"])[[1, 2]].all()
assert size["psis"][heavy].min() > 2 * size["psis"][~heavy].max()
assert abs(truth[3, 2]) < 0.15 < 0.4 < -truth[0, 2]
alone, without_ten = (certain[f"without {n}"] for n in names[:2])
assert certain["all 569 cases"] > 0.97 > alone > 0.85 > 0.6 > without_ten
assert lower["all 569 cases"] > 0 > lower[f"without {names[0]}"]
assert abs(by_psis[0] - alone) < 0.04
