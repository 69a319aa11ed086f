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
# # Can I believe this score?
#
# A method that says which training data mattered is judged by retraining: it predicts what happens
# without some of the data, and the **linear datamodelling score** (LDS) says how well it ranked the
# outcomes. Papers print it with two digits. But the LDS is a measurement, with noise, an instrument
# and a scale of its own. This tutorial takes the *same scores* and shows what moves their LDS:
#
# 1. a **score** and its judge,
# 2. seeds per subset: the **noise ceiling**,
# 3. an **interval** that holds, and one that does not,
# 4. what **chance** reaches,
# 5. the size of the subsets: the **α-curve**,
# 6. two methods: **paired differences**,
# 7. two runs of one method: **seeds and ensembles**,
# 8. why the LDS of **two papers** cannot be compared, and
# 9. what to **report**.
#
# You need to know what an influence is (tutorial 01 says) and what a standard error is. About 3,400
# small networks are trained here, in less than a minute on one core. Install with
# `pip install 'bayesinf[plots]' scikit-learn`.

# %%
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from scipy.stats import t as student
from sklearn.datasets import load_digits
from torch import nn

import bayesinf as bi

torch.set_num_threads(1)  # for networks this small, more threads only get in each other's way
plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "figure.dpi": 100})
INK, ORANGE, GREEN, GREY = "#1f4e79", "#d95f02", "#1b7837", "0.6"

# %% [markdown]
# ## 1. A score and its judge
#
# 300 of scikit-learn's digits train a network of 16 hidden units; 500 others are the queries. What
# is attributed is each query's **margin** $\log\frac{p}{1-p}$, $p$ being the probability of the
# right label. The scores under judgement are those of EK-FAC: estimates of
#
# $$\mathrm{influence}[q, i] \;=\; \frac{\partial\, \varphi_q}{\partial\, b_i},$$
#
# how fast the margin $\varphi_q$ grows with the weight $b_i$ of training image $i$.

# %%
images, labels = load_digits(return_X_y=True)
order = np.random.default_rng(0).permutation(len(images))
x = torch.tensor(images[order] / 16.0, dtype=torch.float32)
y = torch.tensor(labels[order])
train, query = (x[:300], y[:300]), (x[300:800], y[300:800])


def make_model():
    return nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))


DAMPING, WEIGHT_DECAY = 0.01, 1e-3
recipe = bi.SGDRecipe(epochs=30, batch_size=50, lr=0.1, momentum=0.9, weight_decay=WEIGHT_DECAY)


def network(seed):
    model = bi.train_one(make_model, bi.Categorical(), recipe, train=train, seed=seed)
    return bi.Task(model, bi.Categorical(), train=train, query=query)


def ekfac(task):
    return bi.ekfac(task, fisher="enumerated", damping=DAMPING, measurement="margin")


task = network(seed=0)
scores = ekfac(task)
with torch.no_grad():
    accuracy = (task.module(query[0]).argmax(1) == query[1]).double().mean()
print(f"{task.dimension:,} weights, {accuracy:.0%} of the queries are read correctly")

# %% [markdown]
# The judge: train on 100 random halves of the data, 8 times each with another seed, and keep the
# queries' margins. Such a table of outcomes is a *bank*. For each query, the scores predict the
# outcome of a half by the sum of the influences of what it kept; predictions and outcomes are
# rank-correlated over halves, and the mean over queries is the LDS.


# %%
def make_bank(subsets, seeds):
    return bi.retrain(
        make_model, bi.Categorical(), recipe, train=train, query=query, subsets=subsets, seeds=seeds
    )


MARGIN = {"measurement": "margin"}
halves = make_bank(bi.random_subsets(task.n, fraction=0.5, count=100, seed=1), range(100, 108))
cheap = bi.lds(scores, halves.isel(seed=[0]), **MARGIN)
dear = bi.lds(scores, halves, **MARGIN)
print(f"outcomes: {dict(halves['margin'].sizes)}")
print(f"judged by 1 network for each half:  LDS {float(cheap['lds']):.2f}")
print(f"judged by 8 networks for each half: LDS {float(dear['lds']):.2f}")

