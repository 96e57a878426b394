"""Benchmarks without a GPU: orders, ratios, rows, figures, refusals."""

import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from nvfp4_titan.bench import BenchRow, Environment, ratios, training, write
from nvfp4_titan.bench.peers import PlainRecipe, plain_values
from nvfp4_titan.bench.timing import schedule
from nvfp4_titan.errors import ConfigError, UnsupportedError
from nvfp4_titan.numerics import dequantize, quantize
from nvfp4_titan.recipe import RECIPES
from nvfp4_titan.scalars import RESERVED_GIB, TOKENS_PER_SECOND, TRAIN_LOSS

SCRIPTS = Path(__file__).parents[2] / "scripts"
HERE = Environment("GPU", "2.11", "3.6", "3.12", "abc", "bench")
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")


def rows():
    sizes = {"M": 4, "K": 5}
    return [
        BenchRow("bf16", "a", sizes, {"ms": 2.0}),
        BenchRow("triton", "a", sizes, {"ms": 2.5}),
        BenchRow("bf16", "b", sizes, {"ms": 1.0}),
        BenchRow("peer x", "b", sizes, {"ms": 4.0}),
    ]


def speed(row):
    return 1 / row.values["ms"]


def test_ratios_compare_with_the_control_of_the_same_case():
    compared = ratios(rows(), "bf16", "ratio_to_bf16", speed)
    assert [row.values["ratio_to_bf16"] for row in compared] == [1, 0.8, 1, 0.25]
    with pytest.raises(ValueError, match=r"cases \['b'\] have no row"):
        ratios(rows()[:2] + rows()[3:], "bf16", "r", speed)
    with pytest.raises(ValueError, match="several rows"):
        ratios(rows()[:1] * 2, "bf16", "r", speed)


def test_every_round_measures_every_variant_in_an_order_of_its_own():
    names = list("abcd")
    order = schedule(names, 50, seed=0)
    rounds = [order[i : i + 4] for i in range(0, 200, 4)]
    assert all(sorted(r) == names for r in rounds) and len({tuple(r) for r in rounds}) > 10
    assert order == schedule(names, 50, seed=0) != schedule(names, 50, seed=1)


def test_results_are_written_as_flat_rows_and_a_figure(tmp_path):
    compared = ratios(rows(), "bf16", "ratio_to_bf16", speed)
    write(compared, tmp_path / "new" / "bench", "ratio_to_bf16", "Title", HERE)
    written = json.loads((tmp_path / "new" / "bench.json").read_text())
    assert written[1] == {
        "name": "triton", "case": "a", "M": 4, "K": 5, "ms": 2.5, "ratio_to_bf16": 0.8,
        "device": "GPU", "torch": "2.11", "triton": "3.6", "python": "3.12", "commit": "abc",
        "command": "bench",
    }  # fmt: skip
    assert (tmp_path / "new" / "bench.png").stat().st_size > 1000


@pytest.mark.skipif(sys.platform != "linux", reason="Triton is for Linux")
def test_cases():
    from nvfp4_titan.bench import kernels, linears

    sizes = linears.skewed(16384, 16)
    assert sum(sizes) == 16384 and min(sizes) >= 0 and max(sizes) > 4 * 1024
    assert kernels.written(kernels.USES["x"][0], 1600) == 3200
    assert kernels.written(kernels.USES["x"][1], 1600) == 900
    assert kernels.written(None, 1600) == 0


@pytest.mark.skipif(sys.platform != "linux", reason="Triton is for Linux")
def test_the_bytes_that_a_kernel_must_move(monkeypatch):
    """Of bf16: 2 an element read, 2 written as values, 0.5625 packed; a copy moves 4."""
    from nvfp4_titan.bench import kernels

    monkeypatch.setattr(kernels.launch, "amax_triton", lambda *args: torch.zeros(args[-1]))
    t = torch.zeros(64, 32, dtype=torch.bfloat16)
    found = {
        name: kernel.bytes / t.numel() for name, kernel in kernels.quantize_kernels(t, None).items()
    }
    assert found == {
        "triton quantize x": 2 + 2 + 0.5625,
        "triton quantize dy": 2 + 2 + 2,
        "triton quantize w": 2 + 2,
        "triton amax x": 2,
        "triton amax w": 2,
        "triton unpack x": 2 + 0.5625,
        "triton unpack w": 2 + 0.5625,
    }
    assert kernels._copy(t)["copy"].bytes == 4 * t.numel()


