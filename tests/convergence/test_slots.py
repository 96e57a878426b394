"""Jobs side by side: really so, each on its GPU; failures, time limits and signals."""

import json
import signal
import subprocess
import sys
import tarfile
import time
from types import SimpleNamespace

import fake_jobs
import pytest
from fake_jobs import CONFIG, MEET, START, UNTIL_STOPPED, starts

from nvfp4_titan.convergence import progress, slots
from nvfp4_titan.convergence.check import Plan, run_all
from nvfp4_titan.convergence.launch import Job
from nvfp4_titan.convergence.runs import check_settings
from nvfp4_titan.convergence.slots import Slots
from nvfp4_titan.convergence.variants import parse_variant
from nvfp4_titan.errors import ConfigError, OutOfTime

PAIR = ("bf16_seed0", "nvfp4_seed0")


@pytest.fixture
def use(monkeypatch):
    monkeypatch.delenv("NGPU", raising=False)
    return lambda program: fake_jobs.use(program, monkeypatch.setattr)


def plan(folder, seeds=(0,)):
    return Plan(CONFIG, folder, tuple(map(parse_variant, ("bf16", "nvfp4"))), seeds)


def test_runs_meet_on_their_gpus_and_count_elsewhere(tmp_path, use):
    use(MEET.format(count=2))
    found = run_all(plan(tmp_path), Slots(("3", "GPU-5a")))
    assert list(found.runs) == [("bf16", 0), ("nvfp4", 0)] and not found.errors
    made = {"bf16_seed0": ["3"], "nvfp4_seed0": ["GPU-5a"]}
    assert starts(tmp_path) == made
    assert "GPU-5a" not in (tmp_path / "nvfp4_seed0" / "request.json").read_text()
    assert len(run_all(plan(tmp_path), Slots()).runs) == 2
    assert starts(tmp_path) == made


def test_every_gpu_is_filled_before_a_second_share(tmp_path, use):
    use(MEET.format(count=3))
    assert [e["CUDA_VISIBLE_DEVICES"] for e in Slots(("1", "0"), 2).environments()] == list("1001")
    three = Plan(CONFIG, tmp_path, (parse_variant("bf16"),), (0, 1, 2))
    assert len(run_all(three, Slots(("1", "0"), 2)).runs) == 3
    assert starts(tmp_path) == {"bf16_seed0": ["1"], "bf16_seed1": ["0"], "bf16_seed2": ["0"]}


def test_without_gpus_one_after_another_in_this_environment(tmp_path, use, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "as_it_was")
    alone = 'alone = folder.parent / "alone"; alone.mkdir(); time.sleep(0.1); alone.rmdir()'
    use(START + alone)
    assert len(run_all(plan(tmp_path, (0, 1)), Slots()).runs) == 4
    assert list(starts(tmp_path).values()) == [["as_it_was"]] * 4


def test_a_failure_does_not_stop_the_others(tmp_path, use, capsys):
    use(START + 'time.sleep(folder.name == "bf16_seed0"); assert folder.name != "nvfp4_seed0"')
    found = run_all(plan(tmp_path, (0, 1)), Slots(("0", "1")))
    # In the plan's order, though the first took longest.
    assert list(found.runs) == [("bf16", 0), ("bf16", 1), ("nvfp4", 1)]
    assert list(found.errors) == [("nvfp4", 0)] and "log.txt" in found.errors["nvfp4", 0]
    assert f"error: {found.errors['nvfp4', 0]}\n" in capsys.readouterr().out


def recorded(corpus, path=None):
    training = {"dataset": "pysource", "dataset_path": path} | dict.fromkeys(
        ("seq_len", "local_batch_size", "global_batch_size", "max_norm", "steps"), 8
    )
    sections = {"model": {"flavor": "x"}, "training": training}
    config = sections | dict.fromkeys(("optimizer", "lr_scheduler", "validation"), {})
    hashes = {"training": corpus} if corpus else {}
    return {"corpus_sha256": hashes, "tokenizer_sha256": "t", "config": config}