# %% [markdown]
# The same scores, the same halves, the same queries. Which of the two numbers is *the* LDS?
#
# ## 2. How much of the gap to 1 is noise of the judge: the ceiling
#
# Neither, for lack of a scale. A network trained again on the same half ends elsewhere, and no
# score of the data can foresee where. Even the true mean outcome of each half would not reach 1
# against the mean of $R$ noisy runs; what it would reach is the **noise ceiling**.
# `noise_ceiling` finds it from how well one half of the seeds agrees with the other, and
# extrapolates to any number of seeds.

# %%
rows = {}
for r in (1, 2, 4, 8):
    groups = [halves.isel(seed=slice(k, k + r)) for k in range(0, 8, r)]
    rows[r] = {
        "LDS": np.mean([float(bi.lds(scores, group, **MARGIN)["lds"]) for group in groups]),
        "ceiling": float(bi.noise_ceiling(halves, "margin", seeds=r)["ceiling"]),
    }
by_seeds = pd.DataFrame(rows).T.rename_axis("seeds per half")
by_seeds["LDS / ceiling"] = by_seeds["LDS"] / by_seeds["ceiling"]

fig, ax = plt.subplots(figsize=(5.5, 3.2), layout="constrained")
for name, colour in (("ceiling", ORANGE), ("LDS / ceiling", GREEN), ("LDS", INK)):
    ax.plot(by_seeds.index, by_seeds[name], "o-", color=colour, label=name)
ax.set(xscale="log", ylim=(0, 1.02), xlabel="networks trained on each half", title="EK-FAC")
ax.set_xticks(by_seeds.index, [str(r) for r in by_seeds.index])
ax.minorticks_off()
ax.legend(frameon=False, loc="lower right")
by_seeds.round(3)

# %% [markdown]
# From one seed to eight the LDS grows by almost a third. The ceiling grows as much, and **LDS /
# ceiling stays**, within 3 %. Of the gap between the LDS of a single seed and 1, half is nothing
# but noise of the judge. LDS / ceiling is what to compare where the seeds differ; `lds_table` has
# it as `relative`.
#
# It has limits. A ceiling near 0 makes it a ratio of two noisy numbers. And it takes the noise of
# the seeds to be roughly Gaussian, which that of the *loss* is not: it has a long tail, so that the
# mean of several runs is ruled by the worst of them, and is another thing to predict than a single
# run.

# %%
by_loss = {}
loss_scores = bi.ekfac(task, fisher="enumerated", damping=DAMPING)
for r in (1, 8):
    groups = [halves.isel(seed=slice(k, k + r)) for k in range(0, 8, r)]
    value = np.mean([float(bi.lds(loss_scores, group)["lds"]) for group in groups])
    by_loss[r] = value, value / float(bi.noise_ceiling(halves, seeds=r)["ceiling"])
for r, (value, relative) in by_loss.items():
    print(
        f"{r} seeds: by margin LDS {by_seeds['LDS'][r]:.3f}, LDS / ceiling "
        f"{by_seeds['LDS / ceiling'][r]:.2f};  by loss {value:.3f} and {relative:.2f}"
    )

