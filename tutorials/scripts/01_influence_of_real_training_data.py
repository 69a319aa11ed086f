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
# # Which training images did that?
#
# A small network reads handwritten digits and gets one wrong. Which of its 1,000 training images
# pushed it there, which held it back, and how sure can one be? This tutorial answers in four steps:
#
# 1. train the network,
# 2. sample networks near it and see whose losses move together (the **Bayesian influence
#    function**, BIF), with an error bar on every number,
# 3. compute the same quantity classically, from the curvature of the loss (exactly, and by
#    **EK-FAC**),
# 4. retrain on hundreds of random halves of the data, and count who predicted the outcome.
#
# You need to know PyTorch; nothing about influence functions is assumed. Everything runs in about a
# minute on one core. Install with `pip install 'bayesinf[plots]' scikit-learn`.

# %%
import matplotlib.pyplot as plt
import numpy as np
import torch
from scipy.stats import t as student
from sklearn.datasets import load_digits
from torch import nn

import bayesinf as bi
from bayesinf.plots import plot_lds

torch.set_num_threads(1)  # for networks this small, more threads only get in each other's way
plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "figure.dpi": 100})
HELPFUL, HARMFUL, INK, GREY = "#1b7837", "#b2182b", "#1f4e79", "0.65"

# %% [markdown]
# ## 1. A network and its mistakes
#
# The digits of scikit-learn are 8 × 8 pixels. We train on 1,000 of them and ask about 200 others,
# the *queries*. `train_one` is an ordinary loop of SGD with momentum and a cosine schedule; a
# network that you trained yourself would do as well. Having it as a recipe pays in step 4,
# where the same training is repeated hundreds of times.

# %%
images, labels = load_digits(return_X_y=True)
x = torch.tensor(images / 16.0, dtype=torch.float32)
y = torch.tensor(labels)
order = np.random.default_rng(0).permutation(len(x))
train = x[order[:1000]], y[order[:1000]]
query = x[order[1000:1200]], y[order[1000:1200]]


def make_model():
    return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


WEIGHT_DECAY = 1e-3
recipe = bi.SGDRecipe(epochs=30, batch_size=50, lr=0.1, momentum=0.9, weight_decay=WEIGHT_DECAY)
model = bi.train_one(make_model, bi.Categorical(), recipe, train=train, seed=0)

with torch.no_grad():
    logits = model(query[0])
query_loss = nn.functional.cross_entropy(logits, query[1], reduction="none")
predicted = logits.argmax(1)
wrong = (predicted != query[1]).nonzero().flatten()
worst = int(query_loss.argmax())
print(f"{len(wrong)} of {len(predicted)} queries are misclassified: {wrong.tolist()}")
print(
    f"the largest loss, {query_loss[worst]:.1f} nats, is that of query {worst}: "
    f"a {query[1][worst]} taken for a {predicted[worst]}"
)

# %% [markdown]
# ## 2. The question, as a number
#
# Give training image $i$ a weight $b_i$ in the loss, $\frac{1}{n}\sum_i b_i\,\ell_i(w)$; ordinary
# training has all $b_i = 1$. The **influence** of image $i$ on query $q$ is how fast the query's
# loss $\varphi_q$ changes as that weight is turned up:
#
# $$\mathrm{influence}[q, i] \;=\; \frac{\partial\, \mathbb{E}[\varphi_q]}{\partial\, b_i}$$
#
# * **Negative is helpful:** more weight on the image lowers the query's loss.
#   **Positive is harmful.**
# * The unit is that of the loss (nats) per whole image. Removing an image means going from
#   $b_i = 1$ to $0$, so it changes the query's loss by about *minus* its influence.
#
# The expectation is over networks near the trained one, $w_0$:
#
# $$p(w) \propto \exp\Big(-n_\beta\,\big[L(w) + \tfrac{\mathrm{wd}}{2}\lVert w\rVert^2\big]
#   - \tfrac{\gamma}{2}\,\lVert w - w_0\rVert^2\Big), \qquad L = \tfrac1n \textstyle\sum_i \ell_i$$
#
# * `n_beta`, $n_\beta$: how much the data count. At $n_\beta = n$ this is a Bayesian posterior;
#   larger is colder, with networks closer to $w_0$.
# * `gamma`, $\gamma$: a spring that ties the networks to $w_0$, so that the answer is about *this*
#   network.
# * `weight_decay`, $\mathrm{wd}$: as in training.
#
# Spring and weight decay enter together, as the **damping**
# $\lambda = \gamma/n_\beta + \mathrm{wd}$: it holds the networks to $w_0$ in all directions of
# weight space in which the loss curves less than $\lambda$.
#
# For this family the derivative is a covariance,
#
# $$\mathrm{influence}[q, i] \;=\; -\frac{n_\beta}{n}\,\mathrm{Cov}(\ell_i, \varphi_q).$$
#
# If the losses of $i$ and $q$ rise and fall together as the network wanders about, training on
# $i$ helps $q$. No derivative of the loss beyond the gradient is needed, only samples.
#
# (By default the posterior is *tilted*: a constant slope is subtracted that makes $w_0$
# the place where the gradient vanishes, even if training stopped before it got there.)

