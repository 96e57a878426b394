"""What some GPUs can show of every parallelism: plans of jobs, as data, and what is compared.

"parallel": every kind of parallelism at the convergence sizes, NVFP4 beside bf16. All jobs of a
model start from one seed checkpoint. Tensor, pipeline and context parallelism read the batches of
one GPU; data and expert parallelism those of two loaders.

"width": Llama3 8B and DeepSeekV3 16B with fewer blocks (the same GEMMs), compiled, on two GPUs.

"full": both as they are, compiled, on four GPUs or more.

torchtitan computes in bf16 where FSDP, context parallelism (which shards by FSDP) or DDP's autocast
does; with TP or PP alone it computes in fp32, in the control too.
"""

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path

from matplotlib.figure import Figure

from ..errors import ConfigError
from .jobs import Job

LLAMA, DEEPSEEK = "llama3", "deepseek_v3"
ONE_GPU = "1 GPU"
CONTROL, RAISES = "bf16", "one rank raises"
VARIANTS = {
    CONTROL: ("--model.converters=",),
    "nvfp4": ("--model.converters=nvfp4",),
    "nvfp4 fp4_all_gather": ("--model.converters=nvfp4", "--nvfp4.fp4_all_gather"),
}
FSDP_VARIANTS = tuple(VARIANTS)
DEGREES = {
    "FSDP=2": ("--parallelism.data_parallel_shard_degree=2",),
    "TP=2": ("--parallelism.tensor_parallel_degree=2",),
    "EP=2": ("--parallelism.expert_parallel_degree=2",),
    "CP=2": ("--parallelism.context_parallel_degree=2",),
    "PP=2": (
        "--parallelism.pipeline_parallel_degree=2",
        "--parallelism.pipeline_parallel_microbatch_size=2",
    ),
    "DDP=2": (
        "--parallelism.data_parallel_replicate_degree=2",
        "--parallelism.data_parallel_shard_degree=1",
    ),
    ONE_GPU: (),
}
EAGER = {"TP=2", "CP=2", "PP=2", "DDP=2", ONE_GPU}
"""They are short, or their graphs cannot be cached."""


@dataclass(frozen=True)
class Settings:
    """Settings of a plan.

    Attributes:
        configs: TOML by model.
        steps: Steps of the long jobs.
        short_steps: Steps of the short ones.
        flavors: Model flavor in place of the TOML's, by model.
        options: torchtitan's, for every job.
        nvfp4_options: Further ones of NVFP4 jobs.
        compile: Whether jobs may compile.
        gpus: Of the "full" plan; the others take two.
    """

    configs: dict[str, Path]
    steps: int = 100
    short_steps: int = 20
    flavors: dict[str, str] = field(default_factory=dict)
    options: tuple[str, ...] = ()
    nvfp4_options: tuple[str, ...] = ()
    compile: bool = True
    gpus: int = 2


def parallel_plan(settings: Settings, folder: Path) -> list[Job]:
    """Jobs of the "parallel" plan.

    Args:
        settings: Settings.
        folder: Folder of the jobs' dump folders.
    """
    seeds = {model: folder.absolute() / f"seed_{model}" for model in (LLAMA, DEEPSEEK)}
    jobs = [_seed(settings, model, path) for model, path in seeds.items()]

    def add(model: str, kind: str, variants: Iterable[str], steps: int) -> None:
        start = (
            "--checkpoint.enable",
            "--checkpoint.load_only",
            f"--checkpoint.initial_load_path={seeds[model]}/checkpoint/step-0",
        )
        jobs.extend(
            replace(
                _job(settings, model, kind, v, steps, (*DEGREES[kind], *start)),
                needs=_seed_name(model),
            )
            for v in variants
        )

    add(LLAMA, "FSDP=2", FSDP_VARIANTS, settings.steps)
    add(DEEPSEEK, "EP=2", (CONTROL, "nvfp4"), settings.steps)
    add(LLAMA, "TP=2", (CONTROL, "nvfp4"), settings.steps)
    for kind in (ONE_GPU, "CP=2", "PP=2", "DDP=2"):
        add(LLAMA, kind, (CONTROL, "nvfp4"), settings.short_steps)
    return [*jobs, _raising(settings)]


def width_plan(settings: Settings, folder: Path) -> list[Job]:
    """Jobs of the "width" plan; arguments as of `parallel_plan`."""
    return _large(
        settings, ((LLAMA, "FSDP=2", DEGREES["FSDP=2"]), (DEEPSEEK, "EP=2", DEGREES["EP=2"]))
    )


def full_plan(settings: Settings, folder: Path) -> list[Job]:
    """Jobs of the "full" plan; arguments as of `parallel_plan`.

    Raises:
        ConfigError: a number of GPUs that the models' experts and blocks cannot be dealt to.
    """
    n = settings.gpus
    if n < 4 or n & (n - 1):
        raise ConfigError(f"the full models take 4, 8, 16 .. GPUs, not {n}: give --gpus")
    experts = (f"--parallelism.expert_parallel_degree={n}",)
    if n < 8:
        experts += ("--training.local_batch_size=1",)  # 80 GB have room for no more
    kinds = (
        (LLAMA, f"FSDP={n}", ()),
        (LLAMA, f"FSDP={n // 2}xTP=2", DEGREES["TP=2"]),
        (DEEPSEEK, f"EP={n}", experts),
    )
    return _large(settings, kinds)