# %% [markdown]
# With one seed, margin and loss give the same LDS, as one is a monotone function of the other and
# only ranks count. With eight they part, and LDS / ceiling by loss has moved by a tenth. So *what
# was measured* belongs to an LDS, too.
#
# ## 3. How sure: an interval that holds
#
# The usual error bar is the spread over queries: the standard deviation of the queries' rank
# correlations over $\sqrt{Q}$, or a bootstrap that draws queries, which comes to the same. It takes
# the queries to be independent. They are not: **all queries are judged on the same halves**, and a
# half that is lucky for one query is so for others that depend on the same training images.
#
# That can be tried. Train on 1,000 fresh halves, one network each, and cut them into 25 separate
# evaluations of 40 halves: 25 laboratories that judge the same scores on the same queries. How far
# are their results apart, and what does each say of its own error? `lds` leaves out one half at a
# time for *all* queries (a jackknife). `queries="fixed"` says that we ask about these 500
# alone; the default, `"random"`, adds their spread, for an interval about all queries of that kind.

# %%
many = make_bank(bi.random_subsets(task.n, fraction=0.5, count=1000, seed=2), [200])
results = []
for queries in (20, 100, 500):
    for k in range(25):
        part = many.isel(subset=slice(40 * k, 40 * k + 40))
        found = bi.lds(scores.isel(query=slice(queries)), part, queries="fixed", **MARGIN)
        naive = float(found["lds_query"].std(ddof=1)) / queries**0.5
        results.append(
            {
                "queries": queries,
                "lds": float(found["lds"]),
                "naive error": naive,
                "naive reach": student.ppf(0.975, queries - 1) * naive,
                "error": float(found["standard_error"]),
                "reach": float(found["upper"] - found["lds"]),
            }
        )
results = pd.DataFrame(results)
by_queries = results.groupby("queries")
errors = by_queries[["naive error", "error"]].mean()
errors["real scatter of 25"] = by_queries["lds"].std()
labs = results[results["queries"] == 500].reset_index(drop=True)
target = labs["lds"].mean()
missed = {kind: abs(labs["lds"] - target) > labs[kind] for kind in ("naive reach", "reach")}

fig, axes = plt.subplots(1, 2, figsize=(11, 3.4), layout="constrained", sharey=True)
for ax, (kind, out), name in zip(
    axes, missed.items(), ("spread over queries", "jackknife over halves"), strict=True
):
    for k, lab in labs.iterrows():
        ax.errorbar(k, lab["lds"], yerr=lab[kind], fmt="o", markersize=3,
                    color=ORANGE if out[k] else INK)  # fmt: skip
    ax.axhline(target, color=GREY, linewidth=1, linestyle="--")
    ax.set(title=f"{name}: {out.sum()} of 25 miss", xlabel="laboratory", xticks=[])
axes[0].set_ylabel("LDS, 95 % interval")
errors.round(4)

# %% [markdown]
# The dashed line is the mean of all 25, on 1,000 halves; intervals that miss it are orange. The
# naive error shrinks as $1/\sqrt{Q}$, and with 500 queries it is about three times too small. The
# real scatter falls little beyond 100 queries, and the jackknife knows. From some number on, **more
# queries add nothing**, only more halves do. About where, the bank tells without any scores:

# %%
worth = bi.effective_queries(halves, "margin")
print(
    f"{worth.attrs['of_queries']} queries are worth {float(worth['effective_queries']):.0f} "
    f"independent ones [{float(worth['lower']):.0f}, {float(worth['upper']):.0f}]"
)

# %% [markdown]
# ## 4. What chance reaches
#
# Scores that know nothing have LDS 0 *on average*. How far from 0 a single evaluation may land
# depends, again, on what queries share. Two kinds of noise: a fresh random number for each pair of
# query and training image; and one random number for each image, the same for all queries, like
# a method that ranks images by how odd they are, whatever the question. 60 draws of each:

# %%
few = slice(200)  # queries
few_halves = halves.isel(query=few)
rng = np.random.default_rng(0)


def random_scores(rows):
    matrix = np.broadcast_to(rng.normal(size=(rows, task.n)), (200, task.n))
    return bi.scores.from_array(
        matrix, query=None, train=None, sign="helpful", measurement="margin", method="random"
    )