# %%
task = bi.Task(model, bi.Categorical(), train=train, query=query)
damping = 0.1
posterior = bi.LocalPosterior(
    task, n_beta=task.n, gamma=task.n * (damping - WEIGHT_DECAY), weight_decay=WEIGHT_DECAY
)
print(f"{task.dimension} weights, n_beta = {posterior.n_beta}, damping = {posterior.damping:.3f}")

# %% [markdown]
# ## 3. Samples
#
# SGLD is SGD with a small step $\varepsilon$ and noise of variance $\varepsilon$ added to every
# step. On a potential whose largest curvature is $a$ it is unstable beyond $\varepsilon = 4/a$, and
# its variance in that direction is too large by the factor $1/(1 - \varepsilon a/4)$. So we measure
# $a$, by multiplying a vector with the Hessian until it points in the steepest
# direction, and take $\varepsilon = 0.5/a$: at most 14 % too much, and much less in nearly
# all directions.

# %%
potential = posterior.bind()
w0 = potential.center[None]
v = torch.randn(w0.shape, generator=torch.Generator().manual_seed(0))
for _ in range(20):
    v = potential.hvp(w0, v / v.norm())
steepest = float(v.norm())
step = 0.5 / steepest
print(
    f"curvature of the potential {steepest:.0f}, of the mean loss {steepest / task.n - damping:.2f}"
)
print(f"step size {step:.2g}")

# %% [markdown]
# Sixteen chains start at scattered points around $w_0$, forget them during 1,000 steps of
# warm-up, and then keep every 20th network: not its weights, only its loss on each of the
# 1,200 images.

# %%
settings = {"chains": 16, "batch_size": 100, "seed": 0, "progress": False}
traces = bi.sample(posterior, bi.SGLD(step), draws=250, warmup=1000, thin=20, **settings)
print("query losses:", dict(traces.values("query").sizes))

# %% [markdown]
# For contrast, a run that goes wrong in the commonest way: a step 300 times too small. Its
# chains have hardly left their starting points.

# %%
stuck = bi.sample(posterior, bi.SGLD(step / 300), draws=100, warmup=100, thin=4, **settings)

loss_at_w0 = float(task.losses(task.params, train).mean())
colours = plt.get_cmap("viridis")(np.linspace(0, 0.9, 16))
fig, axes = plt.subplots(1, 3, figsize=(11, 3.2), layout="constrained")
for ax, run, title in (
    (axes[0], traces, "Good step"),
    (axes[1], stuck, "Step 300 times too small"),
):
    for chain, colour in zip(run.values("train").mean("train"), colours, strict=True):
        ax.plot(chain, color=colour, linewidth=0.7)
    ax.axhline(loss_at_w0, color=HARMFUL, linestyle="--", linewidth=1)
    ax.set(title=f"{title}: 16 chains", xlabel="draw", ylabel="mean training loss / nats")
    ax.annotate(
        "at $w_0$", (1, loss_at_w0), xycoords=("axes fraction", "data"), ha="right", va="bottom",
        color=HARMFUL, xytext=(0, 2), textcoords="offset points",
    )  # fmt: skip
top = max(ax.get_ylim()[1] for ax in axes[:2])
for ax in axes[:2]:
    ax.set_ylim(0, top)
singles = query_loss.argsort(descending=True)[[0, 4, 20]].tolist()
for q, colour in zip(singles, (HARMFUL, "#e08214", INK), strict=True):
    name = f"query {q}, a {query[1][q]}"
    axes[2].plot(traces.values("query")[0].sel(query=q), color=colour, linewidth=0.9, label=name)
axes[2].set(title="Good step: three queries, one chain", xlabel="draw", ylabel="loss / nats")
axes[2].set_ylim(0, 1.45 * axes[2].get_ylim()[1])
_ = axes[2].legend(frameon=False, loc="upper right", fontsize=8)

