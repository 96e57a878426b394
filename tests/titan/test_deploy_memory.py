"""Finalize holds about a shard: 12 times the layers do not take 12 times the memory.

What Linux calls the peak of a process of its own is measured: PyTorch's memory is not Python's, and
getrusage's peak counts that of the process that started it.
"""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
from torch.distributed import checkpoint as dcp

LAYERS = (1, 12)
# Another model of the same layers first: what the program itself takes is in its peak.
MEASURE = """
import re, sys
from pathlib import Path
from nvfp4_titan.titan import cpu_runtime
cpu_runtime.install()
from test_deploy_memory import register
from nvfp4_titan.titan.finalize import FinalizeOptions, finalize
register()
options = FinalizeOptions("nvfp4_weight_only", shard_bytes=2**22)
for source in sys.argv[2:]:
    finalize(Path(source), Path(sys.argv[1]) / Path(source).name, options)
    status = Path("/proc/self/status").read_text()
    print(1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", status)[1]))
"""


def register():
    """Llama3 of 1 and of 12 blocks."""
    from torchtitan.models.llama3 import llama3_args

    base = replace(llama3_args["debugmodel"], dim=512, n_heads=8, vocab_size=2048)
    llama3_args.update({f"of_{n}": replace(base, n_layers=n) for n in LAYERS})
    return llama3_args


def write_run(folder, layers, flavors):
    """A run's dump folder with random weights; returns their bytes."""
    from torchtitan.models.llama3 import Transformer

    from nvfp4_titan.titan.corpus import tokenizer_path

    model = Transformer(flavors[f"of_{layers}"])
    dcp.save(model.state_dict(), checkpoint_id=folder / "checkpoint" / "step-1", no_dist=True)
    model_config = {
        "name": "llama3",
        "flavor": f"of_{layers}",
        "converters": [],
        "hf_assets_path": str(tokenizer_path()),
    }
    config = {
        "model": model_config,
        "training": {"seq_len": 64, "steps": 1},
        "checkpoint": {"folder": "checkpoint"},
    }
    record = {"config": config, "datasets": {"training": ["stdlib", None]}}
    (folder / "run_record.json").write_text(json.dumps(record))
    return sum(p.numel() * p.element_size() for p in model.parameters())


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's /proc/self/status")
def test_peak_memory_is_that_of_a_shard(tmp_path):
    flavors = register()
    sizes = {n: write_run(tmp_path / f"run_{n}", n, flavors) for n in LAYERS}
    from nvfp4_titan.titan.finalize import FinalizeOptions, finalize

    options = FinalizeOptions("bf16", dtype="float32", shard_bytes=2**24)
    finalize(tmp_path / "run_12", tmp_path / "hf_12", options)
    for n in LAYERS:
        del flavors[f"of_{n}"]
    (tmp_path / "out").mkdir()
    sources = [str(tmp_path / name) for name in ("run_1", "run_12", "hf_12")]
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path / "out"), *sources],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": ":".join(filter(None, sys.path))},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    small, run, hf = map(int, done.stdout.split())
    print(f"{sizes[LAYERS[1]]:,} bytes of weights; peak grew by {run - small:,} and {hf - run:,}")
    assert sizes[LAYERS[1]] > 6 * 2**24
    assert max(run, hf) - small < sizes[LAYERS[1]] / 2  # 0.05 to 0.27; held whole: 0.9
