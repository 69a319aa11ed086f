"""Which module may know of which: the directions of imports, read from the source."""

import ast
import functools
import subprocess
import sys
from pathlib import Path

import pytest

import bayesinf

PACKAGE = Path(bayesinf.__file__).parent
MODULES = {
    ".".join(("bayesinf", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(
        ".__init__"
    ): path
    for path in PACKAGE.rglob("*.py")
}


@functools.cache
def direct(name):
    """Names that a module imports when it is run, with the submodules of ``from a import b``."""
    found = set()

    def visit(node):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} has a relative import"
            found.add(node.module)
            found.update(f"{node.module}.{a.name}" for a in node.names)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(MODULES[name].read_text(encoding="utf-8")))
    return {n for n in found if n in MODULES or not n.startswith("bayesinf")}


@functools.cache
def closure(name):
    """All that a module needs, directly or through other modules of the package.

    ``bayesinf`` itself re-exports everything: who imports it takes its version, nothing else.
    """
    seen, queue = set(), [name]
    while queue:
        for found in direct(queue.pop()):
            if found not in seen:
                seen.add(found)
                if found in MODULES and found != "bayesinf":
                    queue.append(found)
    return seen


def roots(names):
    return {name.split(".")[0] for name in names}


def test_the_reader_of_sources_sees_what_there_is():
    assert "bayesinf._likelihoods" in direct("bayesinf._task")
    assert "torch" in roots(direct("bayesinf._task"))
    assert {"bayesinf._data", "bayesinf._traces", "zarr"} <= closure("bayesinf._sampling")
    assert "bayesinf._traces" not in direct("bayesinf._diagnostics")  # for types only
    for path in MODULES.values():
        assert path.exists()


TORCHLESS = [
    "bayesinf._axes",
    "bayesinf._chains",
    "bayesinf._disk",
    "bayesinf._layout",
    "bayesinf._traces",
    "bayesinf._batch_sums",
    "bayesinf._covariance",
    "bayesinf._running_sums",
    "bayesinf._stream_diagnostics",
    "bayesinf._streaming",
    "bayesinf._store",
    "bayesinf._diagnostics",
    "bayesinf._accuracy",
    "bayesinf._scores",
    "bayesinf._learning_coefficient",
    "bayesinf.attribution._bif",
    "bayesinf.attribution._covariance_scores",
    "bayesinf.attribution._group_influence",
    "bayesinf.attribution._groups",
    "bayesinf.attribution._self_variance",
    "bayesinf.attribution._sinks",
    "bayesinf.attribution._top_k",
    "bayesinf.attribution._susceptibility",
    "bayesinf.attribution._checkpoints",
]


@pytest.mark.parametrize("name", TORCHLESS)
def test_what_reads_traces_knows_no_torch(name):
    needs = closure(name)
    assert "torch" not in roots(needs)
    inside = {n for n in needs if n.startswith("bayesinf")} - {"bayesinf", "bayesinf.attribution"}
    assert inside <= set(TORCHLESS)


LAYERS = {  # what a module may need of the package, at most
    "bayesinf._head": set(),
    "bayesinf._language": {"_head"},
    "bayesinf._likelihoods": {"_language", "_head"},
    "bayesinf._data": set(),
    "bayesinf._linear": set(),
    "bayesinf._tracing": set(),
    "bayesinf._rng": set(),
    "bayesinf._parameters": set(),
    "bayesinf._checkpoint": set(),
    "bayesinf._task": {"_data", "_likelihoods", "_language", "_head", "_parameters", "_checkpoint"},
    "bayesinf._footprint": {
        "_task", "_data", "_likelihoods", "_language", "_head", "_parameters", "_checkpoint",
    },
    "bayesinf._gradients": {
        "_task", "_data", "_likelihoods", "_language", "_head", "_parameters", "_checkpoint",
        "_linear", "_tracing", "_footprint",
    },
    "bayesinf._posterior": {
        "_task", "_data", "_likelihoods", "_language", "_head", "_parameters", "_checkpoint",
        "_gradients", "_linear", "_tracing", "_footprint",
    },
}  # fmt: skip


