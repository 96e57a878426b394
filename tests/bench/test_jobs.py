"""Lists of jobs: what fails, hangs or has no time left is recorded; plans are whole."""

import json
import time
from pathlib import Path

import pytest

from nvfp4_titan.bench import parallel
from nvfp4_titan.bench.jobs import Job, run_jobs, select
from nvfp4_titan.errors import ConfigError
from nvfp4_titan.scalars import ACTIVE_GIB, RESERVED_GIB, TOKENS_PER_SECOND, TRAIN_LOSS


class Script(Job):
    """A job that is a line of Python."""

    def command(self, folder):
        return ["-c", *self.options, str(folder)]


def script(name, code, **fields):
    return Script(name, Path("none.toml"), 1, (code,), **fields)


def written_losses(folder, losses):
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(folder / "tb" / "x") as writer:
        for step, loss in losses.items():
            values = {TRAIN_LOSS: loss, TOKENS_PER_SECOND: 100.0 * step}
            for tag, value in (values | {RESERVED_GIB: step, ACTIVE_GIB: step / 2}).items():
                writer.add_scalar(tag, value, step)


def test_jobs_end_in_every_way(tmp_path):
    jobs = [
        script("good", "import os; print(os.environ['WITH'])", environment={"WITH": "value"}),
        script("bad", "raise SystemExit('what went wrong')"),
        script("hangs", "import time; time.sleep(60)"),
        script("raises as it should", "raise OSError('injected')", must_fail_with="injected"),
        script("raises otherwise", "raise OSError('x')", must_fail_with="injected"),
        script("does not raise", "print('injected')", must_fail_with="injected"),
    ]
    start = time.monotonic()
    results = dict(run_jobs(jobs, tmp_path / "runs", timeout=5, budget=60))
    assert time.monotonic() - start < 30
    statuses = {name: result["status"] for name, result in results.items()}
    assert statuses == {
        "good": "ok",
        "bad": "failed",
        "hangs": "timed out",
        "raises as it should": "ok",
        "raises otherwise": "failed",
        "does not raise": "failed",
    }
    assert results["bad"]["log"] == ["what went wrong"] and "log" not in results["good"]
    assert results["good"]["command"].startswith("WITH=value python -c")
    with pytest.raises(ConfigError, match="is not empty"):
        next(run_jobs(jobs, tmp_path / "runs", 5, 60))
    late = dict(run_jobs(jobs[:1], tmp_path / "late", 5, budget=0))
    assert late["good"]["status"] == "not started"


def test_what_a_job_left_is_read_even_if_it_failed(tmp_path):
    folder = tmp_path / "half"
    written_losses(folder, {1: 3.0, 2: 2.0, 3: 1.5})
    (folder / "run_record.json").write_text(
        json.dumps({"device": "d", "python": "3", "versions": {}, "commit": "c"})
    )
    code = (
        "import shutil, sys; "
        f"shutil.copytree({str(folder)!r}, sys.argv[1], dirs_exist_ok=True); sys.exit(1)"
    )
    (_, result) = next(run_jobs([script("half", code)], tmp_path / "runs", 20, 20))
    assert result["status"] == "failed" and (result["device"], result["commit"]) == ("d", "c")
    assert result["losses"] == {1: 3.0, 2: 2.0, 3: 1.5}
    assert result["tokens_per_s"] == 250 and result["peak_gib"] == 3
    assert result["active_gib"] == 1.5


def plan(name, tmp_path):
    configs = {parallel.LLAMA: Path("llama.toml"), parallel.DEEPSEEK: Path("deepseek.toml")}
    gpus = 4 if name == "full" else 2
    return parallel.PLANS[name](parallel.Settings(configs, gpus=gpus), tmp_path)


@pytest.mark.parametrize("name", parallel.PLANS)
def test_plans(name, tmp_path):
    jobs = plan(name, tmp_path)
    names = [job.name for job in jobs]
    assert len(set(names)) == len(names)
    assert {job.needs for job in jobs} - {None} <= set(names)
    assert max(job.processes for job in jobs) == (4 if name == "full" else 2)
    # Each in bf16 too.
    trained = [job for job in jobs if job.group]
    assert {job.group for job in trained} == {
        job.group for job in trained if job.name.endswith(parallel.CONTROL)
    }


@pytest.mark.parametrize("gpus", [2, 6])
def test_full_models_need_more_gpus(gpus, tmp_path):
    settings = parallel.Settings({}, gpus=gpus)
    with pytest.raises(ConfigError, match="4, 8, 16"):
        parallel.PLANS["full"](settings, tmp_path)


def test_selected_jobs_come_with_what_they_need(tmp_path):
    jobs = plan("parallel", tmp_path)
    chosen = [job.name for job in select(jobs, ["EP=2 nvfp4"])]
    assert chosen == ["seed deepseek_v3", "deepseek_v3 EP=2 nvfp4"]
    assert select(jobs, []) == jobs
    with pytest.raises(ConfigError, match="no job has"):
        select(jobs, ["XP=2"])


def test_comparisons_and_figure(tmp_path):
    def result(losses, speed, group="llama3 CP=2"):
        fields = {"status": "ok", "tokens_per_s": speed, "peak_gib": speed / 2}
        return fields | {"losses": losses, "group": group}

    one = "llama3 1 GPU"
    results = {
        "llama3 1 GPU bf16": result({"1": 4.0, "2": 2.0}, 40, one),
        "llama3 1 GPU nvfp4": result({"1": 4.0, "2": 2.0}, 10, one),
        "llama3 CP=2 bf16": result({"1": 4.0, "2": 2.0}, 10),
        "llama3 CP=2 nvfp4": result({1: 4.0, 2: 2.2}, 5),
        "llama3 PP=2 nvfp4": {"status": "failed"},
    }
    figures = parallel.compared(results)
    assert figures.pop("llama3 1 GPU nvfp4 against bf16")["tokens_per_s_ratio"] == 0.25
    assert figures.pop("llama3 CP=2 bf16 against 1 GPU")["tokens_per_s_ratio"] == 0.25
    assert set(figures) == {f"llama3 CP=2 nvfp4 against {other}" for other in ("bf16", "1 GPU")}
    for figure in figures.values():
        assert figure["gap_of_last_ten_steps"] == pytest.approx(0.2 / 6)
        assert figure["largest_difference"] == pytest.approx(0.1)
        assert figure["tokens_per_s_ratio"] == figure["peak_memory_ratio"] == 0.5
    long = {str(step): 2.0 for step in range(1, 31)}
    half = {step: loss * (2 if int(step) <= 20 else 1.1) for step, loss in long.items()}
    group = "llama3 FSDP=2"
    pair = {f"{group} bf16": result(long, 1, group), f"{group} nvfp4": result(half, 1, group)}
    (figure,) = parallel.compared(pair).values()
    assert figure["gap_of_last_ten_steps"] == pytest.approx(0.1)
    parallel.plot(results, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 1000
    parallel.plot({"failed": {"status": "failed"}}, tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()
