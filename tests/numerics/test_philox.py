"""Random bytes: known answers, and purity."""

import pytest
import torch

from nvfp4_titan.numerics import quantize, sr_key
from nvfp4_titan.numerics.philox import block_random_bytes, philox4x32

# Random123 1.14, tests/kat_vectors: philox4x32 with 7 and 10 rounds.
KNOWN = {
    (7, 0): (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48),
    (10, 0): (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8),
    (7, 0xFFFFFFFF): (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662),
    (10, 0xFFFFFFFF): (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
}


@pytest.mark.parametrize(("rounds", "fill"), KNOWN)
def test_known_answers(rounds, fill):
    counter = tuple(torch.full((1,), fill, dtype=torch.int64) for _ in range(4))
    words = philox4x32(counter, (fill, fill), rounds)
    assert tuple(int(word) for word in words) == KNOWN[rounds, fill]


def test_bytes_are_uniform():
    amax = torch.rand(256, 64)
    counts = block_random_bytes(1, 0, torch.tensor(2.0), amax).flatten().bincount(minlength=256)
    expected = 256 * 64 * 16 / 256
    chi2 = ((counts - expected) ** 2 / expected).sum()
    assert 160 < chi2 < 360  # 255 degrees of freedom: mean 255, sigma 22.6


def test_a_shard_draws_what_the_whole_draws():
    amax, block_amax = torch.tensor(3.0), torch.rand(40, 6)
    whole = block_random_bytes(7, 2, amax, block_amax)
    part = block_random_bytes(
        7, 2, amax, block_amax[8:24, 2:5], torch.arange(8, 24), torch.arange(2, 5)
    )
    assert torch.equal(part, whole[8:24, 2:5])


@pytest.mark.parametrize("change", ["seed", "stream", "row", "block", "amax", "block amax"])
def test_every_part_of_key_and_counter_matters(change):
    block_amax = torch.full((4, 4), 1.5)
    base = block_random_bytes(5, 1, torch.tensor(1.0), block_amax)
    other = {
        "seed": lambda: block_random_bytes(6, 1, torch.tensor(1.0), block_amax),
        "stream": lambda: block_random_bytes(5, 2, torch.tensor(1.0), block_amax),
        "row": lambda: block_random_bytes(5, 1, torch.tensor(1.0), block_amax, torch.arange(4, 8)),
        "block": lambda: block_random_bytes(
            5, 1, torch.tensor(1.0), block_amax, None, torch.arange(4, 8)
        ),
        "amax": lambda: block_random_bytes(5, 1, torch.tensor(1.25), block_amax),
        "block amax": lambda: block_random_bytes(5, 1, torch.tensor(1.0), block_amax * 1.25),
    }[change]()
    assert (base != other).float().mean() > 0.95


def test_bytes_do_not_see_a_power_of_two():
    dy = torch.randn(32, 64)
    one = quantize(dy, rounding="sr", seed=3)
    scaled = quantize(dy * 2.0**-7, rounding="sr", seed=3)
    assert torch.equal(one.codes, scaled.codes)


def test_key_is_stable_across_processes_and_versions():
    assert sr_key(0, "layers.0.attention.wq") == sr_key(0, "layers.0.attention.wq")
    assert sr_key(0, "layers.0.attention.wq") != sr_key(1, "layers.0.attention.wq")
    assert sr_key(0, "a") != sr_key(0, "b")
    assert sr_key(0, "layers.0.attention.wq") == -650008313729247796
