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
# # Choosing hyper-parameters, and noticing bad ones
#
# A Bayesian influence is a covariance of losses along Markov chains, so it is as good as the chains
# are. Their settings can be measured instead of guessed, and most bad settings can be seen. This
# tutorial
#
# 1. trains a network,
# 2. lets `calibrate` choose the settings, and reads its **report**,
# 3. looks at **bad traces** beside good ones: what each diagnostic catches, and what it misses,
# 4. measures how **gradient noise** heats the chains,
# 5. turns the **temperature** up and down,
# 6. starts at a checkpoint that has **not converged**, where drift passes for influence,
# 7. runs the **control** that sees no data,
# 8. says what **error bars** and **shrinkage** do.
#
# You need to know PyTorch, some Bayes, and what a Bayesian influence is (tutorial 01 says).
# Everything runs in about a minute on one core. Install with
# `pip install 'bayesinf[plots]' scikit-learn`.

# %%
import json
import textwrap
import warnings
from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from scipy.stats import t as student
from sklearn.datasets import load_digits
from torch import nn

import bayesinf as bi
from bayesinf.plots import plot_calibration

torch.set_num_threads(1)  # for networks this small, more threads only get in each other's way
plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "figure.dpi": 100})
INK, ORANGE, GREY = "#1f4e79", "#d95f02", "0.6"

# %% [markdown]
# ## 1. A network
#
# 300 of scikit-learn's digits train a network with one hidden layer of 16 units; 60 others are the
# queries.

# %%
images, labels = load_digits(return_X_y=True)
order = np.random.default_rng(0).permutation(len(images))
x = torch.tensor(images[order] / 16.0, dtype=torch.float32)
y = torch.tensor(labels[order])
train, query = (x[:300], y[:300]), (x[1000:1060], y[1000:1060])


def make_model():
    return nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10))


WEIGHT_DECAY = 1e-3
recipe = bi.SGDRecipe(epochs=40, batch_size=50, lr=0.1, momentum=0.9, weight_decay=WEIGHT_DECAY)
model = bi.train_one(make_model, bi.Categorical(), recipe, train=train, seed=0)
task = bi.Task(model, bi.Categorical(), train=train, query=query)
with torch.no_grad():
    accuracy = (model(query[0]).argmax(1) == query[1]).double().mean()
print(f"{task.dimension:,} weights, {accuracy:.0%} of the queries are read correctly")

# %% [markdown]
# ## 2. One call, and its report
#
# `calibrate` returns a posterior, a kernel, the options of `sample`, and a report. One number is
# yours: the condition $\kappa = \lambda_{\max}/\lambda$, 100 by default, or the damping $\lambda$
# itself, where you know it from the training recipe (tutorial 02). The rest is measured.

# %%
curvature = bi.fit_curvature(task, fisher="enumerated")
settled = {"curvature": curvature, "weight_decay": WEIGHT_DECAY}
calibration = bi.calibrate(task, **settled, error=0.03)
posterior, sampler, options, report = calibration
print(report.attrs["text"])

# %% [markdown]
# Line by line:
#
# * **checkpoint**: the *gradient noise scale* is the batch whose gradient would be half noise;
#   above the size of the training set it says that the checkpoint is nearly stationary.
# * **curvature**: $\lambda_{\max}$ is the top curvature of the mean loss. $\lambda$ follows
#   from it by $\kappa$, or is raised to twice the depth of the Hessian's most negative eigenvalue,
#   so that the chains cannot run away along it. The *effective dimension* counts the directions
#   that the data hold rather than $\lambda$.
# * **temperature**: $n_\beta$ weighs the data; small is hot. The *virial ratio* of displacements
#   $\delta$, $2\,\mathbb{E}[T]/\mathbb{E}[\langle\delta, \nabla T\rangle]$ with $T$ the rise of the
#   loss (its slope at the checkpoint taken off), is 1 for a quadratic loss. The default
#   takes the hottest temperature at which it is at least 0.75.
# * **kernel**: Langevin dynamics with momentum, in coordinates in which EK-FAC says that all
#   directions are alike. They are not quite, hence the preconditioned curvature; the step follows
#   from its top.
# * **pilot** and **run**: short chains tell how many steps apart losses are independent, and that
#   sets warm-up, thinning and the number of draws for the wanted `error` of a correlation.

# %%
_ = plot_calibration(report)

