"""Recipes as data: the format of each operand of each GEMM, and which recipe a module gets.

    fprop  y[M,N]  = x  @ w.T     contraction: in features
    dgrad  dx[M,K] = dy @ w       contraction: out features
    wgrad  dw[N,K] = dy.T @ x     contraction: tokens (per group, for experts)

The "nvfp4" recipe is NVIDIA's (arXiv 2509.25149, sections 3 and 4): x in 1x16 blocks, w in 16x16
(so that fprop and dgrad see the same values), SR on both uses of dy and only there, RHT on both
operands of wgrad and only there. SR on weights or activations diverges; RHT elsewhere hurts.

A GEMM without a format runs in high precision. dgrad's w and wgrad's x come from the originals
(each operand is quantized once per contraction dim), or are what the forward multiplied, as
dequantized: exact for the function that the forward computed, but quantized twice where the GEMM
has a format of its own.

A new recipe is one entry of `RECIPES`, one line in a TOML's comment and one row in the tests;
everything else reads the data.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import lru_cache
from numbers import Integral, Real
from types import MappingProxyType

from .errors import ConfigError, check_types
from .formats import BLOCK, MXFP8, MXFP8_FLOOR, NVFP4, NVFP4_46, BlockFormat

_NVFP4S = (NVFP4, NVFP4_46, NVFP4.single_level(), NVFP4_46.single_level())
FORMATS: Mapping[str, BlockFormat] = MappingProxyType(
    {fmt.name: fmt for fmt in (*_NVFP4S, MXFP8, MXFP8_FLOOR)}
)
"""Element and scale formats by name."""

ROUNDINGS = ("rtne", "sr")
GEMMS = ("fprop", "dgrad", "wgrad")


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
        if self.left.format.block != self.right.format.block:
            raise ConfigError(
                f"a GEMM cannot multiply {self.left} by {self.right}: their blocks differ in size"
            )


@dataclass(frozen=True)
class Recipe:
    """Formats of the three GEMMs of a linear or of grouped experts; None is high precision.

    Attributes:
        name: Key in `RECIPES`.
        fprop: x (left) and w (right).
        dgrad: dy (left) and w (right).
        wgrad: dy (left) and x (right).
        dequantized: Whether w of dgrad and x of wgrad are fprop's quantized operands, dequantized,
            and not the originals.
    """

    name: str
    fprop: GemmFormat | None = None
    dgrad: GemmFormat | None = None
    wgrad: GemmFormat | None = None
    dequantized: bool = False

    def __post_init__(self):
        if self.dequantized and (self.fprop is None or self.fprop.left.rht):
            raise ConfigError(
                f"recipe {self.name!r} takes backward operands from the forward's, which must then "
                "be quantized, and without the RHT"
            )

    @property
    def gemms(self) -> tuple[GemmFormat, ...]:
        """Formats of the quantized GEMMs."""
        return tuple(gemm for gemm in (self.fprop, self.dgrad, self.wgrad) if gemm is not None)

    @property
    def quantized(self) -> bool:
        """Whether any GEMM is quantized."""
        return len(self.gemms) > 0

    @property
    def formats(self) -> frozenset[str]:
        """Names of the element formats that the recipe uses."""
        return frozenset(fmt.format.name for gemm in self.gemms for fmt in (gemm.left, gemm.right))

    @property
    def shares_weight_codes(self) -> bool:
        """Whether dgrad reads the codes that fprop made of w (16x16 blocks do, 1x16 do not)."""
        if self.fprop is None or self.dgrad is None:
            return False
        return self.fprop.right == self.dgrad.right and self.fprop.right.transposable

    def switched(
        self,
        *,
        rht: bool = True,
        sr: bool = True,
        weights_2d: bool = True,
        tensor_scale: bool = True,
    ) -> "Recipe":
        """This recipe with parts of it turned off.

        Args:
            rht: Off drops the Hadamard transform.
            sr: Off rounds to nearest.
            weights_2d: Off quantizes in 1x16 blocks only.
            tensor_scale: Off drops NVFP4's scale per tensor of x and w (a single level of scales).
                dy keeps its own: gradients are far below 6 * 2**-10, where a single level ends.
        """
        switches = {"rht": rht, "sr": sr, "weights_2d": weights_2d, "tensor_scale": tensor_scale}
        off = [name for name, on in switches.items() if not on]
        if not self.quantized or not off:
            return self

        def operand(fmt: OperandFormat, is_dy: bool) -> OperandFormat:
            return OperandFormat(
                fmt.format if tensor_scale or is_dy else fmt.format.single_level(),
                fmt.block if weights_2d else (1, fmt.format.block),
                fmt.rounding if sr else "rtne",
                fmt.rht and rht,
            )

        def gemm(name: str) -> GemmFormat | None:
            fmt = getattr(self, name)
            return fmt and GemmFormat(operand(fmt.left, name != "fprop"), operand(fmt.right, False))

        return replace(
            self,
            name=f"{self.name} without {', '.join(off)}",
            **{name: gemm(name) for name in GEMMS},
        )

    def with_gemm(self, gemm: str, other: "Recipe") -> "Recipe":
        """This recipe with one GEMM ("fprop", "dgrad", "wgrad") in another recipe's formats."""
        fmt = getattr(other, gemm)
        if fmt == getattr(self, gemm):
            return self
        # Without a quantized forward there is nothing to dequantize.
        dequantized = self.dequantized and not (gemm == "fprop" and fmt is None)
        changes = {"name": f"{self.name}, {gemm}={other.name}", "dequantized": dequantized}
        return replace(self, **changes, **{gemm: fmt})