# %% [markdown]
# Good chains look like noise about a common level, from which one could not tell the chains apart.
# The level lies above the loss at $w_0$: the networks are drawn from a neighbourhood, not found by
# descent. `diagnose` puts the look into numbers, for every image's loss: **R-hat** compares the
# spread between chains with the spread within them (1 = no difference; up to 1.05 is fine), and the
# **effective draws** say how many independent ones the correlated draws are worth.

# %%
report, stuck_report = (bi.diagnose(run, max_examples=200) for run in (traces, stuck))

fig, ax = plt.subplots(figsize=(7, 3), layout="constrained")
bins = np.geomspace(0.99, 1.1 * float(stuck_report["rhat_train"].max()), 70)
ax.hist(report["rhat_train"], bins=bins, color=INK, label="good step")
ax.hist(stuck_report["rhat_train"], bins=bins, color=GREY, label="step 300 times too small")
ax.axvline(1.05, color=HARMFUL, linestyle="--", linewidth=1, label="1.05")
ax.set(xscale="log", xlabel="R-hat of a training image's loss", ylabel="number of images")
ax.set_xticks(ticks := [1, 1.5, 2, 3, 5], [str(tick) for tick in ticks])
ax.minorticks_off()
ax.set_title("R-hat of 200 training images")
_ = ax.legend(frameon=False)

# %%
print("good step: ", report.attrs["verdict"])
print("tiny step: ", stuck_report.attrs["verdict"].split(";")[0], "…")
print(
    f"good step:  R-hat {float(report['rhat_train'].quantile(0.95)):.3f} (95 % quantile), "
    f""
    f"effective draws {float(report['ess_bulk_train'].quantile(0.05)):.0f} (5 % quantile)"
)

# %% [markdown]
# ## 4. Influence, with error bars
#
# `bif` turns traces into a labelled table, queries × training images. Beside `influence` stands
# `mcse`, the standard error due to the chains being of finite length; an interval is
# influence ± *t* · mcse. (Scores from the tiny step would come with a `ConvergenceWarning`.)

# %%
scores = bi.bif(traces)
t95 = student.ppf(0.975, scores.attrs["mcse_df"])
mine = scores.sel(query=worst)
ranking = mine["influence"].argsort().values
clear = abs(mine["influence"]) > t95 * mine["mcse"]
print(f"95 % interval: influence ± {t95:.2f} · mcse")
print(
    f"query {worst}: {int(clear.sum())} of {task.n} intervals leave out 0; "
    f"{0.05 * task.n:.0f} would if all influences were 0"
)

# %%
K = 7
pictures = images[order].reshape(-1, 8, 8)  # training images first, then queries
fig = plt.figure(figsize=(11, 5.2), layout="constrained")
grid = fig.add_gridspec(4, 1 + K, height_ratios=[1.5, 0.9, 1.5, 0.9])
ax = fig.add_subplot(grid[:, 0])
ax.imshow(pictures[1000 + worst], cmap="gray_r")
ax.set_title(f"query {worst}\na {query[1][worst]}, read as {predicted[worst]}", fontsize=10)
ax.set_axis_off()
bars = (t95 * mine["mcse"]).values
for row, (chosen, word, colour) in enumerate(
    ((ranking[:K], "helpful", HELPFUL), (ranking[::-1][:K], "harmful", HARMFUL))
):
    for column, i in enumerate(chosen):
        ax = fig.add_subplot(grid[2 * row, 1 + column])
        ax.imshow(pictures[i], cmap="gray_r")
        ax.set_title(f"a {train[1][i]}", fontsize=10, color=colour)
        ax.set_axis_off()
    ax = fig.add_subplot(grid[2 * row + 1, 1:])
    ax.bar(np.arange(K), mine["influence"][chosen], yerr=bars[chosen], width=0.5, color=colour,
           alpha=0.6, ecolor="black", capsize=3)  # fmt: skip
    ax.axhline(0, color="black", linewidth=0.8)
    ax.set(xlim=(-0.5, K - 0.5), xticks=[], ylabel="influence\n/ nats")
    ax.set_title(f"the {K} most {word} of {task.n} training images, 95 % intervals", fontsize=10)

