"""SQNR windows of the recipe on N(0,1), and mutants that must fall out of them.

A floor would pass some mutants (SR in the forward keeps 15 dB), so every check is a window.
"""

from dataclasses import replace
from statistics import mean

import pytest
import torch
from support import WINDOW_DB, saved_tensors, sqnr

from nvfp4_titan import RECIPES
from nvfp4_titan.numerics import dequantize, quantize, rht
from nvfp4_titan.recipe import GemmFormat, Recipe
from nvfp4_titan.training import key_tensor, linear

SEEDS = range(5)
NVFP4 = RECIPES["nvfp4"]


def averaged(measure) -> float:
    """Mean over 5 seeds of measure(generator, seed)."""
    return mean(measure(torch.Generator().manual_seed(seed), seed) for seed in SEEDS)


def within(value: float, target: float) -> bool:
    return abs(value - target) <= WINDOW_DB


@pytest.mark.parametrize(
    ("block", "use_rht", "rounding", "target"),
    [
        ((1, 16), False, "rtne", 20.44),
        ((1, 16), False, "sr", 17.24),
        ((16, 16), False, "rtne", 19.06),
        ((16, 16), False, "sr", 15.98),
        ((1, 16), True, "rtne", 20.43),
        ((1, 16), True, "sr", 17.24),
    ],
)
def test_quantize(block, use_rht, rounding, target):
    def measure(generator, seed):
        x = torch.randn(512, 512, generator=generator)
        operand = quantize(x, block=block, rht=use_rht, rounding=rounding, seed=seed)
        return sqnr(dequantize(operand), rht(x).float() if use_rht else x)

    assert within(averaged(measure), target)


def gemm_sqnr(name: str, recipe: Recipe, size: int = 384, contraction: int = 4096) -> float:
    """SQNR of one GEMM of a linear with a contraction of 4096."""

    def measure(generator, seed):
        m, n, k = {
            "fprop": (size, size, contraction),
            "dgrad": (size, contraction, size),
            "wgrad": (contraction, size, size),
        }[name]
        x = torch.randn(m, k, generator=generator).requires_grad_(
            name == "wgrad" or name == "dgrad"
        )
        w = torch.randn(n, k, generator=generator).requires_grad_(name == "wgrad")
        dy = torch.randn(m, n, generator=generator)
        y = linear(x, w, recipe=recipe, backend="reference", key=key_tensor(seed, "layer"))
        if name == "fprop":
            return sqnr(y, x @ w.T)
        y.backward(dy)
        with torch.no_grad():
            return sqnr(x.grad, dy @ w) if name == "dgrad" else sqnr(w.grad, dy.T @ x)

    return averaged(measure)


@pytest.mark.parametrize(
    ("name", "recipe", "target"),
    [
        ("fprop", NVFP4, 16.70),
        ("fprop", NVFP4.switched(weights_2d=False), 17.44),
        ("dgrad", NVFP4, 15.06),
        ("dgrad", NVFP4.switched(sr=False), 16.70),
        ("wgrad", NVFP4, 15.54),
        ("wgrad", NVFP4.switched(sr=False), 17.43),
        ("wgrad", NVFP4.switched(rht=False), 15.55),
    ],
)
def test_gemm(name, recipe, target):
    assert within(gemm_sqnr(name, recipe), target)


def test_mutant_sr_in_the_forward_leaves_the_window():
    sr = replace(NVFP4.fprop.left, rounding="sr")
    mutant = replace(NVFP4, fprop=GemmFormat(sr, NVFP4.fprop.right))
    value = gemm_sqnr("fprop", mutant)
    assert within(value, 15.07) and not within(value, 16.70)


def wgrad_by_hand(dy_transform, x_transform) -> float:
    """The wgrad GEMM with its two transforms chosen apart, which no recipe allows."""

    def measure(generator, seed):
        x = torch.randn(4096, 384, generator=generator)
        dy = torch.randn(4096, 384, generator=generator)
        left = quantize(dy_transform(dy.T.contiguous()), rounding="sr", seed=seed)
        right = quantize(x_transform(x.T.contiguous()))
        return sqnr(dequantize(left) @ dequantize(right).T, dy.T @ x)

    return averaged(measure)


def other_signs(t: torch.Tensor) -> torch.Tensor:
    flip = torch.ones(16)
    flip[::2] = -1
    return rht((t.view(-1, 16) * flip).view(t.shape))


def test_the_hand_written_wgrad_is_the_recipes():
    assert within(wgrad_by_hand(rht, rht), 15.54)


@pytest.mark.parametrize(
    ("dy_transform", "x_transform", "target"),
    [(rht, lambda t: t, -3.5), (rht, other_signs, -4.0)],
    ids=["RHT on one operand", "signs that differ"],
)
def test_mutant_transforms_leave_the_window(dy_transform, x_transform, target):
    value = wgrad_by_hand(dy_transform, x_transform)
    # Which signs differ changes the exact figure; a broken transform is far below the window.
    assert abs(value - target) < 1.0 and not within(value, 15.54)


def test_rht_is_on_both_operands_of_wgrad_and_nowhere_else():
    # On Gaussian data a missing RHT cannot be seen in SQNR: check the structure.
    assert NVFP4.wgrad.left.rht and NVFP4.wgrad.right.rht
    formats = (NVFP4.fprop.left, NVFP4.fprop.right, NVFP4.dgrad.left, NVFP4.dgrad.right)
    assert not any(fmt.rht for fmt in formats)
    x = torch.randn(64, 32, requires_grad=True)
    w = torch.randn(16, 32, requires_grad=True)
    x_cols = saved_tensors(linear(x, w, backend="reference"))[2]
    assert torch.equal(x_cols, quantize(x.detach().T, rht=True).codes)
    assert not torch.equal(x_cols, quantize(x.detach().T).codes)


def test_sr_is_on_dy_and_nowhere_else():
    roundings = {
        (name, side): getattr(getattr(NVFP4, name), side).rounding
        for name in ("fprop", "dgrad", "wgrad")
        for side in ("left", "right")
    }
    assert {use for use, rounding in roundings.items() if rounding == "sr"} == {
        ("dgrad", "left"),
        ("wgrad", "left"),
    }
