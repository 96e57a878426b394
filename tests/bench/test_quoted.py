"""README's speeds are those of the results that it names."""

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PEERS = ("triton", "peer torch.compile", "peer modelopt forward only")
ROWS = {
    "linear, M=8192, (K, N) = (4096, 4096)": ("bench_linear", "linear 8192x4096x4096"),
    "(4096, 14336)": ("bench_linear", "linear 8192x4096x14336"),
    "(14336, 4096)": ("bench_linear", "linear 8192x14336x4096"),
    "q, k, v": ("bench_linear", "qkv 8192x4096x6144"),
    "16 experts": ("bench_linear", "grouped balanced 16384x2048x1408"),
    "`llama3_1b`": ("bench_train", "llama3_1b"),
    "`deepseek_v3_200m`, 32": ("bench_train", "deepseek_v3_200m --training.local_batch_size=32"),
    "`deepseek_v3_200m`, 16": ("bench_train", "deepseek_v3_200m"),
    "Llama3 8B": ("four_gpus", "llama3 FSDP=4 nvfp4 against bf16"),
    "DeepSeekV3 16B": ("four_gpus", "deepseek_v3 EP=4 nvfp4 against bf16"),
}
"""Beginning of a row: its results, and the case among them."""


def table() -> list[list[str]]:
    """Cells of the table of speeds."""
    section = (ROOT / "README.md").read_text().partition("### Speed on Hopper")[2]
    lines = section.partition("The `llama3_1b` run peaks")[0].splitlines()
    return [[c.strip() for c in line.strip("|").split("|")] for line in lines if line[:2] == "| "]


@pytest.mark.parametrize("row", ROWS)
def test_readme_quotes_what_was_measured(row):
    (cells,) = (cells for cells in table() if cells[0].startswith(row))
    file, case = ROWS[row]
    results = json.loads((ROOT / "docs" / "results" / f"{file}.json").read_text())
    if file == "four_gpus":
        found = {"triton": results["compared"][case]["tokens_per_s_ratio"]}
    else:
        found = {r["name"]: r["ratio_to_bf16"] for r in results if r["case"] == case}
    quoted = [cell for cell in cells[1:] if cell]
    assert quoted == [f"{found[name]:.2f}" for name in PEERS if name in found]
