"""scripts/measure_formats.py: errors of the formats on real operands."""

import json

import pytest
import torch


def test_errors_on_gaussian_data():
    from nvfp4_titan.titan.format_errors import errors

    found = errors("dy", torch.randn(512, 512))
    expected = {"nvfp4": 20.44, "nvfp4_46": 21.21, "nvfp4, SR": 17.24, "nvfp4, RHT": 17.24}
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, abs=0.2)
    assert "nvfp4_46, 16x16" in errors("w", torch.randn(40, 50))
    assert errors("dy", torch.full((32, 32), 1e-6))["nvfp4_single"] == 0


@pytest.mark.slow
def test_a_run_writes_them(single_rank):
    from nvfp4_titan.titan.format_errors import FILE, MeasuringTrainer
    from nvfp4_titan.titan.trainer import run

    run(
        ["--model.name=llama3", "--model.flavor=debugmodel", "--training.dataset=stdlib",
         "--training.steps=1", "--training.seq_len=64", "--training.local_batch_size=2",
         "--training.mixed_precision_param=float32", "--lr_scheduler.warmup_steps=1",
         "--optimizer.implementation=foreach", f"--job.dump_folder={single_rank}"],
        MeasuringTrainer,
    )  # fmt: skip
    result = json.loads((single_rank / FILE).read_text())
    assert result["linears"] == 43 and set(result["sqnr_db"]) == {"x", "w", "dy"}
    assert 19 < result["sqnr_db"]["x"]["nvfp4"] < result["sqnr_db"]["x"]["nvfp4_46"] < 23