# %% [markdown]
# Most of the helpful images have the query's own label, most of the harmful ones the label that it
# was given by mistake. What the bars say, and what they do not:
#
# * They are about the sampling alone: run longer chains and they shrink, as one over the root of
#   the number of draws. A score whose bar crosses zero has no known sign.
# * The extremes of a thousand noisy numbers look more extreme than they are. Trust that these
#   images are far from the middle, less their exact order.
# * They do not say that the *method* is right: that its neighbourhood, its $\lambda$ and a
#   derivative stand for what happens when data are really left out. Only retraining says that.
#
# ## 5. The same number without sampling
#
# The classical influence function replaces the loss by its quadratic approximation at $w_0$, with
# curvature $C$:
#
# $$-\tfrac{1}{n}\; \nabla\varphi_q^{\mathsf T}\,(C + \lambda I)^{-1}\, \nabla\ell_i$$
#
# For 2,410 weights $C$ fits in memory (`gauss_newton`). For large networks it does not, and EK-FAC
# stands in for it, factored layer by layer. Sign, unit and $\lambda$ are those of the BIF, so that
# all three may be compared value by value.

# %%
exact = bi.gauss_newton(task, damping=damping)
ekfac = bi.ekfac(task, fisher="enumerated", damping=damping)

fig, axes = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained", sharex=True, sharey=True)
agreement = {}
for ax, other, name in ((axes[0], exact, "exact curvature"), (axes[1], ekfac, "EK-FAC")):
    pairs = other["influence"].values.ravel(), scores["influence"].values.ravel()
    agreement[name] = np.corrcoef(*pairs)[0, 1], np.polyfit(*pairs, deg=1)[0]
    ax.errorbar(
        other["influence"].sel(query=worst), mine["influence"], yerr=bars, fmt="o", markersize=2.5,
        color=INK, ecolor="0.75", elinewidth=0.7,
    )  # fmt: skip
    ax.axline((0, 0), slope=1, color=HARMFUL, linewidth=1, linestyle="--", label="equal values")
    ax.set(title=f"Query {worst} by {name}", xlabel=f"influence by {name} / nats")
axes[0].set_ylabel("BIF influence / nats, 95 % intervals")
axes[0].legend(frameon=False, loc="upper left")
for name, (correlation, slope) in agreement.items():
    print(f"all pairs, BIF against {name}: correlation {correlation:.2f}, slope {slope:.2f}")

# %% [markdown]
# With exact curvature the points lie about the line: what scatter there is comes mostly from the
# chains' finite length, and a part is real, as at $n_\beta = n$ the networks go far enough from
# $w_0$ to feel more of the loss than its curvature there. EK-FAC orders the images much
# alike, but at this $\lambda$ its values are about twice as large: the price of its factors.
# Which is nearest to the truth?
#
# ## 6. The judge: retraining
#
# Draw 100 random halves of the training set and train on each with four seeds, 400 networks in all.
# Each method predicts a query's loss on a half by the sum of the influences of the images that were
# kept. The **linear datamodelling score** (LDS) of a query is the rank correlation, over halves,
# of prediction and outcome; a method's LDS is the mean over queries. It is 1 for a perfect ranking,
# 0 for guessing.
#
# It cannot reach 1 here even for an oracle: trained on the same half with another seed, the
# network ends elsewhere, and its loss moves by an amount that no score of the data can foresee.
# How well the seeds agree with each other gives the **noise ceiling**.

# %%
outcome = {"train": train, "query": query}
halves = bi.random_subsets(task.n, fraction=0.5, count=100, seed=1)
bank = bi.retrain(
    make_model, bi.Categorical(), recipe, **outcome, subsets=halves, seeds=range(100, 104)
)
print("losses after retraining:", dict(bank["loss"].sizes))

# %% [markdown]
# $\lambda$ is a choice, and each method may have its own best one. For the classical methods, where
# another value costs little, we try two more, on *another* 40 halves: a setting chosen on the
# halves that judge it would be flattered. The BIF keeps its $\lambda$; a smaller one leaves flatter
# directions to explore, and the steps needed grow as $1/\lambda$.

# %%
other_halves = bi.random_subsets(task.n, fraction=0.5, count=40, seed=2)
tuning = bi.retrain(
    make_model, bi.Categorical(), recipe, **outcome, subsets=other_halves, seeds=range(200, 204)
)
methods = {
    f"BIF, λ = {damping}": scores,
    f"exact curvature, λ = {damping}": exact,
    f"EK-FAC, λ = {damping}": ekfac,
}
classical = {
    "exact curvature": {v: bi.gauss_newton(task, damping=v) for v in (0.01, WEIGHT_DECAY)},
    "EK-FAC": {v: bi.ekfac(task, fisher="enumerated", damping=v) for v in (0.01, WEIGHT_DECAY)},
}
for name, candidates in classical.items():
    candidates[damping] = methods[f"{name}, λ = {damping}"]
    tuned = {value: float(bi.lds(own, tuning)["lds"]) for value, own in candidates.items()}
    best = max(tuned, key=tuned.get)
    print(f"{name}, LDS on the other halves:", {v: round(r, 2) for v, r in tuned.items()})
    methods[f"{name}, λ = {best} (tuned)"] = candidates[best]
