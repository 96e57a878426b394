"""What is compared with bf16: the recipes, and ablations of "nvfp4" as data.

A variant is a recipe and torchtitan's options on top. The ablations are those of NVIDIA's paper
(arXiv 2509.25149, section 4 and appendix), in its order: what it says each does is in `expected`.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from ..errors import ConfigError
from ..recipe import RECIPES, Change, parse_schedule
from .launch import settings
from .recipes import CONTROL, FLOAT8, row_options

_SCHEDULE = "--nvfp4.schedule="
_NAME = re.compile(r"\w[\w.+-]*")
DEFAULT = "default"
"""Name of a recipe's own variant in results."""


@dataclass(frozen=True)
class Variant:
    """What a run trains with.

    Attributes:
        name: Name on the command line and in results.
        recipe: A recipe's name, "bf16" for no converter, "fp8" for torchtitan's.
        options: torchtitan's options on top.
        ablation: Whether it leaves out a part of its recipe: reported, not judged.
        expected: What the paper says of it.
    """

    name: str
    recipe: str
    options: tuple[str, ...] = ()
    ablation: bool = False
    expected: str = ""

    @property
    def label(self) -> str:
        """Its name among the variants of its recipe."""
        return DEFAULT if self.name == self.recipe else self.name

    def arguments(self) -> list[str]:
        """Options of torchtitan that make a run this variant."""
        return [*row_options(self.recipe), *self.options]

    def schedule(self, steps: int) -> tuple[Change, ...]:
        """Changes of formats that its own options ask for, in a run of so many steps."""
        texts = settings(self.options).get("nvfp4.schedule", ())
        return parse_schedule([change for text in texts for change in text.split(",")], steps)


ABLATIONS: Mapping[str, Variant] = MappingProxyType(
    {
        name: Variant(name, recipe, options, True, expected)
        for name, recipe, options, expected in (
            ("no_tail", "nvfp4", ("--nvfp4.bf16_last_fraction=0",), "worse, or diverges"),
            ("tail_05", "nvfp4", ("--nvfp4.bf16_last_fraction=0.05",), "between no tail and 15%"),
            ("tail_15", "nvfp4", ("--nvfp4.bf16_last_fraction=0.15",), "the recipe's own"),
            ("tail_30", "nvfp4", ("--nvfp4.bf16_last_fraction=0.3",), "a little better"),
            ("no_sr", "nvfp4", ("--nvfp4.no-sr",), "worse: gradients are biased"),
            ("no_rht", "nvfp4", ("--nvfp4.no-rht",), "worse: outliers in wgrad"),
            ("weights_1x16", "nvfp4", ("--nvfp4.no-weights_2d",), "worse: two sets of weights"),
            ("sr_forward", "nvfp4_sr_forward", (), "worse, or diverges"),
            (
                "fprop_switch",
                "nvfp4",
                (f"{_SCHEDULE}0.82:fprop=bf16",),
                "a gap of 1.5% becomes 0.5% in the last 18%",
            ),
        )
    }
)
"""Ablations by name."""


def parse_variant(text: str) -> Variant:
    """From a recipe's or an ablation's name, or "name=recipe option option .." of one's own.

    Raises:
        ConfigError: an unknown name or recipe.
    """
    name, equals, rest = text.partition("=")
    name, (recipe, *options) = name.strip(), (rest.split() or [""]) if equals else [name.strip()]
    if equals and not (name and recipe):
        raise ConfigError(f"variant {text!r} is not of the form 'name=recipe option option ..'")
    if not _NAME.fullmatch(name):
        raise ConfigError(f"variant {name!r} names a folder: use letters, digits, '_', '-' and '.'")
    if not equals and name in ABLATIONS:
        return ABLATIONS[name]
    if recipe not in (*RECIPES, FLOAT8):
        known = ", ".join((CONTROL, FLOAT8, *(n for n in RECIPES if n != CONTROL), *ABLATIONS))
        raise ConfigError(f"variant {text!r} is unknown: use {known}, or 'name=recipe options'")
    return Variant(name, recipe, tuple(options))