# %% [markdown]
# Left: the virial ratio falls as the chains get hotter, and the dashed line is the choice. Right:
# curvatures, and the damping that replaces those below it.
#
# Now the run. `look` samples, diagnoses and scores, and keeps every warning that was given.


# %%
def look(posterior, sampler, **changed):
    """Run with some options changed; warnings are kept, not shown."""
    settings = {**options, "progress": False, **changed}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        traces = bi.sample(posterior, sampler, **settings)
        scores = bi.bif(traces)
    found = bi.diagnose(traces, max_examples=40)
    return {
        "traces": traces, "scores": scores, "verdict": found.attrs["verdict"],
        "R-hat": float(found["rhat_train"].quantile(0.95)),
        "effective draws": float(found["ess_bulk_train"].quantile(0.05)),
        "trend": float(found["trend_train"].median()),
        "warnings": [f"{w.category.__name__}: {w.message}" for w in caught],
    }  # fmt: skip


def correlation(a, b):
    return np.corrcoef(a["influence"].values.ravel(), b["influence"].values.ravel())[0, 1]


def noise_share(scores):
    """Share of the variance between a query's scores that their error bars explain."""
    spread = scores["influence"] - scores["influence"].mean("train")
    return float((scores["mcse"] ** 2).sum() / (spread**2).sum())


def covered(scores, others):
    """Share of 95 % intervals of the difference of two independent runs that contain 0."""
    apart = abs(scores["influence"] - others["influence"])
    error = np.hypot(scores["mcse"], others["mcse"])
    return float((apart < student.ppf(0.975, scores.attrs["mcse_df"]) * error).mean())


good = look(posterior, sampler)
exact = bi.hessian(task, damping=posterior.damping)
with_exact = correlation(good["scores"], exact)
print(good["verdict"], good["warnings"])
print(f"correlation with the influence by exact curvature, all pairs: {with_exact:.2f}")

# %% [markdown]
# No warning, and nearly the classical influence at the same $\lambda$; section 5 says where the
# rest comes from. This run is the yardstick below.
#
# ## 3. Good and bad traces
#
# Each of these changes the good settings in one respect, and runs fewer draws, as does *short*, so
# that they compare; *SGLD by hand* is plain SGLD with a stable step, and no warm-up. *Covered* is
# the share of 95 % intervals that agree with the good run's.

# %%
few = {"chains": 8, "draws": 100, "seed": 1}
by_hand = bi.SGLD(1 / (posterior.n_beta * (report.attrs["lambda_max"] + posterior.damping)))
runs = {
    "short": look(posterior, sampler, **few),
    "10 draws": look(posterior, sampler, **few | {"draws": 10}),
    "step ÷ 1000": look(posterior, replace(sampler, step_size=sampler.step_size / 1000), **few),
    "SGLD by hand": look(posterior, by_hand, **few | {"warmup": 0}),
    "batches of 100": look(posterior, sampler, **few, batch_size=100),
}
rows = {}
for name, run in {"good": good, **runs}.items():
    rows[name] = {
        **{column: run[column] for column in ("R-hat", "effective draws", "trend")},
        "mean loss": float(run["traces"].values("train").mean()),
        "correlation with good": correlation(run["scores"], good["scores"]),
        "covered": covered(run["scores"], good["scores"]) if run is not good else np.nan,
        "warning": ", ".join(w.split(":")[0] for w in run["warnings"]),
    }
table = pd.DataFrame(rows).T
table.astype(dict.fromkeys(table.columns[:-1], float)).round(3)

# %%
loss_at_w0 = report.attrs["loss"]
colours = plt.get_cmap("viridis")(np.linspace(0, 0.9, 8))
fig, axes = plt.subplots(1, 4, figsize=(11, 3), layout="constrained", sharey=True)
panels = [name for name in runs if name != "10 draws"]
for ax, name in zip(axes, panels, strict=True):
    for chain, colour in zip(
        runs[name]["traces"].values("train").mean("train"), colours, strict=True
    ):
        ax.plot(chain, color=colour, linewidth=0.8)
    ax.axhline(loss_at_w0, color=ORANGE, linestyle="--", linewidth=1)
    ax.set(title=name, xlabel="draw", yscale="log")
axes[0].set_ylabel("mean training loss / nats")
_ = axes[0].annotate("at $w_0$", (2, loss_at_w0), color=ORANGE, va="bottom")