chance, nulls = {}, {}
for name, rows in (("a number for each pair", 200), ("a number for each image", 1)):
    drawn = [random_scores(rows) for _ in range(60)]
    of_query = np.array([bi.lds(one, few_halves, **MARGIN)["lds_query"].values for one in drawn])
    chance[name] = pd.DataFrame(
        {"lds": of_query.mean(1), "naive error": of_query.std(1, ddof=1) / 200**0.5}
    )
    nulls[name] = bi.lds_null(drawn[0], few_halves, permutations=300, **MARGIN)
naive_wrong = {
    name: (abs(own["lds"]) > student.ppf(0.975, 199) * own["naive error"]).mean()
    for name, own in chance.items()
}

fig, axes = plt.subplots(1, 2, figsize=(11, 2.8), layout="constrained", sharex=True)
for ax, (name, own) in zip(axes, chance.items(), strict=True):
    null = nulls[name].squeeze()
    ax.axvspan(float(null["null_lower"]), float(null["null_upper"]), color="0.92",
               label="95 % of permutations")  # fmt: skip
    ax.hist(own["lds"], bins=np.linspace(-0.06, 0.06, 25), color=INK)
    ax.set(title=name, xlabel="LDS of random scores")
axes[0].legend(frameon=False, loc="upper left")
for name in chance:
    print(
        f"{name}: standard deviation {chance[name]['lds'].std():.3f}, by permutations "
        f"{nulls[name]['null_sd'].item():.3f}; the spread over queries calls "
        f"{naive_wrong[name]:.0%} significant"
    )

# %% [markdown]
# Where all queries share their numbers, luck reaches about twice as far, and the naive interval
# declares a third of pure noise significant. `lds_null` gives the scores' values to other training
# images, for all queries alike, and so keeps what they share. Ask it before you believe a small
# LDS:

# %%
real = bi.lds_null(scores.isel(query=few), few_halves, permutations=300, **MARGIN).squeeze()
print(
    f"EK-FAC: LDS {float(real['lds']):.2f}; by chance 0 ± {float(real['null_sd']):.3f}; "
    f"p {'<' if real['p_value'] < 0.01 else '='} {max(float(real['p_value']), 0.01):.2f}"
)

# %% [markdown]
# ## 5. Halves, or all but a few: the α-curve
#
# Halves are a convention. Others leave out one percent. Let $\alpha$ be the share that is kept, and
# judge the same scores, by 4 seeds each, at five values of it. Beside EK-FAC: the exact
# Gauss–Newton curvature, the dot product of gradients, and a Bayesian influence function (BIF) of
# 1,000 draws from the Gaussian that EK-FAC believes in, so cold that the network is almost linear
# in it: with many more draws it would be EK-FAC, or nearly.

# %%
curvature = bi.fit_curvature(task, fisher="enumerated")
N_BETA = 1e5
posterior = bi.LocalPosterior(
    task, n_beta=N_BETA, gamma=N_BETA * (DAMPING - WEIGHT_DECAY), weight_decay=WEIGHT_DECAY
)


def sampled(seed):
    traces = bi.sample(
        posterior, bi.EKFACLaplace(curvature), chains=4, draws=250, warmup=0, seed=seed,
        measurements=("loss", "margin"), progress=False,
    )  # fmt: skip
    return bi.bif(traces, measurement="margin", replicates=True)


methods = {
    "exact curvature": bi.gauss_newton(task, damping=DAMPING, measurement="margin"),
    "EK-FAC": scores,
    "BIF, 1,000 draws": sampled(0),
    "GradDot": bi.grad_dot(task, measurement="margin"),
}
banks = [
    make_bank(bi.random_subsets(task.n, fraction=f, count=100, seed=3), range(300, 304))
    for f in (0.1, 0.75, 0.9, 0.97)
]
curve = bi.alpha_curve(methods, [*banks, halves.isel(seed=slice(4))], **MARGIN)

