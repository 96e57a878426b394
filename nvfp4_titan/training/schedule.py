"""Formats that change during training: from which step on, and for validation.

A switch sets attributes of converted modules; weights, optimizer and SR keys stay. What a run does
at a step depends on the step alone, so a resumed run does the same. Modules with equal recipes get
the same Recipe object, so that compiled layers go on sharing one graph: a switch costs one more.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from torch import nn

from ..backends import resolve
from ..recipe import Change, Recipe, get_recipe
from .experts import Converted


class FormatSchedule:
    """Applies changes of GEMM formats to a model's converted modules.

    Args:
        model_parts: Converted models (pipeline stages), sharded and compiled or not.
        changes: Sorted by step.
        switches: Parts of recipes that are off, as `Recipe.switched` takes them.
        validation: Recipe of what runs in `validating`; "" leaves modules as they are.

    Raises:
        ConfigError: an unknown recipe.
        UnsupportedError: a module's backend lacks a format that is to come.
    """

    def __init__(
        self,
        model_parts: Iterable[nn.Module],
        changes: Iterable[Change] = (),
        switches: dict[str, bool] | None = None,
        validation: str = "",
    ):
        self._modules = [
            module
            for part in model_parts
            for module in part.modules()
            if isinstance(module, Converted)
        ]
        switches = switches or {}
        self._pending = [
            (change, get_recipe(change.recipe).switched(**switches)) for change in changes
        ]
        self._validation = get_recipe(validation).switched(**switches) if validation else None
        self._check()

    def before_step(self, step: int) -> list[Change]:
        """Apply what is due at a step that is about to run; returns it.

        Args:
            step: 1 for the first step of the training, restored ones included.
        """
        due = []
        while self._pending and self._pending[0][0].first_step <= step:
            change, other = self._pending.pop(0)
            self._change(lambda recipe, c=change, o=other: recipe.with_gemm(c.gemm, o))
            due.append(change)
        return due

    @contextmanager
    def validating(self) -> Iterator[None]:
        """Have the modules run in validation's recipe; after it in what they ran in before."""
        if self._validation is None:
            yield
            return
        before = [[recipe for recipe, _ in m.recipes().values()] for m in self._modules]
        self._change(lambda recipe: self._validation)
        try:
            yield
        finally:
            # The very objects: compiled graphs are guarded by identity.
            for module, recipes in zip(self._modules, map(iter, before), strict=True):
                module.change_recipe(lambda recipe, recipes=recipes: next(recipes))

    def _change(self, function: Callable[[Recipe], Recipe]) -> None:
        changed: dict[Recipe, Recipe] = {}

        def change(recipe: Recipe) -> Recipe:
            # One object for equal recipes: compiled graphs are guarded by identity.
            return changed.setdefault(recipe, function(recipe))

        for module in self._modules:
            module.change_recipe(change)

    def _check(self) -> None:
        for module in self._modules:
            for recipe, backend in module.recipes().values():
                if self._validation is not None:
                    resolve(backend, self._validation)
                for change, other in self._pending:
                    recipe = recipe.with_gemm(change.gemm, other)
                    resolve(backend, recipe)
