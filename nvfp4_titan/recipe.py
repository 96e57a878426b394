"""Recipes as data: the format of each operand of each GEMM, and which recipe a module gets.

    fprop  y[M,N]  = x  @ w.T     contraction: in features
    dgrad  dx[M,K] = dy @ w       contraction: out features
    wgrad  dw[N,K] = dy.T @ x     contraction: tokens (per group, for experts)

The "nvfp4" recipe is NVIDIA's (arXiv 2509.25149, sections 3 and 4): x in 1x16 blocks, w in 16x16
(so that fprop and dgrad see the same values), SR on both uses of dy and only there, RHT on both
operands of wgrad and only there. SR on weights or activations diverges; RHT elsewhere hurts.

A new recipe is one entry of `RECIPES`; everything else reads the data.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import lru_cache
from types import MappingProxyType

from .errors import ConfigError
from .formats import BLOCK, MXFP8, MXFP8_FLOOR, NVFP4, NVFP4_46, BlockFormat

_NVFP4S = (NVFP4, NVFP4_46, NVFP4.single_level(), NVFP4_46.single_level())
FORMATS: Mapping[str, BlockFormat] = MappingProxyType(
    {fmt.name: fmt for fmt in (*_NVFP4S, MXFP8, MXFP8_FLOOR)}
)
"""Element and scale formats by name."""

ROUNDINGS = ("rtne", "sr")


def get_format(format: str | BlockFormat) -> BlockFormat:
    """A format by name, or the format itself.

    Raises:
        ConfigError: the name is not in `FORMATS`.
    """
    if isinstance(format, BlockFormat):
        return format
    if format not in FORMATS:
        raise ConfigError(f"format {format!r} is unknown: use one of {', '.join(FORMATS)}")
    return FORMATS[format]


@dataclass(frozen=True)
class OperandFormat:
    """How one operand of one GEMM is quantized.

    Attributes:
        format: Element and scale format.
        block: (1, 16) or (16, 16) (MXFP8: 32); the second runs along the contraction dim.
        rounding: "rtne" or "sr" (NVFP4 alone).
        rht: Whether the random Hadamard transform comes first.
    """

    format: BlockFormat = NVFP4
    block: tuple[int, int] = (1, BLOCK)
    rounding: str = "rtne"
    rht: bool = False

    def __post_init__(self):
        name, size = self.format.name, self.format.block
        if self.rounding not in ROUNDINGS:
            raise ConfigError(f"rounding={self.rounding!r} is unknown: use 'rtne' or 'sr'")
        if self.rounding == "sr" and self.format.codes_per_byte == 1:
            raise ConfigError(f"{name} has no stochastic rounding: use rounding='rtne'")
        if self.block not in ((1, size), (size, size)):
            raise ConfigError(
                f"block={self.block} is not a block of {name}: use (1, {size}) or ({size}, {size})"
            )

    @property
    def transposable(self) -> bool:
        """Whether the same codes serve both contraction dims (square blocks, nothing random)."""
        return self.block[0] == self.block[1] and self.rounding == "rtne" and not self.rht

    def __str__(self) -> str:
        """Spelling used in op arguments and reports, such as "nvfp4:1x16:sr:rht"."""
        spec = f"{self.format.name}:{self.block[0]}x{self.block[1]}:{self.rounding}"
        return spec + ":rht" if self.rht else spec

    @staticmethod
    @lru_cache
    def parse(spec: str) -> "OperandFormat":
        """Inverse of `str`."""
        name, block, rounding, *rht = spec.split(":")
        rows, columns = block.split("x")
        return OperandFormat(FORMATS[name], (int(rows), int(columns)), rounding, rht == ["rht"])


@dataclass(frozen=True)
class GemmFormat:
    """Formats of a GEMM's two operands, in the order of the module's table."""

    left: OperandFormat
    right: OperandFormat

    def __post_init__(self):
        if self.left.rht != self.right.rht:
            raise ConfigError("the RHT must be on both operands of a GEMM or on none: it cancels")


@dataclass(frozen=True)
class Recipe:
    """Formats of the three GEMMs of a linear or of grouped experts; None is high precision.

    Attributes:
        name: Key in `RECIPES`.
        fprop: x (left) and w (right).
        dgrad: dy (left) and w (right).
        wgrad: dy (left) and x (right).
    """

    name: str
    fprop: GemmFormat | None = None
    dgrad: GemmFormat | None = None
    wgrad: GemmFormat | None = None

    def __post_init__(self):
        gemms = (self.fprop, self.dgrad, self.wgrad)
        if any(gemm is None for gemm in gemms) and any(gemm is not None for gemm in gemms):
            raise ConfigError(f"recipe {self.name!r} mixes quantized and high-precision GEMMs")

    @property
    def quantized(self) -> bool:
        """Whether any GEMM is quantized."""
        return self.fprop is not None

    @property
    def needs_key(self) -> bool:
        """Whether any operand is rounded stochastically."""
        gemms = (gemm for gemm in (self.fprop, self.dgrad, self.wgrad) if gemm is not None)
        return any("sr" in (gemm.left.rounding, gemm.right.rounding) for gemm in gemms)

    def switched(self, *, rht: bool = True, sr: bool = True, weights_2d: bool = True) -> "Recipe":
        """This recipe with parts of it turned off: RHT, SR (then RTNE), 16x16 weight blocks."""
        if not self.quantized or (rht and sr and weights_2d):
            return self

        def operand(fmt: OperandFormat) -> OperandFormat:
            return replace(
                fmt,
                rht=fmt.rht and rht,
                rounding=fmt.rounding if sr else "rtne",
                block=fmt.block if weights_2d else (1, fmt.format.block),
            )

        def gemm(fmt: GemmFormat) -> GemmFormat:
            return GemmFormat(operand(fmt.left), operand(fmt.right))

        off = [n for n, on in (("rht", rht), ("sr", sr), ("weights_2d", weights_2d)) if not on]
        return Recipe(
            f"{self.name} without {', '.join(off)}",
            gemm(self.fprop),
            gemm(self.dgrad),
            gemm(self.wgrad),
        )


_X = OperandFormat()
_W = OperandFormat(block=(BLOCK, BLOCK))
_DY = OperandFormat(rounding="sr")

RECIPES: Mapping[str, Recipe] = MappingProxyType(
    {
        "nvfp4": Recipe(
            "nvfp4",
            fprop=GemmFormat(_X, _W),
            dgrad=GemmFormat(_DY, _W),
            wgrad=GemmFormat(replace(_DY, rht=True), replace(_X, rht=True)),
        ),
        "bf16": Recipe("bf16"),
    }
)
"""Recipes by the name that TOMLs, rules and the Python API take."""


def get_recipe(recipe: str | Recipe) -> Recipe:
    """A recipe by name, or the recipe itself.

    Raises:
        ConfigError: the name is not in `RECIPES`.
    """
    if isinstance(recipe, Recipe):
        return recipe
    if recipe not in RECIPES:
        raise ConfigError(f"recipe {recipe!r} is unknown: use one of {', '.join(RECIPES)}")
    return RECIPES[recipe]


@dataclass(frozen=True)
class Rule:
    """Modules whose FQN matches the glob (`*` also matches dots) get this recipe."""

    glob: str
    recipe: str

    @staticmethod
    def parse(text: str) -> "Rule":
        """From "glob=recipe".

        Raises:
            ConfigError: no "=", or an unknown recipe.
        """
        glob, equals, recipe = (part.strip() for part in text.partition("="))
        if not equals or not glob or not recipe:
            raise ConfigError(f"rule {text!r} is not of the form 'glob=recipe'")
        get_recipe(recipe)
        return Rule(glob, recipe)

    def matches(self, names: Iterable[str]) -> bool:
        """Whether any of a module's names matches."""
        return any(fnmatchcase(name, self.glob) for name in names)