colours = dict(zip(methods, (GREEN, INK, "#7570b3", GREY), strict=True))
fig, axes = plt.subplots(1, 2, figsize=(11, 3.4), layout="constrained", sharey=True)
for name in methods:
    own = curve.sel(scorer=name)
    bars = abs(own[["lower", "upper"]].to_array() - own["lds"])
    axes[0].errorbar(own["fraction"], own["lds"], yerr=bars, fmt="o-", markersize=3, capsize=2,
                     color=colours[name], label=name)  # fmt: skip
    axes[1].plot(own["fraction"], own["relative"], "o-", markersize=3, color=colours[name])
axes[0].plot(curve["fraction"], curve["ceiling"], color=ORANGE, linestyle="--", label="ceiling")
axes[0].set(title="LDS", xlabel="α, share of the data that is kept", ylim=(0, 1.02))
axes[1].set(title="LDS / ceiling", xlabel="α, share of the data that is kept")
axes[0].legend(frameon=False, fontsize=8, loc="lower left", ncols=2)
curve["lds"].to_pandas().assign(ceiling=curve["ceiling"].values).round(2)

# %% [markdown]
# Subsets that keep nearly everything resemble one another: the signal shrinks, the noise of the
# seeds stays, and the ceiling falls below one half. An LDS of 0.30 at α = 0.97, that of the exact
# curvature, is closer to its ceiling than EK-FAC's 0.52 at α = 0.5.
#
# Dividing by the ceiling takes the noise out. What remains depends on α all the same, and should:
# **α is part of the question**. Influences are slopes at one network, and the smaller the change,
# the more a slope is worth: for the exact curvature, LDS / ceiling rises up to α = 0.9 (why it is
# lower at the last point, these numbers do not tell). At α = 0.1 the networks are of another kind,
# trained on 30 images and, at equal epochs, for a fraction of the steps; there even the order of
# the methods is another.
#
# ## 6. Two methods: look at the difference
#
# Do two intervals overlap? That is the wrong question. The methods were judged on the same halves
# and queries, and what is hard for one is hard for the other; in the difference it cancels.
# `lds_difference` leaves out halves for both at once.

# %%
table = bi.lds_table(methods, halves, **MARGIN)
rivals = {
    name: bi.lds_difference(own, scores, halves, **MARGIN)
    for name, own in methods.items()
    if name != "EK-FAC"
}

fig, axes = plt.subplots(1, 2, figsize=(11, 2.6), layout="constrained")
for place, name in enumerate(reversed(methods)):
    own = table.sel(scorer=name)
    axes[0].errorbar(own["lds"], place, xerr=own["upper"] - own["lds"], fmt="o", capsize=3,
                     color=INK)  # fmt: skip
    if name in rivals:
        own = rivals[name]
        axes[1].errorbar(own["difference"], place, xerr=own["upper"] - own["difference"], fmt="o",
                         capsize=3, color=INK)  # fmt: skip
axes[0].set_yticks(range(4), reversed(methods))
axes[0].set(xlabel="LDS, 95 % interval", ylim=(-0.5, 3.5))
axes[1].set_yticks([0, 1, 3], ["", "", ""])
axes[1].axvline(0, color=GREY, linewidth=0.8)
axes[1].set(xlabel="LDS minus that of EK-FAC, 95 % interval", ylim=axes[0].get_ylim())
for name, own in rivals.items():
    low, middle, high = (float(own[key]) for key in ("lower", "difference", "upper"))
    print(f"{name} minus EK-FAC: {middle:+.3f} [{low:+.3f}, {high:+.3f}]")

# %% [markdown]
# The intervals of EK-FAC and the BIF overlap by half of their lengths; yet the BIF is behind, far
# beyond the error of the difference. Why, if with many draws it would be EK-FAC? Because a thousand
# are not many. The BIF carries replicates of itself, and from them `lds` tells how reliable its
# predictions are, and by which factor (`attenuation`) their Monte-Carlo noise lowers the LDS:

# %%
sample = table.sel(scorer="BIF, 1,000 draws")
without_noise = float(sample["lds"] / sample["attenuation"])
ekfac_lds = float(table["lds"].sel(scorer="EK-FAC"))
print(
    f"reliability {float(sample['reliability']):.2f}: LDS {float(sample['lds']):.3f} is "
    f"{float(sample['attenuation']):.3f} × {without_noise:.3f}; EK-FAC has {ekfac_lds:.3f}"
)

# %% [markdown]
# So the difference was real, and said little about the *method*: most of it is the noise of this
# run.
#
# ## 7. Two runs of one method
#
# Every score has a seed: of the sampler, or of the network that was attributed. Ten networks of the
# same recipe, scored by EK-FAC; and two runs of the sampler at one network:

# %%
runs = [scores, *(ekfac(network(seed)) for seed in range(1, 10))]
stability = bi.seed_stability(
    {
        "EK-FAC, another network": runs,
        "BIF, another sampler seed": [methods["BIF, 1,000 draws"], sampled(1)],
    }
)
singles = [float(bi.lds(one, halves, **MARGIN)["lds"]) for one in runs]
print(f"LDS of ten networks: {min(singles):.3f} to {max(singles):.3f}")
names = {"correlation": "rank correlation", "overlap": "shared of the lowest 10"}
stability[list(names)].to_dataframe().rename(columns=names)[list(names.values())].round(2)

# %% [markdown]
# A query's ranking of all 300 images changes a good deal from run to run (of the ten images that
# lower its margin most, more than half remain), while the LDS hardly moves: it looks at sums over
# 150 images, in which noise averages out. **An LDS says little about a single score.** Two runs
# whose rankings correlate by $r$ can agree with no truth by more than about $\sqrt r$.
#
# What is particular to one network is noise to the judge, who trains others. The mean of the scores
# of several networks has less of it:


# %%
def ensemble(members):
    mean = sum(one["influence"] for one in members) / len(members)
    joint = members[0].assign(influence=mean)
    return joint.assign_attrs(checkpoints=len(members))


sizes = {1: singles}
for k in (2, 5, 10):
    groups = [ensemble(runs[i : i + k]) for i in range(0, 10, k)]
    sizes[k] = [float(bi.lds(group, halves, **MARGIN)["lds"]) for group in groups]

fig, ax = plt.subplots(figsize=(5.5, 3), layout="constrained")
for k, values in sizes.items():
    ax.plot([k] * len(values), values, "o", color=GREY, markersize=4)
ax.plot(list(sizes), [np.mean(values) for values in sizes.values()], "o-", color=INK)
ax.set(xscale="log", xlabel="networks averaged in the scores", ylabel="LDS", title="EK-FAC")
ax.set_xticks(list(sizes), [str(k) for k in sizes])
ax.minorticks_off()

# %% [markdown]
# Each grey point is an ensemble, or a single network; the ensemble of all ten is above every single
# one. It is another product at another price. Comparing one method's ensemble with another's single
# network is no comparison of methods, and the tables refuse it:

# %%
try:
    bi.lds_table({"mine": ensemble(runs), "theirs": methods["GradDot"]}, halves, **MARGIN)
except ValueError as error:
    refusal = str(error)
print(refusal)

# %% [markdown]
# ## 8. Two papers
#
# Paper A judges an ensemble of ten networks by halves and 8 seeds. Paper B judges a single network
# by subsets without 3 % of the data, retrained once. Both use EK-FAC on this very task.

# %%
last = banks[-1]
papers = pd.DataFrame(
    {
        "A": {
            "LDS": sizes[10][0],
            "ceiling": float(bi.noise_ceiling(halves, "margin")["ceiling"]),
        },
        "B": {
            "LDS": float(bi.lds(scores, last.isel(seed=[0]), **MARGIN)["lds"]),
            "ceiling": float(bi.noise_ceiling(last, "margin", seeds=1)["ceiling"]),
        },
    }
).T
papers["LDS / ceiling"] = papers["LDS"] / papers["ceiling"]
papers.round(2)

