"""Every TOML of train_configs/ parses, and its model builds, converts and shards on meta."""

import re
from pathlib import Path

import pytest
import torch
from torch.distributed.fsdp import FSDPModule
from torch.testing._internal.distributed.fake_pg import FakeStore

CONFIGS = sorted((Path(__file__).parents[2] / "train_configs").glob("*.toml"))
WORLD_SIZE = {
    "llama3_8b": 8,
    "llama3_70b": 128,
    "llama3_405b": 512,
    "deepseek_v3_16b": 8,
    "deepseek_v3_236b": 160,
    "deepseek_v3_671b": 256,
}


@pytest.fixture(params=CONFIGS, ids=lambda path: path.stem)
def config(request):
    return request.param


def parse(path: Path, *argv: str):
    from torchtitan.config import ConfigManager

    return ConfigManager().parse_args([f"--job.config_file={path}", *argv])


def test_builds_converts_and_shards(config, tmp_path):
    from nvfp4_titan.titan.sharding import parallel_dims, sharded_model

    world_size = WORLD_SIZE.get(config.stem, 1)
    job = parse(config, f"--job.dump_folder={tmp_path}")
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    try:
        model, converters = sharded_model(job, parallel_dims(job, world_size))
        [converter] = converters.converters
        kept = [fqn for fqn in converter.report.kept if fqn.endswith("attention.wo")]
        comment = re.search(r"= (\d+) blocks? here", config.read_text())
        assert len(kept) == int(comment.group(1))
        assert converter.report.flops_share > 0.6
        if job.model.name == "deepseek_v3":
            experts = [e for e in converter.report.entries if e.kind == "experts"]
            assert experts and sum(e.converted for e in experts) > 0.5 * len(experts)
        if world_size > 1:
            assert isinstance(model, FSDPModule)
            local = sum(p.to_local().numel() for p in model.parameters())
            assert local <= sum(p.numel() for p in model.parameters()) / world_size * 1.05
    finally:
        torch.distributed.destroy_process_group()


def test_comments_name_the_alternatives(config):
    text = config.read_text()
    assert "nvfp4, bf16" in text and "auto, reference, triton, native" in text


@pytest.mark.parametrize(
    ("setting", "batch", "weights", "codes"),
    [
        ("auto", 4, False, True),
        ("auto", 8, True, True),
        ("always", 4, True, True),
        ("never", 8, False, False),
    ],
)
def test_what_is_kept_of_weights(setting, batch, weights, codes, tmp_path, monkeypatch):
    from nvfp4_titan.titan import converter
    from nvfp4_titan.titan.sharding import meta_model, parallel_dims

    (path,) = (path for path in CONFIGS if path.stem == "llama3_debug")
    job = parse(
        path,
        f"--job.dump_folder={tmp_path}",
        f"--nvfp4.keep_weights={setting}",
        f"--training.global_batch_size={batch}",
    )
    asked = {}
    monkeypatch.setattr(converter, "track_weights", lambda model, **kwargs: asked.update(kwargs))
    converter.NVFP4Converter(job, parallel_dims(job, 1)).convert(meta_model(job))
    assert (asked["keep_weights"], asked["keep_codes"]) == (weights, codes)


def test_what_is_not_kept_of_sharded_weights_is_said(tmp_path, monkeypatch, caplog):
    from torchtitan.tools.logging import logger

    from nvfp4_titan.titan import converter
    from nvfp4_titan.titan.sharding import parallel_dims

    monkeypatch.setattr(logger, "propagate", True)
    (path,) = (path for path in CONFIGS if path.stem == "llama3_debug")
    said = []
    for ranks, more in ((1, ()), (2, ("--nvfp4.fp4_all_gather",)), (2, ())):
        caplog.clear()
        job = parse(path, f"--job.dump_folder={tmp_path}", "--nvfp4.keep_weights=always", *more)
        converter.NVFP4Converter(job, parallel_dims(job, ranks))
        said.append("set nvfp4.fp4_all_gather = true" in caplog.text)
    assert said == [False, False, True]