def _large(settings: Settings, kinds: Iterable[tuple[str, str, tuple[str, ...]]]) -> list[Job]:
    """A job for each kind (model, name, options) and variant."""
    start = ("--checkpoint.no-enable", "--debug.seed=0")
    return [
        _job(settings, model, kind, variant, settings.short_steps, (*options, *start))
        for (model, kind, options), variant in product(kinds, FSDP_VARIANTS)
    ]


def _seed_name(model: str) -> str:
    return f"seed {model}"


def _seed(settings: Settings, model: str, path: Path) -> Job:
    options = (
        "--checkpoint.enable",
        "--checkpoint.create_seed_checkpoint",
        f"--job.dump_folder={path}",
        "--validation.no-enable",
        *settings.options,
    )
    return Job(_seed_name(model), settings.configs[model], 1, options)


def _job(
    settings: Settings, model: str, kind: str, variant: str, steps: int, own: tuple[str, ...]
) -> Job:
    compiled = settings.compile and kind not in EAGER
    options = (
        *VARIANTS[variant],
        *(f"--model.flavor={settings.flavors[m]}" for m in settings.flavors if m == model),
        f"--training.steps={steps}",
        f"--lr_scheduler.warmup_steps={max(1, steps // 5)}",
        "--validation.no-enable",
        "--compile.enable" if compiled else "--compile.no-enable",
        *own,
        *settings.options,
        *(settings.nvfp4_options if variant != CONTROL else ()),
    )
    processes = 1 if kind == ONE_GPU else settings.gpus
    name = f"{model} {kind} {variant}"
    return Job(name, settings.configs[model], processes, options, f"{model} {kind}")


def _raising(settings: Settings) -> Job:
    own = (*DEGREES["FSDP=2"], "--compile.no-enable")
    job = _job(settings, LLAMA, "FSDP=2", "nvfp4", settings.short_steps, own)
    return replace(
        job,
        name=RAISES,
        options=(*job.options, "--experimental.custom_import=nvfp4_titan.titan.fail_at"),
        group="",
        environment={"FAIL_AT": "raise,3"},
        must_fail_with="injected",
    )


PLANS = {"parallel": parallel_plan, "width": width_plan, "full": full_plan}


def compared(results: dict[str, dict]) -> dict[str, dict]:
    """Figures of pairs of finished jobs that started from the same weights.

    NVFP4 against bf16, and context and pipeline parallelism against one GPU on the same batches:
    the gap of the mean loss of the last ten steps, the largest relative difference of a step's
    loss, ratios of tokens per second of a GPU and of peak memory.
    """
    figures = {}
    for name, result in results.items():
        group = result.get("group", "")  # "MODEL KIND"
        model, _, kind = group.partition(" ")
        pairs = {CONTROL: f"{group} {CONTROL}"}
        if kind in ("CP=2", "PP=2"):
            pairs[ONE_GPU] = f"{model} {ONE_GPU}{name.removeprefix(group)}"
        for label, other in pairs.items():
            control = results.get(other, {})
            if other == name or not (_finished(result) and _finished(control)):
                continue
            figures[f"{name} against {label}"] = _figures(result, control)
    return figures


def _finished(result: dict) -> bool:
    return result.get("status") == "ok" and "losses" in result


def _figures(run: dict, control: dict) -> dict:
    losses, others = (_by_step(r) for r in (run, control))
    steps = sorted(losses.keys() & others.keys())
    tail = steps[-10:]
    mean, control_mean = (sum(x[s] for s in tail) / len(tail) for x in (losses, others))
    return {
        "steps": len(steps),
        "gap_of_last_ten_steps": mean / control_mean - 1,
        "largest_difference": max(abs(losses[s] / others[s] - 1) for s in steps),
        "tokens_per_s_ratio": run["tokens_per_s"] / control["tokens_per_s"],
        "peak_memory_ratio": run["peak_gib"] / control["peak_gib"],
    }


def _by_step(result: dict) -> dict[int, float]:
    # Keys of a JSON file are strings.
    return {int(step): loss for step, loss in result["losses"].items()}


def plot(results: dict[str, dict], path: Path) -> None:
    """Loss curves, one panel per model and parallelism, tokens per second in the legend."""
    groups: dict[str, list[str]] = {}
    for name, result in results.items():
        if "losses" in result and result.get("group"):
            groups.setdefault(result["group"], []).append(name)
    if not groups:
        print("no run got as far as a loss: no figure", file=sys.stderr)
        return
    columns = min(4, len(groups))
    rows = -(-len(groups) // columns)
    figure = Figure(figsize=(4 * columns, 3.2 * rows), layout="constrained")
    panels: Sequence = figure.subplots(rows, columns, squeeze=False).flatten()
    for panel, (group, names) in zip(panels, groups.items(), strict=False):
        for name in names:
            losses = _by_step(results[name])
            label = f"{name.removeprefix(group).strip()}: {results[name]['tokens_per_s']:,.0f}/s"
            panel.plot(list(losses), list(losses.values()), label=label, linewidth=1)
        panel.set(title=group, xlabel="step", ylabel="loss")
        panel.grid(alpha=0.3)
        panel.legend(title="tokens/s of a GPU", fontsize="small")
    for panel in panels[len(groups) :]:
        panel.set_axis_off()
    figure.savefig(path, dpi=110)