# %% [markdown]
# A factor of four, with the same method, code and data, and nearly all of it is the ceiling. Paper
# B could not have known: a ceiling takes two seeds, and here comes from all four of that bank.
# (That the ratios come out this close is luck: an ensemble raises one, α changes the other.)
#
# ## 9. What to report
#
# * **The question**: what was measured (margin, loss), α, how subsets were drawn, how many queries
#   and which, Spearman or Pearson.
# * **The judge**: number of subsets and of seeds for each; the **ceiling**, and LDS / ceiling. Two
#   seeds are the least; beyond a few, spend on more subsets.
# * **The interval**, with what is random in it: subsets, queries or both. Never queries alone.
# * **Chance**: for a small LDS, the null of *these* scores.
# * **Between methods**: paired differences on the same subsets, the same number of networks, and
#   settings chosen on other subsets than those that judge (tutorial 01).
# * **The scores' own noise**: seed stability, Monte-Carlo error, reliability.
# * **The cost**: seconds and passes stand in the same table.
#
# And from other people's papers: take orders of methods within one table, not numbers across
# tables.
#
# The cell below holds this page to its numbers.

# %%
relative = by_seeds["LDS / ceiling"]
assert 1.2 < by_seeds["LDS"][8] / by_seeds["LDS"][1] < 1.4
assert relative.max() / relative.min() < 1.05
assert 0.4 < (1 - by_seeds["ceiling"][1]) / (1 - by_seeds["LDS"][1]) < 0.6
assert abs(by_loss[1][0] - by_seeds["LDS"][1]) < 0.005
assert by_loss[8][0] < by_seeds["LDS"][8] - 0.005
assert by_loss[8][1] < 0.95 * by_loss[1][1]
assert missed["naive reach"].sum() >= 8 > 3 >= missed["reach"].sum()
assert 2 < errors["real scatter of 25"][500] / errors["naive error"][500] < 4
assert 0.7 < errors["error"][500] / errors["real scatter of 25"][500] < 1.5
assert float(worth["upper"]) < 50
assert naive_wrong["a number for each image"] > 0.2 > naive_wrong["a number for each pair"]
assert (
    chance["a number for each image"]["lds"].std()
    > 1.3 * chance["a number for each pair"]["lds"].std()
)
assert float(real["p_value"]) < 0.01
assert float(curve["ceiling"].sel(fraction=0.97)) < 0.5 < float(curve["ceiling"].sel(fraction=0.5))
assert curve["lds"].sel(fraction=0.1).values.argmax() == 1
assert (curve["lds"].sel(fraction=[0.5, 0.75, 0.9, 0.97]).argmax("scorer") == 0).all()
steep = curve["relative"].sel(scorer="exact curvature").values
assert min(steep[2:4]) > steep[1] > steep[0]
assert steep[4] > float(curve["relative"].sel(scorer="EK-FAC", fraction=0.5))
assert float(rivals["BIF, 1,000 draws"]["upper"]) < 0 < float(rivals["exact curvature"]["lower"])
assert float(sample["upper"]) > ekfac_lds
assert abs(without_noise - ekfac_lds) < 0.5 * abs(float(sample["lds"]) - ekfac_lds)
assert (stability["correlation"] < 0.75).all()
assert (stability["overlap"] > 0.5).all()
assert max(singles) - min(singles) < 0.1
assert sizes[10][0] > max(singles)
assert "never compared" in refusal
assert 3 < papers["LDS"]["A"] / papers["LDS"]["B"] < 5
assert 0.8 < papers["LDS / ceiling"]["A"] / papers["LDS / ceiling"]["B"] < 1.25