def _nvfp4(fmt: BlockFormat) -> dict[str, GemmFormat]:
    """NVIDIA's three GEMMs in an NVFP4 format."""
    x, w = OperandFormat(fmt), OperandFormat(fmt, (BLOCK, BLOCK))
    dy = OperandFormat(fmt, rounding="sr")
    wgrad = GemmFormat(replace(dy, rht=True), replace(x, rht=True))
    return {"fprop": GemmFormat(x, w), "dgrad": GemmFormat(dy, w), "wgrad": wgrad}


def _mxfp8(fmt: BlockFormat) -> dict[str, GemmFormat]:
    """All three GEMMs in an MXFP8 format, 1x32 blocks along every contraction (torchao)."""
    operand = OperandFormat(fmt, (1, fmt.block))
    return dict.fromkeys(GEMMS, GemmFormat(operand, operand))


def _forward(gemms: dict[str, GemmFormat]) -> dict[str, GemmFormat]:
    return {"fprop": gemms["fprop"]}


def _backward(gemms: dict[str, GemmFormat]) -> dict[str, GemmFormat]:
    return {"dgrad": gemms["dgrad"], "wgrad": gemms["wgrad"]}


_NVFP4, _MXFP8 = _nvfp4(NVFP4), _mxfp8(MXFP8)
_SR_FPROP = replace(_NVFP4["fprop"], left=OperandFormat(rounding="sr"))