def test_a_run_that_could_not_be_compared_is_stopped_at_its_start(tmp_path, use):
    """Its text is not that of the control, which was made elsewhere."""
    say = (
        START
        + "folder.joinpath('run_record.json').write_text({record!r}); print('step: 1 loss: 2')"
    )
    use(say.format(record=json.dumps(recorded("a"))))
    control = Plan(CONFIG, tmp_path, (parse_variant("bf16"),), (0,))
    assert not run_all(control, Slots()).errors
    other = say.format(record=json.dumps(recorded("b"))) + "\nsys.stdout.flush(); until_stopped()"
    use(other)
    start = time.monotonic()
    errors = run_all(plan(tmp_path), Slots()).errors
    assert time.monotonic() - start < 20
    assert "nvfp4_seed0 was stopped at its start: corpus_sha256" in errors["nvfp4", 0]
    assert not (tmp_path / "nvfp4_seed0" / "checkpoint").exists()
    use(say.format(record=json.dumps(recorded("a"))))
    assert len(run_all(plan(tmp_path), Slots()).runs) == 2
    assert len(starts(tmp_path)["nvfp4_seed0"]) == 1  # anew: no trace of the other text


def test_a_text_is_the_same_wherever_it_lies(tmp_path):
    check_settings(recorded("a"), recorded("a", "/elsewhere"), tmp_path, tmp_path)
    with pytest.raises(ConfigError, match=r"corpus_sha256 differs"):
        check_settings(recorded("a"), recorded("b"), tmp_path, tmp_path)
    with pytest.raises(ConfigError, match=r"training\.dataset_path differs"):
        check_settings(recorded(None), recorded(None, "/elsewhere"), tmp_path, tmp_path)


def test_a_time_limit_stops_all_and_the_next_call_goes_on(tmp_path, use, monkeypatch, capsys):
    use(UNTIL_STOPPED)
    two = Slots(("0", "1"))
    with pytest.raises(ConfigError, match="--time-limit 30: no run starts"):
        run_all(plan(tmp_path, (0, 1)), two, 30)
    assert not starts(tmp_path)
    monkeypatch.setattr(slots, "_LEAST_SECONDS", 0)
    with pytest.raises(OutOfTime, match="4 of 4 runs are left"):
        run_all(plan(tmp_path, (0, 1)), two, 3)
    assert set(starts(tmp_path)) == set(PAIR)
    assert {f.parents[1].name for f in tmp_path.glob("*/checkpoint/step-7")} == set(PAIR)
    assert "nvfp4_seed0 was stopped" in capsys.readouterr().out
    use(START)
    assert len(run_all(plan(tmp_path, (0, 1)), two).runs) == 4
    monkeypatch.setattr(slots, "_LEAST_SECONDS", 60)
    assert len(run_all(plan(tmp_path, (0, 1)), two, 30).runs) == 4  # nothing is left to start
    assert {name: len(of) for name, of in starts(tmp_path).items()} == {
        "bf16_seed0": 2, "nvfp4_seed0": 2, "bf16_seed1": 1, "nvfp4_seed1": 1,
    }  # fmt: skip


def test_what_is_no_failure_of_a_job_stops_all(tmp_path, use, monkeypatch):
    use(UNTIL_STOPPED)
    command = Job.command

    def broken(job):
        if job.folder.name == "nvfp4_seed0":
            deadline = time.monotonic() + 20
            while not (tmp_path / "bf16_seed0" / "ready").exists() and time.monotonic() < deadline:
                time.sleep(0.01)
            raise OSError("injected")
        return command(job)

    monkeypatch.setattr(Job, "command", broken)
    with pytest.raises(OSError, match="injected"):
        run_all(plan(tmp_path, (0, 1)), Slots(("0", "1")))
    assert (tmp_path / "bf16_seed0" / "checkpoint" / "step-7").is_dir()
    assert set(starts(tmp_path)) == {"bf16_seed0"}


