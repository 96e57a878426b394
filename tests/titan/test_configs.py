"""Every TOML of train_configs/ parses, and its model builds, converts and shards on meta."""

import copy
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
    from torchtitan.distributed import ParallelDims
    from torchtitan.protocols.model_converter import build_model_converters
    from torchtitan.protocols.train_spec import get_train_spec

    world_size = WORLD_SIZE.get(config.stem, 1)
    job = parse(config, f"--job.dump_folder={tmp_path}")
    parallelism = job.parallelism
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    try:
        dims = ParallelDims(
            dp_shard=parallelism.data_parallel_shard_degree,
            dp_replicate=parallelism.data_parallel_replicate_degree,
            cp=parallelism.context_parallel_degree,
            tp=parallelism.tensor_parallel_degree,
            pp=parallelism.pipeline_parallel_degree,
            ep=parallelism.expert_parallel_degree,
            etp=parallelism.expert_tensor_parallel_degree,
            world_size=world_size,
        )
        spec = get_train_spec(job.model.name)
        args = copy.deepcopy(spec.model_args[job.model.flavor])
        args.update_from_config(job)
        with torch.device("meta"):
            model = spec.model_cls(args)
        converters = build_model_converters(job, dims)
        [converter] = converters.converters
        converters.convert(model)
        kept = [fqn for fqn in converter.report.kept if fqn.endswith("attention.wo")]
        comment = re.search(r"= (\d+) blocks? here", config.read_text())
        assert len(kept) == int(comment.group(1))
        assert converter.report.flops_share > 0.6
        if job.model.name == "deepseek_v3":
            experts = [e for e in converter.report.entries if e.kind == "experts"]
            assert experts and sum(e.converted for e in experts) > 0.5 * len(experts)
        model = spec.parallelize_fn(model, dims, job)
        if world_size > 1:
            assert isinstance(model, FSDPModule)
            local = sum(p.to_local().numel() for p in model.parameters())
            assert local <= sum(p.numel() for p in model.parameters()) / world_size * 1.05
    finally:
        torch.distributed.destroy_process_group()


def test_comments_name_the_alternatives(config):
    text = config.read_text()
    assert "nvfp4, bf16" in text and "auto, reference, triton, native" in text