# %% [markdown]
# * **Drift.** With a step 1000 times too small the chains keep to where they started, and creep.
#   R-hat, effective draws and *trend* (the share of a loss's variance that is a line in time) all
#   see it.
# * **Too short a warm-up.** SGLD without a preconditioner starts far out and forgets slowly: the
#   same three see it. (The calibrated kernel starts near its law and forgets in a few steps.)
# * **Too few draws.** The short run is not wrong, but noisy: it correlates less with the good one,
#   and its intervals cover as they should. Those of chains that have not converged do not.
# * **Small batches.** Nothing in these traces looks wrong: chains that are too hot can agree
#   perfectly on being too hot. No comparison of chains can find that; section 4 measures it.
#
# The warnings are sentences. That of the tiny step:

# %%
print(textwrap.fill(runs["step ÷ 1000"]["warnings"][0], 100))

# %% [markdown]
# A step that is too **large** does not get as far as a score:

# %%
try:
    look(posterior, replace(sampler, step_size=12 * sampler.step_size), **few | {"chains": 4})
    diverged = ""
except bi.DivergenceError as error:
    diverged = str(error)
print("\n".join(textwrap.fill(line, 100) for line in diverged.splitlines()))

# %% [markdown]
# ## 4. Gradient noise
#
# A batch's gradient is the true one plus noise, and a kernel adds noise of its own: together they
# are too hot. `sample` measures by how much, in the directions that the noise reaches, and warns
# above `max_excess`, 5 % by default. What it says, beside how much more the mean loss rises above
# its value at the checkpoint than in the good run:


# %%
def smaller(factor):
    """The kernel with a step that takes ``√factor`` times as many steps for the same way."""
    more = round(factor**0.5)
    thinner = {"thin": options["thin"] * more, "warmup": options["warmup"] * more}
    return replace(sampler, step_size=sampler.step_size / factor), {**few, **thinner}


def rise(run):
    return float(run["traces"].values("train").mean()) - loss_at_w0


def stated(run):
    found = json.loads(run["scores"].attrs.get("excess_temperature", "{}"))  # none: no batches
    return found.get("typical", 0.0)


cooler, longer = smaller(4)
noisy = {
    "full batch": runs["short"],
    "100": runs["batches of 100"],
    "100, by gradient": look(
        posterior, sampler, **few, batch_size=bi.Batches(100, probabilities="gradient")
    ),
    "100, step ÷ 4": look(posterior, cooler, **longer, batch_size=100),
}
heat = {
    name: {
        "stated excess": stated(run),
        "loss rises more by": rise(run) / rise(good) - 1,
        "R-hat": run["R-hat"],
        "warns": any("GradientNoiseWarning" in w for w in run["warnings"]),
    }
    for name, run in noisy.items()
}
pd.DataFrame(heat).T.astype(dict.fromkeys(("stated excess", "R-hat"), float)).round(3)

# %%
print(textwrap.fill(noisy["100"]["warnings"][0], 100))

# %% [markdown]
# The statement is about the directions that the noise reaches; the loss feels others, too, and its
# rise is heated less. R-hat sees nothing. Of the two cures tried, both on the warning's list, the
# smaller step works, for twice as many steps. Drawing examples by the size of their gradient at
# the checkpoint makes it worse here: an example that was easy there is drawn seldom and counts for
# much when it is drawn. Measure, rather than trust a rule. In batches of 10:

# %%
try:
    look(posterior, sampler, **few | {"chains": 4}, batch_size=10)
    too_noisy = ""
except bi.DivergenceError as error:
    too_noisy = str(error)
print(too_noisy.splitlines()[0])

# %% [markdown]
# ## 5. Temperature
#
# The same $\lambda$ at other temperatures, each calibrated anew. As $n_\beta$ grows the posterior
# shrinks around the checkpoint, the loss becomes quadratic in it, and the influence tends to the
# classical one with exact curvature.

# %%
factors = [0.1, 1, 10, 1000, 1e14]
sweep = {}
for factor in factors:
    at, run, said = calibration, good, []
    if factor != 1:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            at = bi.calibrate(task, **settled, n_beta=factor * posterior.n_beta)
        own = {name: at.options[name] for name in ("warmup", "thin")}
        run = look(at.posterior, at.sampler, **few | {"draws": 150}, **own)
    pairs = exact["influence"].values.ravel(), run["scores"]["influence"].values.ravel()
    sweep[factor] = {
        "virial ratio": float(at.report["virial"].sel(n_beta=at.posterior.n_beta)),
        "effective dimension": at.report.attrs["chain_dimension"],
        "mean loss": float(run["traces"].values("train").mean()),
        "R-hat": run["R-hat"],
        "warnings": len(said) + len(run["warnings"]),
        "slope on exact": np.polyfit(*pairs, deg=1)[0],
        "correlation": np.corrcoef(*pairs)[0, 1],
        "if noise alone": (1 - noise_share(run["scores"])) ** 0.5,
    }
