"""Recording of training by a recipe, for methods that follow a run."""

from __future__ import annotations

import os

from torch import Tensor, nn

from bayesinf.evaluation._recipes import AdamWRecipe, Recipe, SGDRecipe, StatedStep, Step
from bayesinf.training._recorder import model_tensors
from bayesinf.training._rules import Rule
from bayesinf.training._writing import RunWriter

__all__ = ["Record", "Recording", "recipe_rule"]

Record = tuple[str | os.PathLike[str], int]
"""A folder, and how many checkpoints."""


class Recording:
    """Writes a run of a recipe as :class:`bayesinf.CheckpointRecorder` writes a loop's.

    Parameters
    ----------
    record
        Where, and how many checkpoints.
    model
        The network.
    recipe
        How it is trained.
    size
        Examples that it is trained on.
    """

    def __init__(self, record: Record, model: nn.Module, recipe: Recipe, size: int) -> None:
        folder, checkpoints = record
        self._model, self._total = model, recipe.steps(size)
        if not 1 <= checkpoints <= self._total:
            raise ValueError(
                f"checkpoints must be between 1 and the {self._total} steps of the recipe on "
                f"{size} examples; got {checkpoints!r}."
            )
        self._names = tuple(n for n, p in model.named_parameters() if p.requires_grad)
        every = self._total // checkpoints
        rule = recipe_rule(recipe, self._names)
        self._writer = RunWriter(folder, rule, every=every, loss_scale=1.0, resume=False)

    def begin(self) -> None:
        """Write the beginning."""
        self._writer.begin(lambda: self._tensors({}))

    def step(self, positions: Tensor, rate: float, optimizer: Step) -> None:
        """Record a step; the last one closes the run."""
        assert isinstance(optimizer, StatedStep)  # as those of all recipes that have a rule
        ids = positions.numpy()
        self._writer.add([rate], ids, lambda: self._tensors(optimizer.moments()))
        if self._writer.steps == self._total:
            self._writer.finish(lambda: self._tensors(optimizer.moments()))

    def _tensors(self, moments: dict[str, list[Tensor]]) -> dict[str, Tensor]:
        found = model_tensors(self._model)
        for key, values in moments.items():
            for name, value in zip(self._names, values, strict=True):
                found[f"optimizer.{key}.{name}"] = value.detach().cpu().clone()
        return found


def recipe_rule(recipe: Recipe, names: tuple[str, ...]) -> Rule:
    """The rule of a recipe's optimiser.

    Raises
    ------
    TypeError
        If it is another recipe.
    """
    if isinstance(recipe, SGDRecipe):
        return Rule("sgd", (names,), (recipe.weight_decay,), momentum=recipe.momentum)
    if isinstance(recipe, AdamWRecipe):
        decay, betas = (recipe.weight_decay,), recipe.betas
        return Rule("adamw", (names,), decay, betas=betas, eps=recipe.eps)
    raise TypeError(
        f"training by SGDRecipe and AdamWRecipe can be recorded; got {type(recipe).__name__}. "
        f"Record your own loop with bi.CheckpointRecorder."
    )
