"""Bad input ends in one line that names the fix, exit status 2, no traceback."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.torch_version import TorchVersion

from nvfp4_titan.errors import UnsupportedError, UserError
from nvfp4_titan.titan.launcher import main

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
CONFIG = os.path.join(ROOT, "train_configs", "llama3_debug.toml")


def launch(*argv, ngpu="1", cwd=None):
    """A job in a process of its own."""
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    done = subprocess.run(
        [sys.executable, "-m", "nvfp4_titan.train", f"--job.config_file={CONFIG}", *argv],
        env=environment | {"NGPU": ngpu},
        cwd=cwd,
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def start(tmp_path, monkeypatch, capfd):
    """The same in this process."""

    def run(*argv, config=CONFIG):
        monkeypatch.chdir(tmp_path)
        monkeypatch.delenv("RANK", raising=False)
        status = main([f"--job.config_file={config}", *argv])
        return status, *capfd.readouterr()

    return run


CASES = {
    "unknown recipe": (["--nvfp4.recipe=nvfp5"], "use one of nvfp4, bf16"),
    "rule that matches nothing": (["--nvfp4.rules=layers.*.w9=bf16"], "matches no linear"),
    "everything filtered away": (["--nvfp4.rules=*=bf16"], "nothing to convert"),
    "backend that this machine lacks": (["--nvfp4.backend=native"], "use backend = 'reference'"),
    "folder that is not there": (["--training.dataset_path=/nowhere"], "is not there"),
}


def check_one_line_and_status_two(status, out, err, fragment):
    assert status == 2, err[-2000:]
    [line] = [line for line in err.splitlines() if line.startswith("error: ")]
    assert fragment in line
    assert "Traceback" not in err + out


@pytest.mark.parametrize("case", CASES)
def test_one_line_and_status_two(case, start, tmp_path):
    argv, fragment = CASES[case]
    check_one_line_and_status_two(*start(*argv), fragment)
    assert not list(tmp_path.glob("outputs/**/run_record.json"))


def test_one_line_and_status_two_of_a_process(tmp_path):
    argv, fragment = CASES["unknown recipe"]
    check_one_line_and_status_two(*launch(*argv, cwd=tmp_path), fragment)


CHECKED = {
    "malformed rule": (["--nvfp4.rules=layers.0"], "glob=recipe"),
    "all blocks in bf16": (["--nvfp4.bf16_last_fraction=1"], "bf16_last_fraction"),
    "c4_test without its folder": (["--training.dataset=c4_test"], "is not there"),
    "dataset path that is a file": ([f"--training.dataset_path={__file__}"], "is not a folder"),
    "unknown dataset": (["--training.dataset=c5"], "use one of c4"),
    "unknown converter": (["--model.converters=nvfp5"], "use one of"),
    "unknown flavor": (["--model.flavor=9B"], "use one of debugmodel"),
    "unknown model": (["--model.name=llama9"], "is unknown"),
    "tokenizer that is not there": (["--model.hf_assets_path=/nowhere"], "is not there"),
    "assets without a tokenizer": (["--model.hf_assets_path=/usr/bin"], "holds no tokenizer"),
    "an optimizer that torchtitan lacks": (["--optimizer.name=SGD"], "use one of Adam, AdamW"),
    "a step that is not there": (
        ["--checkpoint.enable", "--checkpoint.load_step=77"],
        "step-77 is not there: use one of another run",
    ),
    "a load without checkpoints": (["--checkpoint.initial_load_path=/tmp"], "checkpoint.enable"),
    "a checkpoint that is not there": (
        ["--checkpoint.enable", "--checkpoint.initial_load_path=/nowhere"],
        "is not there",
    ),
    "frequency": (["--nvfp4.numerics_log_freq=-1"], "must be a number of steps"),
    **{
        f"{name} = {value}": ([f"--{name}={value}", "--checkpoint.enable"], f"{name} = .* must be")
        for name, value in (
            ("checkpoint.interval", 0),
            ("validation.freq", 0),
            ("metrics.log_freq", 0),
            ("validation.local_batch_size", 0),
            ("optimizer.lr", -1),
            ("training.max_norm", -1),
            ("lr_scheduler.warmup_steps", -1),
        )
    },
    "no step of validation": (["--validation.steps=0"], "validation steps must be positive"),
    "seq_len that is zero": (["--training.seq_len=0"], "must be positive"),
    "odd seq_len": (["--training.seq_len=37"], "multiple of 2"),
    "validation longer than training": (["--training.seq_len=64"], "validation.seq_len"),
    "batch that does not divide": (["--training.global_batch_size=6"], "multiple of"),
    "optimizer steps between microbatches": (
        ["--optimizer.early_step_in_backward", "--training.global_batch_size=16"],
        "changes weights in every microbatch",
    ),
    "more ranks than processes": (["--parallelism.data_parallel_shard_degree=3"], "change NGPU"),
    "tensor parallel on one": (["--parallelism.tensor_parallel_degree=2"], "change NGPU"),
    "no room for EP": (["--parallelism.expert_parallel_degree=2"], "does not divide"),
    "a profile of more steps than its cycle": (
        ["--profiling.enable_profiling", "--profiling.profile_freq=3"],
        "must be at least 4",
    ),
    "dump folder under a file": ([f"--job.dump_folder={__file__}/x"], "cannot be made"),
}
"""Through the same check, in this process."""


@pytest.mark.parametrize("case", CHECKED)
def test_checked_before_anything_starts(case, tmp_path, monkeypatch):
    from nvfp4_titan.titan.trainer import preflight

    monkeypatch.chdir(tmp_path)
    argv, fragment = CHECKED[case]
    with pytest.raises(UserError, match=fragment):
        preflight([f"--job.config_file={CONFIG}", *argv], 1)


@pytest.mark.parametrize("option", ["enable_profiling", "enable_memory_snapshot"])
def test_torchtitan_profiles_gpus_alone(option, tmp_path, monkeypatch):
    from nvfp4_titan.titan import checks
    from nvfp4_titan.titan.trainer import preflight

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(checks.cpu_runtime, "active", lambda: True)
    with pytest.raises(UserError, match=f"profiling.{option} needs a GPU"):
        preflight([f"--job.config_file={CONFIG}", f"--profiling.{option}"], 1)


@pytest.mark.parametrize(
    ("options", "fragment"),
    [
        (["--training.enable_cpu_offload"], "enable_cpu_offload needs a GPU"),
        (
            ["--checkpoint.enable", "--checkpoint.async_mode=async_with_pinned_mem"],
            "'async_with_pinned_mem' needs a GPU",
        ),
    ],
)
def test_offloading_needs_a_gpu(options, fragment, tmp_path, monkeypatch):
    from nvfp4_titan.titan import checks
    from nvfp4_titan.titan.trainer import preflight

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(checks.cpu_runtime, "active", lambda: True)
    with pytest.raises(UserError, match=fragment):
        preflight([f"--job.config_file={CONFIG}", *options], 1)


@pytest.mark.parametrize(
    ("name", "error", "status"),
    [
        ("train", KeyboardInterrupt(), 130),
        ("torchrun.main", SignalException("told", signal.SIGTERM), 143),
    ],
)
def test_who_stops_a_job_needs_no_traceback(name, error, status, start, monkeypatch):
    def stop(*args):
        raise error

    monkeypatch.setenv("NGPU", "1" if name == "train" else "2")
    monkeypatch.setattr(f"nvfp4_titan.titan.launcher.{name}", stop)
    ended, _, said = start()
    assert ended == status
    assert "interrupted: " in said or "stopped by SIGTERM" in said


def test_tp_is_compiled_where_torch_can(tmp_path, monkeypatch):
    from nvfp4_titan.titan.trainer import preflight

    monkeypatch.chdir(tmp_path)
    argv = [f"--job.config_file={CONFIG}", "--parallelism.tensor_parallel_degree=2"]
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.13.0+cpu"))
    with pytest.raises(UserError, match="set --compile.no-enable"):
        preflight([*argv, "--compile.enable"], 2)
    preflight(argv, 2)
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.11.0"))
    preflight([*argv, "--compile.enable"], 2)


def test_ep_needs_more_than_the_ranks_of_tp(tmp_path, monkeypatch):
    from nvfp4_titan.titan.trainer import preflight

    monkeypatch.chdir(tmp_path)
    argv = [f"--job.config_file={Path(CONFIG).with_name('deepseek_v3_debug.toml')}"]
    argv += [f"--parallelism.{kind}_parallel_degree=2" for kind in ("tensor", "expert")]
    with pytest.raises(UserError, match="on ranks of TP alone"):
        preflight(argv, 2)
    preflight(argv, 4)


SHARDED = {
    "DDP with TP": (
        4,
        {"data_parallel_replicate": 2, "data_parallel_shard": 1, "tensor_parallel": 2},
        [],
        "data_parallel_shard_degree two ranks or more",
    ),
    "DDP with PP": (
        4,
        {"data_parallel_replicate": 2, "data_parallel_shard": 1, "pipeline_parallel": 2},
        [],
        "data_parallel_shard_degree two ranks or more",
    ),
    "sequences that TP cannot split": (
        4,
        {"tensor_parallel": 4},
        ["--validation.enable", "--validation.seq_len=66"],
        "validation.seq_len = 66 must be a multiple of 4",
    ),
    "batches that a schedule cannot split": (
        2,
        {"pipeline_parallel": 2},
        ["--validation.enable", "--training.local_batch_size=4", "--validation.local_batch_size=6"],
        "validation.local_batch_size = 6 must be a multiple of 4",
    ),
    "a schedule that cannot validate": (
        2,
        {"pipeline_parallel": 2},
        ["--validation.enable", "--parallelism.pipeline_parallel_schedule=ZBVZeroBubble"],
        "ZBVZeroBubble cannot validate",
    ),
    "another that cannot": (
        2,
        {"pipeline_parallel": 2},
        ["--validation.enable", "--parallelism.pipeline_parallel_schedule=DualPipeV"],
        "DualPipeV cannot validate",
    ),
    "no microbatches": (
        2,
        {"pipeline_parallel": 2},
        ["--parallelism.pipeline_parallel_microbatch_size=0"],
        "microbatch_size = 0 must divide",
    ),
    "experts of gpt_oss over TP": (
        4,
        {"tensor_parallel": 2, "expert_parallel": 2, "expert_tensor_parallel": 2},
        ["--model.name=gpt_oss"],
        "adds the biases",
    ),
}


@pytest.mark.parametrize("case", SHARDED)
def test_what_torchtitan_shards_wrongly(case, tmp_path, monkeypatch):
    from nvfp4_titan.titan.trainer import preflight

    monkeypatch.chdir(tmp_path)
    ranks, degrees, argv, fragment = SHARDED[case]
    argv = [f"--parallelism.{name}_degree={degree}" for name, degree in degrees.items()] + argv
    with pytest.raises(UserError, match=fragment):
        preflight([f"--job.config_file={CONFIG}", *argv], ranks)


def test_a_dump_folder_must_be_writable(tmp_path, monkeypatch):
    from nvfp4_titan.titan.trainer import preflight

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write everywhere
    with pytest.raises(UserError, match="cannot be written"):
        preflight([f"--job.config_file={CONFIG}"], 1)


def test_a_folder_of_checkpoints_is_no_checkpoint(tmp_path, monkeypatch):
    from nvfp4_titan.titan.trainer import preflight

    monkeypatch.chdir(tmp_path)
    for step in (5, 10):
        (tmp_path / "earlier" / f"step-{step}").mkdir(parents=True)
    argv = [f"--job.config_file={CONFIG}", "--checkpoint.enable"]
    with pytest.raises(UserError, match="give one of them, such as earlier/step-10"):
        preflight([*argv, "--checkpoint.initial_load_path=earlier"], 1)
    preflight([*argv, "--checkpoint.initial_load_path=earlier/step-5"], 1)


def test_a_global_batch_must_divide_over_the_ranks(tmp_path, monkeypatch):
    from nvfp4_titan.titan.trainer import preflight

    monkeypatch.chdir(tmp_path)
    argv = [f"--job.config_file={CONFIG}", "--training.local_batch_size=2"]
    preflight([*argv, "--training.global_batch_size=8"], 2)
    with pytest.raises(UserError, match="must be a multiple of 4: .* on 2 ranks"):
        preflight([*argv, "--training.global_batch_size=6"], 2)
    # Ranks of one model see one batch.
    tp = "--parallelism.tensor_parallel_degree=2"
    preflight([*argv, "--training.global_batch_size=6", tp], 2)


@pytest.mark.parametrize(
    ("content", "fragment"), [(None, "is empty"), ("{", "cannot be read as a tokenizer")]
)
def test_a_broken_tokenizer(content, fragment, tmp_path, monkeypatch):
    from nvfp4_titan.titan.trainer import preflight

    monkeypatch.chdir(tmp_path)
    (tmp_path / "assets").mkdir()
    if content:
        (tmp_path / "assets" / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match=fragment):
        preflight([f"--job.config_file={CONFIG}", "--model.hf_assets_path=assets"], 1)


def test_a_config_module_of_ones_own(tmp_path, monkeypatch):
    from nvfp4_titan.titan.trainer import preflight

    for name, base in (("plain", "torchtitan.config"), ("derived", "nvfp4_titan.titan.job_config")):
        (tmp_path / f"{name}_config.py").write_text(
            f"from dataclasses import dataclass, field\nfrom {base} import JobConfig as Base\n"
            "@dataclass\nclass Mine:\n    depth: int = 3\n"
            "@dataclass\nclass JobConfig(Base):\n    mine: Mine = field(default_factory=Mine)\n"
        )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    argv = [f"--job.config_file={CONFIG}", "--model.converters=nvfp4"]
    text = Path(CONFIG).read_text()
    (tmp_path / "both.toml").write_text(text + '[qat]\nrecipe = "mxfp8"\n')
    for config in (CONFIG, tmp_path / "both.toml"):
        own = [f"--job.config_file={config}", "--job.custom_config_module=plain_config"]
        with pytest.raises(UserError, match="your own config module derive from"):
            preflight([*argv[1:], *own], 1)
    found = preflight([*argv, "--job.custom_config_module=derived_config"], 1)
    assert found.nvfp4.recipe == "nvfp4" and hasattr(found, "mine")


def test_settings_without_their_converter_are_named(tmp_path, monkeypatch, caplog):
    from torchtitan.tools.logging import logger

    from nvfp4_titan.titan.trainer import preflight

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(logger, "propagate", True)
    argv = [f"--job.config_file={CONFIG}", "--nvfp4.recipe=nvpf4", "--nvfp4.no-sr"]
    preflight([*argv, "--qat.skip=output", "--model.converters", ""], 1)
    assert "[nvfp4] recipe, sr: without effect" in caplog.text
    assert "[qat] skip: without effect" in caplog.text


@pytest.mark.parametrize(
    ("options", "processes"),
    [
        (["--training.global_batch_size=16"], 1),
        (["--parallelism.pipeline_parallel_degree=2"], 2),
    ],
)
def test_cuda_graphs_take_one_microbatch_a_step(options, processes, tmp_path, monkeypatch):
    from torch._inductor import config

    from nvfp4_titan.titan.trainer import preflight

    monkeypatch.chdir(tmp_path)
    one = [f"--job.config_file={CONFIG}", "--compile.enable"]
    with config.patch("triton.cudagraphs", True):
        preflight(one, 1)
        with pytest.raises(UnsupportedError, match="unset TORCHINDUCTOR_CUDAGRAPHS"):
            preflight([*one, *options], processes)
    preflight([*one, *options], processes)


TOML_CASES = {
    'recipe = "nvfp4" ': {
        'recipee = "nvfp4" ': "recipee",
        'experts = "no"\nrecipe = "nvfp4" ': "nvfp4.experts = 'no' must be true or false",
    },
    "seed = 0 ": {
        'keep_weights = "allways"\nseed = 0 ': "nvfp4.keep_weights = 'allways' must be one"
    },
    "bf16_first_layers = 0 ": {'bf16_first_layers = "two" ': "must be an integer"},
    "rules = [] ": {
        'rules = "layers.*=bf16" ': "list of strings",
        "rules = [1] ": "list of strings",
    },
    "[job]": {"job = 3\n[other]": "must be a section"},
    'custom_config_module = "nvfp4_titan': {'custom_config_module = "nvfp5_titan': "nvfp5_titan"},
}


@pytest.mark.parametrize(
    ("old", "new", "fragment"),
    [(old, new, text) for old, cases in TOML_CASES.items() for new, text in cases.items()],
)
def test_toml_of_wrong_keys_and_types(old, new, fragment, tmp_path, monkeypatch):
    from nvfp4_titan.titan.trainer import preflight

    text = open(CONFIG).read()
    assert old in text
    config = tmp_path / "bad.toml"
    config.write_text(text.replace(old, new))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=fragment) as caught:
        preflight([f"--job.config_file={config}"], 1)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [None, "not toml"])
def test_bad_config_file(start, tmp_path, content):
    config = tmp_path / "bad.toml"
    if content:
        config.write_text(content)
    check_one_line_and_status_two(*start(config=str(config)), str(config))


def test_several_workers_agree_on_the_status(tmp_path):
    result = launch("--nvfp4.rules=layers.9.*=bf16", ngpu="2", cwd=tmp_path)
    check_one_line_and_status_two(*result, "matches no linear")


def test_number_of_processes(start, monkeypatch):
    monkeypatch.setenv("NGPU", "x")
    check_one_line_and_status_two(*start(), "NGPU='x'")


def test_help_shows_the_docstrings(start, monkeypatch, capfd):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as ended:
        start("--help")
    assert ended.value.code == 0
    words = " ".join(capfd.readouterr().out.replace("\u2502", " ").split())
    for fragment in ("--nvfp4.recipe", "--nvfp4.bf16-last-fraction", "The last match wins; rules"):
        assert fragment in words