pd.DataFrame({f"n_beta × {factor:g}": row for factor, row in sweep.items()}).T.round(2)

# %%
fig, ax = plt.subplots(figsize=(5.5, 3), layout="constrained")
for name, style in (("slope on exact", "o-"), ("correlation", "s-"), ("if noise alone", "--")):
    ax.plot(factors[:4], [sweep[factor][name] for factor in factors[:4]], style, label=name,
            color=INK if name == "slope on exact" else GREY)  # fmt: skip
ax.set(xscale="log", xlabel="$n_β$ / chosen (hot ← → cold)", ylim=(0, None))
ax.set_title("BIF against exact curvature")
_ = ax.legend(frameon=False)

# %% [markdown]
# *If noise alone* is the correlation that would remain if Monte-Carlo error were all that is
# between the two.
#
# * **Hot**: the loss rises far above that of the checkpoint. The chains mix, no warning is given,
#   and the answer is about networks that are hardly the one in question. The virial ratio alone
#   would not tell, either: it need not fall all the way. Look at the mean loss.
# * **Cold**: the losses hardly move, the slope is about 1, and what is missing from a correlation
#   of 1 is Monte-Carlo error. Nothing is wrong with such a chain, but what it returns could be had
#   from a solver (tutorial 02). What sampling adds lies between.
# * **Cold beyond rounding**: in the last row fluctuations are smaller than what 32 bits resolve.
#   The scores are wrong and R-hat is content. Calibration warns: a negative number of dimensions,
#   and such a virial ratio, are impossible for chains that sample what they should.
#
# Which temperature predicts retraining best is another question, for the judge of tutorial 01.
#
# ## 6. A checkpoint that has not converged
#
# The same training, stopped after 3 of 40 epochs. A common way to sample is to start at the
# checkpoint, with the *plain* potential, a weak spring, a small step and no warm-up. But the loss
# still has a slope, and the chains go on training.

# %%
early = bi.train_one(make_model, bi.Categorical(), replace(recipe, epochs=3), train=train, seed=0)
unfinished = bi.Task(early, bi.Categorical(), train=train, query=query)
plain = bi.LocalPosterior(unfinished, n_beta=unfinished.n, gamma=1.0, potential="plain")
drifting = look(plain, bi.SGLD(1e-4), **few, warmup=0, thin=2, jitter=0.0)


def with_time(run):
    """Correlation of each chain's mean training loss with time."""
    means = run["traces"].values("train").mean("train").values
    return np.array([np.corrcoef(chain, np.arange(len(chain)))[0, 1] for chain in means])


def without_trend(traces):
    """Covariance of losses, and what is left of it without a line in time in each chain."""
    query_loss, train_loss = (traces.values(g).values.astype(float) for g in ("query", "train"))
    time = np.linspace(-1, 1, query_loss.shape[1])[None, :, None]
    out = []
    for degree in (0, 1):
        parts = []
        for loss in (query_loss, train_loss):
            loss = loss - loss.mean(1, keepdims=True)
            slope = (loss * time).sum(1, keepdims=True) / (time**2).sum()
            parts.append((loss - degree * slope * time).reshape(-1, loss.shape[2]))
        out.append(parts[0].T @ parts[1])
    return out


raw, kept = without_trend(drifting["traces"])
removed = 1 - np.linalg.norm(kept) / np.linalg.norm(raw)
helpful = float((drifting["scores"]["influence"] < 0).mean())
print("correlation of the mean loss with time, by chain:", with_time(drifting).round(2))
print(f"{removed:.0%} of the covariance goes with a line in time")
print(f"{helpful:.0%} of all pairs look helpful")
print(textwrap.fill(drifting["warnings"][0], 100))

# %% [markdown]
# All losses fall together because the network learns, and so everything seems to help everything:
# drift that passes for influence. Now the calibrated, *tilted* potential, which takes the slope
# at the checkpoint off:

