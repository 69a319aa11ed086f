"""The benchmark tasks, one a file, behind one interface."""

from benchmarks.tasks import (
    diabetes_mlp,
    digits_cnn,
    digits_mlp,
    mnist_mlp,
    pydoc_gpt,
    wikitext2_gpt2,
)
from benchmarks.tasks._task import BANKS, GROUND_TRUTH, BankPlan, BenchmarkTask

__all__ = ["BANKS", "GROUND_TRUTH", "TASKS", "BankPlan", "BenchmarkTask", "get_task"]

TASKS: dict[str, BenchmarkTask] = {
    module.TASK.name: module.TASK
    for module in (digits_mlp, digits_cnn, diabetes_mlp, mnist_mlp, pydoc_gpt, wikitext2_gpt2)
}


def get_task(name: str) -> BenchmarkTask:
    """Return a task by name, or ``ValueError`` with the names there are."""
    if name not in TASKS:
        raise ValueError(f"unknown task {name!r}; the tasks are {', '.join(TASKS)}.")
    return TASKS[name]