@pytest.mark.parametrize(("number", "times"), [(signal.SIGTERM, 2), (signal.SIGINT, 1)])
def test_signals_stop_all_which_save(tmp_path, number, times):
    runs, archive = tmp_path / "runs", tmp_path / "runs.tar.gz"
    own = [str(CONFIG), "--output=x", f"--runs={runs}", f"--pack={archive}", "--no-report"]
    argv = [*own, "--seeds", "0", "1", "--gpus", "0", "1"]
    command = [sys.executable, fake_jobs.__file__]
    process = subprocess.Popen([*command, "FIRST_ENDS", *argv], stderr=subprocess.PIPE, text=True)
    stopped = {"nvfp4_seed0", "bf16_seed1"}  # the first run's slot has taken the third
    deadline = time.monotonic() + 60
    # What has ended is packed by then: a machine may go without a word.
    while {f.parent.name for f in runs.glob("*/ready")} != stopped or not archive.is_file():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    for _ in range(times):
        process.send_signal(number)
    assert "interrupted: call it again" in process.communicate(timeout=30)[1]
    assert process.returncode == 130
    assert {file.parents[1].name for file in runs.glob("*/checkpoint/step-7")} == stopped
    assert set(starts(runs)) == {"bf16_seed0", *stopped}
    with tarfile.open(archive) as tar:
        assert {name.partition("/")[0] for name in tar.getnames()} == {"bf16_seed0"}
    assert subprocess.run([*command, "START", *argv, "--per-gpu=2"]).returncode == 0
    assert len(starts(runs)["nvfp4_seed1"]) == 1 and len(starts(runs)["bf16_seed0"]) == 1
    requests = [json.loads(file.read_text()) for file in runs.glob("*/request.json")]
    assert [request["finished"] for request in requests] == [True] * 4


@pytest.mark.parametrize(
    ("options", "ngpu", "message"),
    [
        (["--gpus", "0", "1", "0"], "1", "names a GPU twice"),
        (["--gpus", "0,1"], "1", "as in --gpus 0 1"),
        (["--gpus", ""], "1", "one id per GPU"),
        (["--gpus", "0"], "8", "unset NGPU"),
        (["--gpus", "0", "--per-gpu", "0"], "1", "give 1 or more"),
        (["--per-gpu", "2"], "1", "name them with --gpus"),
        (["--gpus", "77"], "1", "no GPU 77"),
    ],
)
def test_slots_that_make_no_sense(tmp_path, monkeypatch, capsys, options, ngpu, message):
    monkeypatch.setenv("NGPU", ngpu)
    monkeypatch.setattr(Job, "command", lambda job: pytest.fail("a job was started"))
    for name in ("check_convergence", "compare_recipes"):
        if name == "compare_recipes" and "--per-gpu" in options:
            continue
        argv = [str(CONFIG), "--output=x", f"--runs={tmp_path}", *options]
        assert fake_jobs.script(name).main(argv) == 2
        assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_progress(monkeypatch, capsys):
    clock = SimpleNamespace(monotonic=lambda: clock.now, now=0.0)
    monkeypatch.setattr(progress, "time", clock)
    shown = progress.Progress(100, 5)
    shown.begin("a")
    shown.begin("b")
    clock.now = 100.0
    shown.show()
    assert not capsys.readouterr().out  # no step was made yet
    for now, of_a, of_b in ((101.0, 10, 0), (111.0, 20, 10), (131.0, 40, 20)):
        clock.now = now
        shown.step("a", of_a, "2.5")
        shown.step("b", of_b, "3.5" if of_b else "")
    # A second a step, two of b's: a ends in 60 s and takes the third and, at 260 s, the fifth; b
    # in 160 s the fourth. Waiting runs count 200 s each.
    assert shown.line() == ("a 40/100 loss 2.5, b 20/100 loss 3.5; 5 of 5 runs left, about 7m40s")
    shown.end("b")
    shown.begin("c")
    shown.show()
    shown.show()
    assert capsys.readouterr().out == "" and shown.line().startswith("a 40/100 loss 2.5, c starts;")
    clock.now = 200.0
    shown.show()
    shown.show()
    assert capsys.readouterr().out.count("4 of 5 runs left") == 1
    assert progress.Progress(None, 1).line() == ""


def test_steps_of_an_earlier_start_are_not_progress(tmp_path):
    from nvfp4_titan.convergence.launch import last_step

    log = tmp_path / "log.txt"
    log.write_text("step:  7  loss:  2.5\n")
    assert last_step(log) == (7, "2.5") and last_step(log, log.stat().st_size) == (0, "")