# %%
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    tilted = bi.calibrate(unfinished, weight_decay=WEIGHT_DECAY)
own = {name: tilted.options[name] for name in ("warmup", "thin")}
steady = look(tilted.posterior, tilted.sampler, **few, **own)
print(tilted.report.attrs["text"].splitlines()[1])
print("correlation with time, by chain:", with_time(steady).round(2))
print("diagnosis:", steady["verdict"])
calibration_says = [str(w.message) for w in caught]
print(textwrap.fill(calibration_says[0], 100))

# %%
fig, axes = plt.subplots(1, 2, figsize=(9, 3), layout="constrained", sharey=True)
for ax, run, title in (
    (axes[0], drifting, "plain, weak spring, no warm-up"),
    (axes[1], steady, "tilted, calibrated"),
):
    for chain, colour in zip(run["traces"].values("train").mean("train"), colours, strict=True):
        ax.plot(chain, color=colour, linewidth=0.8)
    ax.axhline(tilted.report.attrs["loss"], color=ORANGE, linestyle="--", linewidth=1)
    ax.set(title=title, xlabel="draw")
_ = axes[0].set_ylabel("mean training loss / nats")

# %% [markdown]
# The chains stay. It has a price: the Hessian here has a large negative eigenvalue, so that
# $\lambda$ had to be much larger than $\kappa = 100$ asks for, and `calibrate` warns all the same.
# A stationary chain around a checkpoint that is not a minimum answers a strongly localised
# question. If you can, train on.
#
# ## 7. The control that sees no data
#
# With `control=True` the posterior has $n_\beta = 0$ and the same spring: weights scatter around
# the checkpoint whatever the data say. All influences are 0, and `bif` refuses:

# %%
control = bi.calibrate(task, **settled, error=0.03, control=True)
blind = bi.sample(control.posterior, control.sampler, progress=False, **control.options)
try:
    bi.bif(blind)
except ValueError as error:
    print(textwrap.fill(str(error), 100))


def correlations(traces):
    """Correlation matrix of query and training losses over all draws."""
    a, b = (traces.values(g).values.astype(float) for g in ("query", "train"))
    a, b = (v.reshape(-1, v.shape[2]) for v in (a, b))
    a, b = ((v - v.mean(0)) / v.std(0) for v in (a, b))
    return a.T @ b / len(a)


seen, unseen = correlations(good["traces"]), correlations(blind)
alike = np.corrcoef(seen.ravel(), unseen.ravel())[0, 1]
blind_verdict = bi.diagnose(blind, max_examples=40).attrs["verdict"]
print(f"mean loss {float(blind.values('train').mean()):.2f}, {blind_verdict}")
print(f"correlation of the two correlation matrices: {alike:.2f}")

# %%
by_label = np.argsort(train[1].numpy(), kind="stable"), np.argsort(query[1].numpy(), kind="stable")
fig, axes = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
for ax, matrix, title in ((axes[0], seen, "good run"), (axes[1], unseen, "control: no data")):
    picture = ax.imshow(matrix[by_label[1]][:, by_label[0]], cmap="RdBu", vmin=-0.5, vmax=0.5,
                        aspect="auto")  # fmt: skip
    ax.set(title=title, xlabel="training image, by label", ylabel="query, by label")
_ = fig.colorbar(picture, ax=axes, label="correlation of losses")

# %% [markdown]
# Yet the losses of the control are correlated, and in a pattern much like that of the good run, as
# the network alone makes images that look alike respond alike. So a correlation matrix with
# plausible blocks is no evidence that a chain is right. What the data add is the difference
# between these pictures.
#
# ## 8. Error bars and shrinkage
#
# A brief run of 60 draws and the good one differ in luck and length alone. If the error bars are
# right, 95 % of the 95 % intervals of their difference contain 0.

# %%
brief = look(posterior, sampler, **few | {"draws": 60, "seed": 2})["scores"]
reference = good["scores"]
share = covered(brief, reference)
print(f"{share:.1%} of the 95 % intervals contain 0")
ratio = float((brief["mcse"] / reference["mcse"]).median())
print(
    f"noise in the variance: good run {noise_share(reference):.0%}, brief {noise_share(brief):.0%}"
)
more = options["chains"] * options["draws"] / (8 * 60)
print(f"with {more:.1f} times the draws, error bars are {ratio:.1f} times as narrow")

# %% [markdown]
# `shrink` uses the error bars. Towards zero, it pulls each score in by what noise explains of it.
# Towards a classical target, it keeps of the difference what noise does not explain: a *hybrid*,
# and labelled so.

