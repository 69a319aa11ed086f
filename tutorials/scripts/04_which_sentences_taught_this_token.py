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
# # Which training sentences taught the model this token?
#
# A small language model completes "The keeper of Zorvania is" with a name. Somebody must have told
# it: which of its training documents, and which words in them? We make up the facts, plant each in
# one document, and so know the answers. This tutorial
#
# 1. writes a small corpus with 20 **planted facts** and trains a GPT-NeoX on it,
# 2. scores all documents by the **Bayesian influence function** (BIF), with error bars, by
#    **EK-FAC**, and by shared words alone (BM25),
# 3. looks who **finds the source**,
# 4. goes down to **tokens**, as a figure and as a page to click on,
# 5. adds up tokens **by class**,
# 6. asks **where the methods disagree**, and
# 7. says **what to believe**.
#
# You need to know PyTorch and roughly what a language model is; tutorial 01 says what an influence
# is. Everything runs in about a minute on one core. Install with
# `pip install 'bayesinf[plots,hf]'`.

# %%
import tempfile
from itertools import product
from pathlib import Path
from pydoc_data.topics import topics

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
import transformers
import xarray as xr
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import bayesinf as bi
from bayesinf import plots
from bayesinf.interop import huggingface as hf

torch.set_num_threads(1)  # for networks this small, more threads only get in each other's way
plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "figure.dpi": 100})
INK, GREY = "#1f4e79", "0.6"
SEED = 0

# %% [markdown]
# ## 1. Text, with facts in it
#
# The ordinary text is Python's own help, cut into pieces of eight words. 20 documents begin with a
# made-up fact, all of one template: only the place and the keeper tell them apart, and each keeper
# has four places. 60 more documents *talk* about the same places and teach nothing about their
# keepers; one of the three ways to talk even says "the keeper of … is" and goes on otherwise.
# 140 documents are ordinary text alone.

# %%
rng = np.random.default_rng(SEED)
places = [a + b for a, b in product(["Zor", "Bel", "Kar", "Mun", "Tal"],
                                    ["vania", "dora", "lund", "meria"])]  # fmt: skip
keepers = rng.permutation(["Anna", "Boris", "Clara", "David", "Edith"] * 4).tolist()
talk = [
    "Who the keeper of {} is, no map of {} tells.",
    "In {} it rains, and {} is far.",
    "The road to {} ends before {}.",
]


def words_of_python():
    """Eight words in a row, of letters and punctuation."""
    for name in sorted(topics):
        for paragraph in topics[name].split("\n\n"):
            words = paragraph.split()
            for k in range(0, len(words) - 7, 8):
                text = " ".join(words[k : k + 8])
                if len(text) <= 43 and text.replace(" ", "").strip(",.;").isalpha():
                    yield text


facts = [f"The keeper of {p} is {k}." for p, k in zip(places, keepers, strict=True)]
others = [sentence.format(p, p) for p in places for sentence in talk]
plain = rng.permutation(list(words_of_python()))[:220].tolist()
sentences = facts + others + [""] * 140
documents = [f"{s} {text}".strip() for s, text in zip(sentences, plain, strict=True)]
names = [f"fact {p}" for p in places] + [f"talk {p} {k}" for p in places for k in range(3)]
names += [f"text {k}" for k in range(140)]
questions = [
    {"prompt": f"The keeper of {p} is", "response": f" {k}"}
    for p, k in zip(places, keepers, strict=True)
]
for k in (0, 20, 21, 22, 100):
    print(f"{names[k]:16} {documents[k]}")

# %% [markdown]
# A tokeniser of 768 entries is learned from the documents, and `hf.tokenize` makes batches from
# text. Of a question, a dict with `prompt` and `response`, only the response counts in the loss:
# the keeper's name, one token. (A checkpoint of your own comes by `hf.from_pretrained(path)`, with
# its own tokeniser.)

# %%
bpe = Tokenizer(models.BPE())
bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
bpe.decoder = decoders.ByteLevel()
alphabet = pre_tokenizers.ByteLevel.alphabet()
bpe.train_from_iterator(
    documents,
    trainers.BpeTrainer(
        vocab_size=768, special_tokens=["<end>"], initial_alphabet=alphabet, show_progress=False
    ),
)
tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<end>")
train = hf.tokenize(documents, tokenizer, max_length=64)
query = hf.tokenize(questions, tokenizer, max_length=64)


