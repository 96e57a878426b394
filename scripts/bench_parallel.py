#!/usr/bin/env python
"""Train under every parallelism, NVFP4 beside bf16; record curves, tokens/s and memory.

    scripts/bench_parallel.py --output docs/results/two_gpus           # about 8 minutes on two H100
    scripts/bench_parallel.py --plan width --output docs/results/two_gpus_width
    scripts/bench_parallel.py --plan full --gpus 8 --output docs/results/eight_gpus

Writes OUTPUT.json, after each job, and OUTPUT.png. What fails or hangs is recorded and the next
job starts; jobs that OUTPUT.json has from an earlier call stay in it unless this call runs them.
Options after -- go to every job.
"""

import json
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from nvfp4_titan.bench import require_gpu
from nvfp4_titan.bench.jobs import run_jobs, select
from nvfp4_titan.bench.parallel import DEEPSEEK, LLAMA, PLANS, Settings, compared, plot
from nvfp4_titan.command import exit_status, result_file, split_options
from nvfp4_titan.errors import ConfigError
from nvfp4_titan.titan.corpus import tokenizer_path
from nvfp4_titan.toml import read_toml

CONFIGS = Path(__file__).parents[1] / "train_configs"
SIZES = {
    "parallel": ("llama3_150m", "deepseek_v3_200m"),
    "width": ("llama3_8b", "deepseek_v3_16b"),
    "full": ("llama3_8b", "deepseek_v3_16b"),
}
OPTIONS = {
    "parallel": ("--training.dataset=stdlib", "--training.local_batch_size=8"),
    "width": ("--training.dataset=pysource",),
    "full": ("--training.dataset=pysource",),
}
FLAVORS = {"width": {LLAMA: "8B_8_layers", DEEPSEEK: "16B_6_layers"}}


@dataclass
class Arguments:
    """Run a plan of jobs."""

    output: Path
    """Path of the results, without a suffix."""
    plan: Literal["parallel", "width", "full"] = "parallel"
    """parallel: every parallelism at 150M and 200M parameters; width: Llama3 8B and DeepSeekV3 16B
    with fewer blocks; full: both as they are."""
    gpus: int | None = None
    """Of the full plan: 4, 8, 16 ..; the others take 2."""
    folder: Path = Path("outputs/bench_parallel")
    """New folder for the runs."""
    llama: Path | None = None
    """TOML of a Llama3 model in place of the plan's."""
    deepseek: Path | None = None
    """TOML of a DeepSeekV3 model in place of the plan's."""
    only: tuple[str, ...] = ()
    """Parts of the names of jobs to run, such as FSDP=2; all by default."""
    steps: int = 100
    """Steps of the long jobs."""
    short_steps: int = 20
    """Steps of the short jobs."""
    compile: bool = True
    """Compile where the plan does."""
    backend: str = "auto"
    """nvfp4.backend."""
    timeout: float = 150
    """Seconds of one job."""
    budget: float = 540
    """Seconds of all."""

    def settings(self, options: tuple[str, ...]) -> Settings:
        """What the plan is made from; options are torchtitan's, for every job."""
        for config in filter(None, (self.llama, self.deepseek)):
            read_toml(config)
        given = {m: path for m, path in ((LLAMA, self.llama), (DEEPSEEK, self.deepseek)) if path}
        if self.gpus not in (None, 2) and self.plan != "full":
            raise ConfigError(f"plan {self.plan} takes 2 GPUs: leave out --gpus {self.gpus}")
        planned = zip((LLAMA, DEEPSEEK), SIZES[self.plan], strict=True)
        return Settings(
            {model: CONFIGS / f"{name}.toml" for model, name in planned} | given,
            self.steps,
            self.short_steps,
            {m: flavor for m, flavor in FLAVORS.get(self.plan, {}).items() if m not in given},
            (*OPTIONS[self.plan], f"--model.hf_assets_path={tokenizer_path()}", *options),
            (f"--nvfp4.backend={self.backend}",),
            self.compile,
            self.gpus or 2,
        )


def _earlier(path: Path) -> dict[str, dict]:
    """The jobs that a results file has, {} where there is none."""
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text())["runs"]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} is no file of jobs' results: give another --output") from error


def main(argv: list[str]) -> int:
    own, options = split_options(argv)
    arguments = tyro.cli(Arguments, args=own)
    kept = f"interrupted: the jobs that have ended are in {arguments.output}.json"
    return exit_status(lambda: _bench(arguments, options), kept)


def _bench(arguments: Arguments, options: tuple[str, ...]) -> int:
    if not (arguments.llama or arguments.deepseek):
        require_gpu()  # a model of one's own may be small enough for a CPU
    path = result_file(arguments.output, ".json")
    results = _earlier(path)
    plan = PLANS[arguments.plan](arguments.settings(options), arguments.folder)
    jobs = select(plan, arguments.only)
    for name, result in run_jobs(jobs, arguments.folder, arguments.timeout, arguments.budget):
        speed = f", {result['tokens_per_s']:,.0f} tokens/s" if "losses" in result else ""
        print(f"{name}: {result['status']}, {result['seconds']:.0f} s{speed}", flush=True)
        results[name] = result
        content = {"command": shlex.join(sys.argv), "compared": compared(results)}
        path.write_text(json.dumps(content | {"runs": results}, indent=1) + "\n")
    plot(results, result_file(arguments.output, ".png"))
    print(json.dumps(compared(results), indent=1))
    return int(any(results[job.name]["status"] != "ok" for job in jobs))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