methods["gradient dot product"] = bi.grad_dot(task)

table = bi.lds_table(methods, bank)
table[["lds", "lower", "upper", "relative"]].to_dataframe().round(2)

# %%
kept = bank["subset_mask"].values.astype(float)
forecast = kept @ mine["influence"].values
truth = bank["loss"].sel(query=worst)
fig, axes = plt.subplots(1, 2, figsize=(11, 3.4), layout="constrained", width_ratios=(1, 1.5))
axes[0].errorbar(
    forecast, truth.mean("seed"), yerr=truth.std("seed", ddof=1) / truth.sizes["seed"] ** 0.5,
    fmt="o", markersize=3, color=INK, ecolor="0.75", elinewidth=0.8,
)  # fmt: skip
one = float(bi.lds(scores, bank)["lds_query"].sel(query=worst))
axes[0].set(
    title=f"BIF, query {worst}: rank correlation {one:.2f}",
    xlabel="sum of the influences of the half / nats",
    ylabel="loss when retrained on it / nats\n(mean of four seeds ± s.e.)",
)
plot_lds(table, ax=axes[1], order="table")
axes[1].set(title="Mean over 200 queries; dashed: noise ceiling", xlim=(-0.02, 1.02))
axes[1].get_legend().remove()

# %% [markdown]
# The intervals are for the mean over halves and queries, but all methods were judged on the same
# ones, and hard queries are hard for all. To compare two methods, look at the interval of their
# paired difference:

# %%
names = list(methods)
differences = []
for rival in (names[1], names[2], names[4]):
    differences.append(bi.lds_difference(scores, methods[rival], bank))
    low, middle, high = (float(differences[-1][key]) for key in ("lower", "difference", "upper"))
    print(f"BIF minus {rival}: {middle:+.3f} [{low:+.3f}, {high:+.3f}]")
print(f"noise ceiling: {float(table['ceiling']):.2f}")

# %% [markdown]
# Two lessons. At equal $\lambda$, sampling does what exact curvature does, here a little better,
# and EK-FAC pays for its factors. But the choice of $\lambda$ weighs as much as the choice of
# method: at a smaller one EK-FAC overtakes both, at next to no cost, and exact curvature, where one
# can afford it, is best. None is near the ceiling: a sum of slopes at one network is not all there
# is to training on half of the data. And the ordering is that of this task; on yours, run the
# judge.
#
# **When not to believe a score**
#
# * Its interval contains 0, or it is one of the top few of very many.
# * `diagnose` finds fault with the chains: then neither the score nor its error bar means much.
# * The method has a low LDS on your task, or you have not measured it and the decision matters.
# * It changes much with $\lambda$ or $n_\beta$: those are part of the question that you asked.
# * You want to remove many examples at once: influences are slopes, and slopes add up only for
#   small changes.
#
# The cell below holds this page to its numbers.

# %%
assert 0 < len(wrong) <= 20
assert report.attrs["ok"]
assert float(report["rhat_train"].quantile(0.95)) < 1.04
assert not stuck_report.attrs["ok"]
assert float(stuck_report["rhat_train"].median()) > 1.5
assert float(traces.values("train").mean()) > 1.1 * loss_at_w0
assert int(clear.sum()) > 150
assert (train[1][ranking[:K].copy()] == query[1][worst]).sum() >= 4
assert (train[1][ranking[::-1][:K].copy()] == predicted[worst]).sum() >= 3
assert agreement["exact curvature"][0] > 0.85
assert 0.9 < agreement["exact curvature"][1] < 1.4
assert 0.3 < agreement["EK-FAC"][1] < 0.8
judged = table["lds"].values
assert 0.45 < judged[0] < 0.65
assert abs(float(differences[0]["difference"])) < 0.1
assert float(differences[1]["lower"]) > 0 > float(differences[2]["upper"])
assert judged.argmax() == 3
assert judged.argmin() == 5
assert float(table["upper"].max()) < float(table["ceiling"]) < 1