RECIPES: Mapping[str, Recipe] = MappingProxyType(
    {
        recipe.name: recipe
        for recipe in (
            Recipe("nvfp4", **_NVFP4),
            Recipe("bf16"),
            Recipe("nvfp4_46", **_nvfp4(NVFP4_46)),
            Recipe("nvfp4_sr_forward", **(_NVFP4 | {"fprop": _SR_FPROP})),
            Recipe("nvfp4_mxfp8", **_forward(_NVFP4), **_backward(_MXFP8)),
            Recipe(
                "nvfp4_mxfp8_dequantized",
                **_forward(_NVFP4),
                **_backward(_MXFP8),
                dequantized=True,
            ),
            Recipe("nvfp4_bf16", **_forward(_NVFP4), dequantized=True),
            Recipe("nvfp4_bf16_original", **_forward(_NVFP4)),
            Recipe("bf16_nvfp4", **_backward(_NVFP4)),
            Recipe("mxfp8", **_MXFP8),
            Recipe("mxfp8_floor", **_mxfp8(MXFP8_FLOOR)),
        )
    }
)
"""Recipes by the name that TOMLs, rules and the Python API take.

    nvfp4                    NVIDIA's: all three GEMMs in NVFP4
    bf16                     high precision
    nvfp4_46                 nvfp4 with four-over-six block scaling (arXiv 2512.02010)
    nvfp4_sr_forward         nvfp4 with SR on x in fprop too, for ablations alone: it does harm
    nvfp4_mxfp8              fprop in NVFP4; dgrad and wgrad in MXFP8, from the originals
    nvfp4_mxfp8_dequantized  the same, w and x of the backward from fprop's NVFP4 operands
    nvfp4_bf16               fprop in NVFP4, backward in high precision over its dequantized
                             operands: the straight-through QAT forward (torchao's, too)
    nvfp4_bf16_original      the same over the original x and w
    bf16_nvfp4               fprop in high precision; dgrad and wgrad in NVFP4
    mxfp8, mxfp8_floor       all three GEMMs in MXFP8, scales rounded up or down
"""


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
    Rule("*.shared_expert_gate", "bf16"),
    Rule("output", "bf16"),
    Rule("lm_head", "bf16"),
    Rule("*.lm_head", "bf16"),
    Rule("lm_head.*", "bf16"),
    Rule("*.lm_head.*", "bf16"),
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
        tensor_scale: Whether recipes keep NVFP4's scale per tensor of x and w.
    """

    recipe: Recipe
    rules: tuple[Rule, ...] = ()
    bf16_first_layers: int = 0
    bf16_last_fraction: float = 0.15
    rht: bool = True
    sr: bool = True
    weights_2d: bool = True
    tensor_scale: bool = True

    def __post_init__(self):
        flags = {name: getattr(self, name) for name in ("rht", "sr", "weights_2d", "tensor_scale")}
        check_types(bool, **flags)
        check_types(Integral, bf16_first_layers=self.bf16_first_layers)
        check_types(Real, bf16_last_fraction=self.bf16_last_fraction)
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
        return recipe.switched(
            rht=self.rht,
            sr=self.sr,
            weights_2d=self.weights_2d,
            tensor_scale=self.tensor_scale,
        )


def parse_rules(texts: Iterable[str]) -> tuple[Rule, ...]:
    """Rules from "glob=recipe" strings; empty strings are ignored (an empty list).

    Raises:
        ConfigError: a malformed rule, or one glob with two recipes.
    """
    texts = tuple(texts)
    if wrong := [text for text in texts if not isinstance(text, str)]:
        raise ConfigError(f"rule {wrong[0]!r} must be a 'glob=recipe' string")
    rules = tuple(Rule.parse(text) for text in texts if text.strip())
    recipes: dict[str, str] = {}
    for rule in rules:
        if recipes.setdefault(rule.glob, rule.recipe) != rule.recipe:
            raise ConfigError(
                f"rules conflict: {rule.glob!r} is to get {recipes[rule.glob]!r} and "
                f"{rule.recipe!r}: keep one of them"
            )
    return rules


@dataclass(frozen=True)
class Change:
    """From a step on, one GEMM of every converted module runs in another recipe's formats.

    Attributes:
        first_step: First step that the change holds for; torchtitan counts from 1.
        gemm: "fprop", "dgrad" or "wgrad".
        recipe: Name of the recipe that the GEMM's formats are taken from.
    """

    first_step: int
    gemm: str
    recipe: str

    @staticmethod
    def parse(text: str, steps: int) -> "Change":
        """From "point:gemm=recipe" and the number of training steps.

        The point is what has been done before the change: a fraction of the steps, rounded down,
        below 1; else a number of steps. "0.82:fprop=bf16" of 100 steps begins with step 83.

        Raises:
            ConfigError: malformed, an unknown GEMM or recipe, or a point that is never reached.
        """
        point, colon, change = (part.strip() for part in text.partition(":"))
        gemm, equals, recipe = (part.strip() for part in change.partition("="))
        try:
            after = float(point)
        except ValueError:
            after = math.nan
        whole = after < 1 or after == after // 1
        if not (colon and equals and after >= 0 and whole) or gemm not in GEMMS:
            raise ConfigError(
                f"schedule {text!r} is not of the form 'fraction:gemm=recipe', with a fraction of "
                f"the steps (or a number of them), and one of {', '.join(GEMMS)}"
            )
        get_recipe(recipe)
        # 0.82 * 50 must give 41, whatever the last bit of the product.
        done = math.floor(after * steps + 1e-9) if after < 1 else int(after)
        if done >= steps:
            raise ConfigError(f"schedule {text!r} is never reached: training has {steps} steps")
        return Change(done + 1, gemm, recipe)


def parse_schedule(texts: Iterable[str], steps: int) -> tuple[Change, ...]:
    """Changes by step from "point:gemm=recipe" strings; empty strings are ignored.

    Raises:
        ConfigError: a malformed change, or two of one GEMM at the same step.
    """
    changes = [Change.parse(text, steps) for text in texts if text.strip()]
    for i, change in enumerate(changes):
        for other in changes[:i]:
            if (other.first_step, other.gemm) == (change.first_step, change.gemm):
                raise ConfigError(
                    f"schedule changes {change.gemm} twice at step {change.first_step}: to "
                    f"{other.recipe!r} and to {change.recipe!r}"
                )
    return tuple(sorted(changes, key=lambda change: change.first_step))