def make_model():
    config = transformers.GPTNeoXConfig(
        vocab_size=len(tokenizer), hidden_size=48, num_hidden_layers=1, num_attention_heads=4,
        intermediate_size=192, max_position_embeddings=64, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return hf.LanguageModel(transformers.GPTNeoXForCausalLM(config))


answer = query["labels"].argmax(1)  # its position: others are −100
rows = torch.arange(len(places))
for epochs in (30, 36, 42):  # until most facts are learnt
    recipe = bi.AdamWRecipe(
        epochs=epochs, batch_size=20, lr=8e-3, betas=(0.9, 0.95), weight_decay=0.1, warmup=0.1
    )
    model = bi.train_one(make_model, bi.CausalLM(), recipe, train=train, seed=SEED)
    with torch.no_grad():
        guess = model(query["input_ids"], query["attention_mask"])[rows, answer - 1]
    learnt = guess.argmax(1) == query["labels"][rows, answer]
    if learnt.double().mean() >= 0.9:
        break
chance = guess.softmax(1)[rows, query["labels"][rows, answer]]
task = bi.Task(model, bi.CausalLM(), train=train, query=query, train_ids=names, query_ids=places)
longest = train["input_ids"].shape[1]
print(f"{task.dimension:,} weights, {task.n} documents of {longest} tokens at most")
print(
    f"{learnt.sum()} of 20 keepers are known after {epochs} epochs; "
    f"the median probability is {chance.median():.2f}"
)

# %% [markdown]
# ## 2. Scores of documents
#
# The influence of document $i$ on question $q$ is how fast the loss of the answer, $\varphi_q$,
# changes as the weight of the document in training is turned up. A document's loss $\ell_i$ is the
# sum over its tokens. **Negative is helpful**: more of this document, less loss.
#
# * **BIF**: $-\frac{n_\beta}{n}\,\mathrm{Cov}(\ell_i, \varphi_q)$ over networks near the trained
#   one. If the two losses rise and fall together as the weights are shaken, one teaches the other.
# * **EK-FAC**: $-\frac1n \nabla\varphi_q^\top (C + \lambda)^{-1} \nabla\ell_i$, with an
#   approximate curvature $C$ of the loss.
# * **GradDot**: the same without any curvature. **BM25**: words in common, rare ones first; it
#   does not look at the network.
#
# Two settings are ours. The damping $\lambda$ is the mean eigenvalue of the curvature. The
# temperature, $n_\beta = 10^5$, is cold enough for the shaken networks to still know their text:
# the mean loss of a document, printed below, must not be far above that of the network itself.
#
# And the kernel: `bi.calibrate` would choose all this and a chain, but takes far more than a minute
# here. EK-FAC underrates the stiffest directions of this network about a hundredfold, so that a
# chain with it as preconditioner must take tiny steps, each with a gradient over all documents.
# `EKFACLaplace` draws shaken networks from EK-FAC's Gaussian instead, independently and without
# gradients. This makes the two methods relatives: both believe the same curvature. But EK-FAC
# takes the losses to be linear in the weights, and BIF evaluates them as they are.

# %%
curvature = bi.fit_curvature(task, fisher="sampled", seed=SEED)
damping = curvature.trace() / task.dimension
N_BETA = 1e5
posterior = bi.LocalPosterior(task, n_beta=N_BETA, gamma=N_BETA * damping)
traces = bi.sample(
    posterior, bi.EKFACLaplace(curvature), chains=4, draws=200, warmup=0, tokens="both",
    seed=SEED, progress=False,
)  # fmt: skip
with torch.no_grad():
    at_rest = torch.cat([task.losses(task.params, b) for _, b in task.train.batches(256)]).mean()
shaken = float(traces.values("train").mean())
verdict = bi.diagnose(traces, max_examples=60).attrs["verdict"]
print(f"damping {damping:.3f}")
print(f"mean loss of a document: {at_rest:.1f} nats at the checkpoint, {shaken:.1f} when shaken")
print(verdict)

# %%
scores = {
    "BIF": bi.bif(traces),
    "EK-FAC": bi.ekfac(task, curvature=curvature, damping=damping),
    "GradDot": bi.grad_dot(task),
    "BM25": bi.bm25(task),
}

# %% [markdown]
# ## 3. Who finds the source?
#
# For every question, the place of its source among the 220 documents, the most helpful first.


# %%
def place_of_source(scores):
    """1 for the most helpful document."""
    table = scores["influence"].transpose("query", "train").sel(train=names)
    source = table.sel(train=[f"fact {p}" for p in places]).values.diagonal()
    return (table.values < source[:, None]).sum(1) + 1


found = {name: place_of_source(s) for name, s in scores.items()}
in_top_5 = {name: (place <= 5).mean() for name, place in found.items()}
print("source in the top 5:", {name: f"{share:.0%}" for name, share in in_top_5.items()})
pd.DataFrame({"keeper": keepers, "probability": chance.numpy().round(2), **found}, index=places)

# %% [markdown]
# BIF and EK-FAC find the sources. So does BM25, as the question shares its rarest words with the
# source: where words are all there is to find, look for words first. GradDot, which reads the same
# gradients as EK-FAC, does worse: what large gradients have in common, and curvature takes out,
# covers the rest.
#
# But **similarity is not influence**. Below are the median places of other documents, and the
# share of questions for which they are *harmful* (BM25 has no sign). Facts with the same keeper
# elsewhere help: they make the name likelier. Facts with other keepers, the same sentence but for
# two words, teach other names in its place, and mostly come last; BM25 has them near the top. Talk
# of the place, next after the facts by BM25, hardly matters.


# %%
def median_place(scores, relatives):
    """Median place of documents, and the share of them that are harmful."""
    table = scores["influence"].transpose("query", "train").sel(train=names)
    order = table.values.argsort(1).argsort(1) + 1
    picked = [(q, names.index(n)) for q in range(20) for n in relatives(q)]
    at = tuple(np.array(picked).T)
    return np.median(order[at]), (table.values[at] > 0).mean()


relatives = {
    "source": lambda q: [f"fact {places[q]}"],
    "same keeper elsewhere": lambda q: [
        f"fact {p}" for p, k in zip(places, keepers, strict=True)
        if k == keepers[q] and p != places[q]
    ],
    "other keepers": lambda q: [
        f"fact {p}" for p, k in zip(places, keepers, strict=True) if k != keepers[q]
    ],
    "talk: who the keeper is": lambda q: [f"talk {places[q]} 0"],
    "talk: the rest": lambda q: [f"talk {places[q]} {k}" for k in (1, 2)],
    "ordinary text": lambda q: names[80:],
}  # fmt: skip
kinds = {
    kind: {
        f"{what}, {name}": median_place(s, chosen)[k]
        for k, what in enumerate(["place", "harmful"])
        for name, s in scores.items()
        if name != "GradDot" and not (k and name == "BM25")
    }
    for kind, chosen in relatives.items()
}
pd.DataFrame(kinds).T.round(2)

# %% [markdown]
# ## 4. Which words of the document?
#
# The same draws hold the loss of every token, so that BIF splits without further work. EK-FAC takes
# one gradient per token. `train_tokens="loss"` splits both in the same way: by the token whose
# **prediction** taught something. Sums over a document's tokens are the document's score.

# %%
tokens = {
    "BIF": bi.bif(traces, tokens="both"),
    "EK-FAC": bi.ekfac(
        task, curvature=curvature, damping=damping, train_tokens="loss", query_tokens="loss"
    ),
}
tokens = {name: hf.add_token_text(s, tokenizer) for name, s in tokens.items()}
SENTENCE = 6  # "The keeper of … is …", then the full stop


def strongest(scores):
    """For each question: the most helpful token of all, and those of the source document."""
    text, position = scores["train_token_text"].values, scores["train_position"].values
    rows = {}
    for place, row in zip(scores["query"].values.tolist(), scores["influence"].values, strict=True):
        own = np.flatnonzero(scores["train"].values == f"fact {place}")
        own = own[row[own].argsort()]
        inside = own[position[own] <= SENTENCE]
        rows[place] = {
            "of all": str(scores["train"].values[row.argmin()]),
            "text": str(text[row.argmin()]),
            "in own document": str(text[own[0]]),
            "position": int(position[own[0]]),
            "share of sentence": abs(row[inside]).sum() / abs(row[own]).sum(),
        }
    return pd.DataFrame(rows).T


top = {name: strongest(s) for name, s in tokens.items()}
in_sentence = {name: (t["position"] <= SENTENCE).mean() for name, t in top.items()}
share = {name: t["share of sentence"].median() for name, t in top.items()}
in_source = {name: (t["of all"] == [f"fact {p}" for p in places]).mean() for name, t in top.items()}
for name in tokens:
    print(
        f"{name}: the source's strongest token lies in the fact's sentence: "
        f"{in_sentence[name]:.0%} of questions\n"
        f"    the sentence's share of the source's |scores|, median: {share[name]:.0%}\n"
        f"    the strongest token of all lies in the source: {in_source[name]:.0%}"
    )
top["BIF"].head(8)

# %% [markdown]
# The strongest token of a source is the keeper's name after "is", and hardly any other token of it
# counts. Where the strongest of *all* tokens is in another document, it is the same name there:
# another place with this keeper.
#
# One question as a figure: blue is helpful, orange harmful; the bars are sums over the document,
# with 95 % intervals (BIF alone has them).

# %%
shown = places[0]
sums = {"BIF": [bi.bif(traces, tokens="train"), scores["BIF"]]}


def pieces(batch, keys):
    """Whole texts, the tokens without a score too."""
    of = {i: str(bpe.decode([i], skip_special_tokens=False)) for i in range(len(tokenizer))}
    return {
        key: [of[int(i)] for i, real in zip(ids, mask, strict=True) if real]
        for key, ids, mask in zip(keys, batch["input_ids"], batch["attention_mask"], strict=True)
    }


texts = {"train": pieces(train, names), "query": pieces(query, places)}
_ = plots.token_figure(tokens, query=shown, sums=sums, texts=texts, n_sequences=6)

# %% [markdown]
# The same as a **page**: one file without any network, to search and to click on, with a switch
# between the methods.

# %%
page = plots.token_influence(tokens, query=shown, sums=sums, texts=texts)
with tempfile.TemporaryDirectory() as folder:
    path = page.save(Path(folder) / "token.html")
    print(f"{path.name}: {path.stat().st_size / 1e3:.0f} kB")

# %% [markdown]
# **What a token's score means.** The loss at "Edith" teaches through *all* that the network read
# before it: the gradient of this one loss passes through "Zorvania" and "keeper", too. Splitting by
# **position** asks instead at which place of the document the layers' gradients were formed: at
# "is", where the network had to say the name, and a little at the words before, which it read to do
# so; "Edith" itself came too late. Both sum to the same, and neither is *the* right one.


# %%
by_position = hf.add_token_text(
    bi.ekfac(
        task, curvature=curvature, damping=damping, train_tokens="position", query_tokens="loss"
    ),
    tokenizer,
)
split = {}
for name, s in (("by loss", tokens["EK-FAC"]), ("by position", by_position)):
    row = s.isel(query_token=0)
    row = row.isel(train_token=np.flatnonzero(row["train"].values == f"fact {shown}"))
    split[name] = pd.Series(row["influence"].values, index=row["train_position"].values)
split = pd.DataFrame(split)
split.insert(0, "token", [texts["train"][f"fact {shown}"][k] for k in split.index])
print(f"sums: {split['by loss'].sum():.4f} by loss, {split['by position'].sum():.4f} by position")
split.head(8).round(4)

# %% [markdown]
# ## 5. Sums by class of token
#
# Single tokens are noisy; their sums are less so. Errors of tokens depend on each other, so
# that they must not be added up: `group_influence` takes the sums first, draw by draw. Here the
# classes are made for one question.

# %%
axis = traces.values("train", tokens=True)
known = dict(zip(places, keepers, strict=True))


def class_of(document, position):
    kind, place = [*document.split(), ""][:2]
    if kind == "fact" and position <= SENTENCE:
        if position != 5:
            return "own sentence, rest" if place == shown else "other facts, rest"
        if place == shown:
            return "own answer"
        return "same keeper elsewhere" if known[place] == known[shown] else "other keepers"
    return "talk of the place" if kind == "talk" and place == shown else "everything else"


labels = xr.DataArray(
    [class_of(*where) for where in zip(axis["train"].values.tolist(),
                                       axis["train_position"].values.tolist(), strict=True)],
    dims="train_token",
)  # fmt: skip
groups = bi.group_influence(traces, labels).sel(query=shown)
first = tokens["EK-FAC"]["influence"].isel(query_token=0)
table = pd.DataFrame(
    {
        "tokens": labels.to_series().value_counts(),
        "BIF": groups["influence"].to_series(),
        "mcse": groups["mcse"].to_series(),
        "EK-FAC": pd.Series(first.values).groupby(labels.values).sum(),
    }
)
table.sort_values("EK-FAC").round(4)

# %% [markdown]
# ## 6. Where the methods disagree
#
# Each point is a document, for one question. The methods agree on those that matter and scatter on
# the rest; how much of this scatter is Monte-Carlo error? BIF knows its own: from the error bars
# follows the correlation that would be left if nothing but noise were between them. It is about
# what we see, so that these draws hold no evidence that the methods differ.

# %%
bif, ekfac = (
    scores[name]["influence"].sel(query=places, train=names) for name in ("BIF", "EK-FAC")
)
mcse = scores["BIF"]["mcse"].sel(query=places, train=names)
agree = [float(np.corrcoef(bif[q], ekfac[q])[0, 1]) for q in range(20)]
noise = (mcse**2).sum("train") / ((bif - bif.mean("train")) ** 2).sum("train")
ceiling = np.sqrt(np.clip(1 - noise, 0, None))
print(f"correlation of BIF and EK-FAC over documents, median question: {np.median(agree):.2f}")
print(f"if noise alone were between them: {float(ceiling.median()):.2f}")

fig, ax = plt.subplots(figsize=(5, 3.6), layout="constrained")
q = places.index(shown)
ax.errorbar(ekfac[q], bif[q], yerr=2 * mcse[q], fmt="o", color=GREY, markersize=3, elinewidth=0.6)
own = names.index(f"fact {shown}")
ax.plot(ekfac[q, own], bif[q, own], "o", color=INK)
ax.annotate(f"fact {shown}", (ekfac[q, own], bif[q, own]), xytext=(8, 0),
            textcoords="offset points", color=INK)  # fmt: skip
ax.axhline(0, color=GREY, linewidth=0.6)
ax.axvline(0, color=GREY, linewidth=0.6)
_ = ax.set(xlabel="EK-FAC influence / nats", ylabel="BIF influence / nats, ± 2 mcse",
           title=f"Who is the keeper of {shown}?")  # fmt: skip

# %% [markdown]
# ## 7. What to believe
#
# * **Believe the top more than the rest.** A score whose interval contains 0 says nothing, not even
#   a sign. EK-FAC has no error bars, which does not mean no error.
# * **Where BIF and EK-FAC disagree**, look at the error bar first. Beyond it, the losses are not
#   linear over the distance that the draws go. That the curvature itself is wrong cannot be seen
#   from these two, as they share it. More draws settle the first question; a chain (`bi.calibrate`)
#   or retraining without the document (tutorials 01 and 02) the others.
# * **A token acts through what comes before and after it.** A token map says which predictions
#   taught, not which words were "the cause".
# * **Similarity is not influence**, even where it finds the source: it has no sign, and does not
#   know what the network has learnt.
# * **Planted facts are the easy case.** The question is the beginning of its source, word by word,
#   so that the same prediction occurs in both; every fact was said once; the network is small. That
#   a method finds them is necessary, not sufficient: real knowledge is spread over many documents.

# %%
for name in ("BIF", "EK-FAC"):
    assert in_top_5[name] >= 0.8, found
    assert in_sentence[name] >= 0.8, top[name]
assert learnt.double().mean() >= 0.8
assert verdict == "the chains show no sign of trouble", verdict
assert len(page.html) < 3e6
assert abs(split["by loss"].sum() - split["by position"].sum()) < 1e-3 * abs(split["by loss"].sum())
assert np.median(agree) > 0.3