@no_gpu
@pytest.mark.parametrize("name", ["quantize", "linear", "train"])
def test_scripts_say_that_they_need_a_gpu(name):
    command = [sys.executable, SCRIPTS / f"bench_{name}.py"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: benchmarks need a CUDA GPU")


def test_the_plain_recipe_is_the_recipe(monkeypatch):
    x = torch.randn(32, 48)
    for fmt, transpose in (
        (RECIPES["nvfp4"].fprop.left, False),
        (RECIPES["nvfp4"].fprop.right, False),
        (RECIPES["nvfp4"].wgrad.right, True),
    ):
        values, scale = plain_values(x, fmt, transpose)
        operand = quantize(x.T if transpose else x, block=fmt.block, rht=fmt.rht)
        assert torch.equal(values.float() * scale, dequantize(operand))
    # The CPU has no GEMM of bf16 with fp32 output.
    mm = torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b, out_dtype: mm(a.float(), b.float()))
    x.requires_grad_()
    w = torch.randn(64, 48, requires_grad=True)
    y = PlainRecipe.apply(x, w)
    y.sum().backward()
    assert (y - x @ w.T).norm() < 0.2 * y.norm()
    assert x.grad.shape == x.shape and w.grad.shape == w.shape


def test_training_runs_are_compared(tmp_path):
    calls = []

    def train(config, folder, steps, variant, given):
        assert given == ("--training.seq_len=64",)
        calls.append((config.stem, variant, folder))
        return {"tokens_per_s": 100.0 if variant == "bf16" else 86.0, "peak_gib": 10.0}

    configs = [Path("a.toml"), Path("b.toml")]
    bench = partial(training.bench_train, given=("--training.seq_len=64",), train=train)
    compared = bench(configs, tmp_path, 20, 3)
    assert {row.case for row in compared} == {f"{c} --training.seq_len=64" for c in "ab"}
    assert len(calls) == 12 and len({folder for *_, folder in calls}) == 12
    assert [row.values["ratio_to_bf16"] for row in compared] == [1, 0.86] * 2
    (tmp_path / "of_an_earlier_call").mkdir()
    with pytest.raises(ConfigError, match="is not empty"):
        bench(configs, tmp_path, 20, 3)
    with pytest.raises(ConfigError, match="must be more than 10"):
        bench(configs, tmp_path, 10, 1)


def test_two_tomls_of_one_name(tmp_path):
    with pytest.raises(ConfigError, match="two TOMLs have one name, a, a"):
        training.bench_train([Path("x/a.toml"), Path("y/a.toml")], tmp_path, 20, 1)


def test_the_first_steps_of_a_run_do_not_count(tmp_path, monkeypatch):
    from torch.utils.tensorboard import SummaryWriter

    def train(*args, **kwargs):
        with SummaryWriter(tmp_path / "run" / "tb" / "x") as writer:
            for step in range(1, 31):  # the warm-up is slow, and more than half of the steps
                slow = step <= training.WARMUP_STEPS
                writer.add_scalar(TOKENS_PER_SECOND, 10 if slow else step, step)
                writer.add_scalar(RESERVED_GIB, 9 if slow else 3, step)
                writer.add_scalar(TRAIN_LOSS, 1, step)
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(training.subprocess, "run", train)
    found = training.run(tmp_path / "x.toml", tmp_path / "run", 30, "bf16")
    assert found == {"tokens_per_s": 20.5, "peak_gib": 9}


def test_a_failing_run_names_its_log(tmp_path):
    with pytest.raises(ConfigError, match=r"failed, see .*log\.txt"):
        training.run(tmp_path / "missing.toml", tmp_path / "run", 1, "bf16")


def test_a_modelopt_without_what_it_needs(tmp_path, monkeypatch):
    from nvfp4_titan.bench import peers

    package = tmp_path / "modelopt"
    package.mkdir()
    (package / "__init__.py").write_text("import a_package_that_is_not_there")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(peers, "version", lambda name: "0.47.0")
    with pytest.raises(UnsupportedError, match="No module named 'a_package.*--no-modelopt"):
        peers.modelopt_fake_quant()