# %%
ekfac = bi.ekfac(task, curvature=curvature, damping=posterior.damping)
candidates = {
    "brief run": brief,
    "brief run, towards 0": bi.shrink(brief),
    "EK-FAC": ekfac,
    "brief run, towards EK-FAC": bi.shrink(brief, ekfac),
}
size = float((reference["influence"] ** 2).mean()) ** 0.5
gain = {}
for name, scores in candidates.items():
    error = float(((scores["influence"] - reference["influence"]) ** 2).mean()) ** 0.5 / size
    gain[name] = {"error": error, "correlation": correlation(scores, reference)}
print("against the good run:", candidates["brief run, towards EK-FAC"].attrs["method"])
pd.DataFrame(gain).T.round(2)

# %% [markdown]
# Both kinds lower the error of a run that is too short, and the hybrid is better than either of its
# parents, here, against a reference that is itself a long run. Where error bars are small
# shrinkage does nothing, and where chains have not converged they are not to be trusted, nor is
# what is built on them.
#
# **What to take along**
#
# | what is wrong | what sees it | what does not |
# |---|---|---|
# | step too large | `DivergenceError` | |
# | step too small, short warm-up, 10 draws | R-hat, effective draws, trend | error bars |
# | small batches | `GradientNoiseWarning` | R-hat, the look of the traces |
# | too hot | mean loss beside that of the checkpoint | R-hat |
# | cold beyond rounding | calibration warns: virial ratio, dimension | R-hat |
# | plain potential, unconverged checkpoint | trend, R-hat, correlation with time | |
# | correlations that need no data | `control=True` | everything else |
#
# One network and one data set showed this; the factors at which things break will differ on yours.
#
# The cell below holds this page to its numbers.

# %%
assert accuracy > 0.9
assert task.dimension == 1210
assert abs(sweep[1]["virial ratio"] - 0.75) < 0.05
assert good["verdict"] == runs["short"]["verdict"] == "the chains show no sign of trouble"
assert not good["warnings"] + runs["short"]["warnings"]
assert with_exact > 0.75
for name in ("10 draws", "step ÷ 1000", "SGLD by hand"):
    assert "ConvergenceWarning" in rows[name]["warning"]
    assert rows[name]["R-hat"] > 1.05
    assert rows[name]["trend"] > 4 * rows["short"]["trend"]
    assert rows[name]["correlation with good"] < rows["short"]["correlation with good"] - 0.15
    assert rows[name]["covered"] < rows["short"]["covered"] - 0.02
assert abs(rows["short"]["covered"] - 0.95) < 0.03
assert "chains diverged" in diverged
assert "chains diverged" in too_noisy
assert [heat[name]["warns"] for name in heat] == [False, True, True, False]
assert 0.05 < heat["100"]["loss rises more by"] < heat["100"]["stated excess"]
assert heat["100, by gradient"]["stated excess"] > 1.3 * heat["100"]["stated excess"]
assert heat["100, step ÷ 4"]["stated excess"] < 0.05
assert abs(heat["100, step ÷ 4"]["loss rises more by"]) < 0.08
assert max(one["R-hat"] for one in heat.values()) < 1.05
assert [factor for factor in factors if sweep[factor]["warnings"]] == [1e14]
assert sweep[0.1]["mean loss"] > 4 * loss_at_w0
assert sweep[0.1]["slope on exact"] > 1.6
assert abs(sweep[1000]["slope on exact"] - 1) < 0.15
assert abs(sweep[1000]["correlation"] - sweep[1000]["if noise alone"]) < 0.06
assert sweep[1e14]["correlation"] < sweep[1000]["correlation"] - 0.1
assert abs(sweep[1e14]["virial ratio"]) > 1000
assert sweep[1e14]["effective dimension"] < 0
assert with_time(drifting).max() < -0.8
assert removed > 0.6
assert helpful > 0.75
assert "ConvergenceWarning" in drifting["warnings"][0]
assert abs(with_time(steady)).max() < 0.5
assert tilted.posterior.damping > 10 * posterior.damping
assert "have not settled" in calibration_says[0]
assert 0.6 < alike < 0.9
assert abs(share - 0.95) < 0.03
assert abs(ratio / more**0.5 - 1) < 0.3
assert gain["brief run, towards 0"]["error"] < gain["brief run"]["error"] - 0.1
assert gain["brief run, towards EK-FAC"]["error"] < min(
    gain["EK-FAC"]["error"], gain["brief run, towards 0"]["error"]
)