@pytest.mark.parametrize("name", LAYERS)
def test_lower_layers_know_nothing_above_them(name):
    needs = {n for n in closure(name) if n.startswith("bayesinf.")}
    assert needs <= {f"bayesinf.{n}" for n in LAYERS[name]}


def within(*prefixes):
    return [
        name for name in MODULES if any(name == p or name.startswith(p + ".") for p in prefixes)
    ]


@pytest.mark.parametrize(
    ("modules", "never"),
    [
        (within("bayesinf.samplers"),
         ["_sampling", "_run", "_traces", "_data_store", "_diagnostics", "attribution"]),
        (within("bayesinf.curvature"),
         ["samplers", "_sampling", "_run", "_traces", "_posterior", "_gradients", "attribution"]),
        (within("bayesinf._sampling", "bayesinf._run"), ["attribution"]),
        (within("bayesinf.attribution"),
         ["samplers", "_sampling", "_run", "_posterior", "_gradients"]),
        (within("bayesinf.evaluation"),
         ["samplers", "_sampling", "_run", "_traces", "_posterior", "curvature",
          "attribution"]),
        ([n for n in MODULES if n not in ("bayesinf", "bayesinf._compare")],  # the top of it all
         ["evaluation", "plots", "interop"]),
    ],
    ids=["samplers", "curvature", "sampling", "attribution", "evaluation", "leaves"],
)  # fmt: skip
def test_imports_point_one_way(modules, never):
    assert modules
    for name in modules:
        for part in never:
            if name.startswith(f"bayesinf.{part}"):
                continue
            bad = [n for n in closure(name) if f"{n}.".startswith(f"bayesinf.{part}.")]
            assert not bad, f"{name} needs {bad}"


def test_the_driver_takes_kernels_as_they_are():
    for name in ("bayesinf._sampling", "bayesinf._run", "bayesinf._plan", "bayesinf._posterior"):
        assert not [n for n in direct(name) if n.startswith("bayesinf.curvature")]


def test_only_figures_draw():
    for name in MODULES:
        if not name.startswith("bayesinf.plots"):
            assert not roots(direct(name)) & {"matplotlib", "arviz_plots", "sklearn", "mlxtend"}


HEAVY = (
    "jax",
    "numpyro",
    "blackjax",
    "transformers",
    "matplotlib",
    "arviz_plots",
    "sklearn",
    "mlxtend",
)


@pytest.fixture(scope="module")
def imported():
    """Modules of a fresh process after ``import bayesinf``, and how its global state changed."""
    program = """
import random, sys
import numpy as np, torch
before = torch.random.get_rng_state(), torch.get_default_dtype(), torch.get_num_threads()
draw = random.getstate()
import bayesinf
after = torch.random.get_rng_state(), torch.get_default_dtype(), torch.get_num_threads()
assert torch.equal(before[0], after[0]) and before[1:] == after[1:] and draw == random.getstate()
for name in bayesinf.__all__:
    getattr(bayesinf, name)
print(*sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", program],
        capture_output=True,
        text=True,
        check=True,
        cwd=PACKAGE.parent,
    )
    assert done.stderr == ""
    return set(done.stdout.split())


def test_import_pulls_in_nothing_heavy(imported):
    assert "bayesinf._sampling" in imported
    assert not imported & set(HEAVY)
    assert "bayesinf.plots" not in imported


def test_every_public_name_is_listed_once():
    assert sorted(set(bayesinf.__all__)) == sorted(bayesinf.__all__)
    modules = {n.split(".")[1] for n in MODULES if n.count(".") == 1}
    functions = {n for n in bayesinf.__all__ if not isinstance(getattr(bayesinf, n), type(ast))}
    assert not modules & functions