DEFAULT_RULES = (
    Rule("*router*", "bf16"),
    Rule("*.gate", "bf16"),
    Rule("output", "bf16"),
    Rule("lm_head", "bf16"),
    Rule("*.lm_head", "bf16"),
)
"""What stays in high precision in every recipe: routers and the lm head (paper, section 4.1)."""


@dataclass(frozen=True)
class Choice:
    """The recipe that a module gets, and why."""

    recipe: Recipe
    reason: str


@dataclass(frozen=True)
class Selection:
    """Everything that decides which module gets which recipe.

    Attributes:
        recipe: For modules that nothing else decides.
        rules: User's rules; the last match wins, over everything else.
        bf16_first_layers: Blocks at the start of the model that stay in bf16.
        bf16_last_fraction: Fraction of the blocks, rounded up, that stay in bf16 at the end.
        rht: Whether recipes keep their Hadamard transform.
        sr: Whether recipes keep their stochastic rounding.
        weights_2d: Whether recipes keep their 16x16 weight blocks.
    """

    recipe: Recipe
    rules: tuple[Rule, ...] = ()
    bf16_first_layers: int = 0
    bf16_last_fraction: float = 0.15
    rht: bool = True
    sr: bool = True
    weights_2d: bool = True

    def __post_init__(self):
        if not 0 <= self.bf16_last_fraction <= 1:
            raise ConfigError(
                f"bf16_last_fraction={self.bf16_last_fraction} is not a fraction: use 0 to 1"
            )
        if self.bf16_first_layers < 0:
            raise ConfigError(f"bf16_first_layers={self.bf16_first_layers} must not be negative")

    def bf16_last_layers(self, num_blocks: int) -> int:
        """Number of blocks at the end that stay in bf16."""
        # 0.15 * 20 must give 3, whatever the last bit of the product.
        return math.ceil(self.bf16_last_fraction * num_blocks - 1e-9)

    def choose(self, names: tuple[str, ...], block: int | None, num_blocks: int) -> Choice:
        """The recipe of a module.

        Args:
            names: The names it goes by; the first is its FQN.
            block: Index of the transformer block it is in, None if in none.
            num_blocks: Number of the model's transformer blocks.
        """
        for rule in reversed(self.rules):
            if rule.matches(names):
                return Choice(self._switched(get_recipe(rule.recipe)), f"rule {rule.glob}")
        for rule in DEFAULT_RULES:
            if rule.matches(names):
                return Choice(get_recipe(rule.recipe), "lm head or router")
        if block is not None:
            if block < self.bf16_first_layers:
                return Choice(RECIPES["bf16"], "bf16_first_layers")
            if block >= num_blocks - self.bf16_last_layers(num_blocks):
                return Choice(RECIPES["bf16"], "bf16_last_fraction")
        return Choice(self._switched(self.recipe), "recipe")

    def _switched(self, recipe: Recipe) -> Recipe:
        return recipe.switched(rht=self.rht, sr=self.sr, weights_2d=self.weights_2d)


def parse_rules(texts: Iterable[str]) -> tuple[Rule, ...]:
    """Rules from "glob=recipe" strings; empty strings are ignored (an empty list)."""
    return tuple(Rule.parse(text) for text in texts if text.strip())
