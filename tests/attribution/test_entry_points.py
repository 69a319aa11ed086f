"""Methods of other packages: found by entry point, loaded late, refused in words."""

import sys
from pathlib import Path

import pytest

import bayesinf as bi
from bayesinf._attribute import attribute, available_methods
from bayesinf.attribution._entry_points import MethodWarning
from bayesinf.attribution._registry import METHODS, Method, register
from tests.layered_cases import LAYERED_BY_NAME

PACKAGE = Path(__file__).parent.parent / "method_package"


def task():
    return LAYERED_BY_NAME["softmax-regression"].task()


def install(folder, package, points, code=None):
    """A package as an installer leaves it."""
    info = folder / f"{package}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    lines = "".join(f"{name} = {value}\n" for name, value in points.items())
    (info / "entry_points.txt").write_text(f"[bayesinf.methods]\n{lines}")
    if code is not None:
        (folder / f"{package}.py").write_text(code)


@pytest.fixture
def path(monkeypatch, tmp_path):
    """A folder on the path, which is left as it was."""
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        del sys.modules[name]


@pytest.fixture
def package(monkeypatch):
    monkeypatch.syspath_prepend(PACKAGE)
    yield
    sys.modules.pop("nearest_mean", None)


def test_it_is_in_the_table_and_runs_like_any_other(package):
    table = available_methods(task()).sel(name="nearest_mean")
    assert bool(table["runs"])
    assert table["source"].item() == "nearest-mean"
    assert table["options"].item() == "batch_size, scale"
    assert table["summary"].item() == "distance of the inputs"
    scores = attribute(task(), "nearest_mean", scale=2.0)
    assert scores.influence.shape == (5, 12)
    assert scores.attrs["method"] == "nearest_mean"
    assert "processor_seconds" in scores.attrs
    assert "nearest_mean" not in METHODS
    with pytest.raises(TypeError, match=r"nearest_mean takes no damping\. It takes batch_size, sc"):
        attribute(task(), "nearest_mean", damping=0.1)


def test_it_is_loaded_when_it_is_asked_for(package):
    attribute(task(), "grad_dot")
    assert "nearest_mean" not in sys.modules
    with pytest.raises(ValueError, match=r"Nearest: nearest_mean"):
        attribute(task(), "nearest_men")
    assert "nearest_mean" not in sys.modules


def test_without_the_package_there_is_no_such_method():
    with pytest.raises(ValueError, match="there is no method 'nearest_mean'"):
        attribute(task(), "nearest_mean")


BROKEN = {
    "absent": ("no_such_module_here:METHOD", "ModuleNotFoundError: No module named"),
    "empty": ("broken:NOTHING", "AttributeError: module 'broken' has no attribute 'NOTHING'"),
    "number": ("broken:NUMBER", r"TypeError: it is a int, and must be a bayesinf\.Method"),
    "other_name": ("broken:METHOD", "ValueError: its Method is called 'renamed'"),
    "nameless": ("broken:NAMELESS", r"TypeError: nameless takes \*\*options without saying which"),
}

CODE = """
from bayesinf.attribution._registry import Method
NUMBER = 3
def score(task, **options): ...
METHOD = Method("renamed", lambda task: None, "similarity", "…")
NAMELESS = Method("nameless", score, "similarity", "…")
"""


@pytest.mark.parametrize("name", BROKEN)
def test_one_that_does_not_load_is_named_and_others_stay(name, path):
    value, message = BROKEN[name]
    install(path, "broken", {name: value}, CODE)
    with pytest.warns(MethodWarning, match=f"the method '{name}' of broken does not.*{message}"):
        table = available_methods(task())
    assert name not in table["name"].values.tolist()
    assert set(METHODS) <= set(table["name"].values.tolist())
    attribute(task(), "grad_dot")
    with pytest.raises(ImportError, match=f"'{name}' of broken does not load .*{message}"):
        attribute(task(), name)


def test_a_name_of_this_library_is_refused(path):
    install(path, "greedy", {"ekfac": "greedy:METHOD"})
    message = r"two methods are called 'ekfac': one of bayesinf and one of greedy \(entry point"
    for call in (lambda: available_methods(task()), lambda: attribute(task(), "ekfac")):
        with pytest.raises(ValueError, match=message):
            call()


def test_two_packages_with_one_name_are_refused(path):
    install(path, "first", {"mine": "first:METHOD"})
    install(path, "second", {"mine": "second:METHOD"})
    with pytest.raises(ValueError, match="two methods are called 'mine': one of "):
        available_methods(task())


def test_two_functions_of_one_name_are_refused():
    def grad_dot(task):
        """Another."""

    with pytest.raises(ValueError, match="two functions are registered as 'grad_dot'"):
        register("similarity", "…")(grad_dot)
    assert METHODS["grad_dot"].function is bi.grad_dot


@pytest.mark.parametrize(
    ("name", "estimand", "message"),
    [("a b", "similarity", "must be an identifier; got 'a b'"), ("a", "rank", "got 'rank'")],
)
def test_rows_that_cannot_be(name, estimand, message):
    with pytest.raises(ValueError, match=message):
        Method(name, lambda task: None, estimand, "…")
