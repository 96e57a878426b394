"""DeepSeekV3's experts inside torchtitan: grouped GEMMs, routing, alignment, expert parallelism."""

import copy
import json

import pytest
import torch
from ranks import train_on_ranks
from support import logged_losses

from nvfp4_titan import convert
from nvfp4_titan.errors import ConfigError
from nvfp4_titan.training.experts import WrappingExperts


def deepseek(use_grouped_mm=True, converted=True):
    """A DeepSeekV3 debug model and tokens for it; torchtitan itself uses grouped GEMMs on SM90+."""
    from torchtitan.config import JobConfig
    from torchtitan.models.deepseek_v3 import DeepSeekV3Model, deepseekv3_args

    import nvfp4_titan.titan.job_config  # noqa: F401  (registers the flavors)

    args = copy.deepcopy(deepseekv3_args["debugmodel"])
    args.update_from_config(JobConfig())
    args.n_layers = 2
    args.moe_args.use_grouped_mm = use_grouped_mm
    torch.manual_seed(0)
    model = DeepSeekV3Model(args)
    with torch.no_grad():
        model.init_weights(torch.device("cpu"))
    report = convert(model, backend="reference", bf16_last_fraction=0) if converted else None
    return model, torch.randint(0, 2048, (1, 96)), report


@pytest.fixture
def alignment():
    from torchtitan.models.moe import utils

    before = utils.TOKEN_GROUP_ALIGN_SIZE_M
    yield utils
    utils.TOKEN_GROUP_ALIGN_SIZE_M = before


def gradients(model, tokens):
    model.zero_grad()
    loss = model(tokens).float().log_softmax(-1)[..., 0].mean()
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters()}


def test_codes_of_experts_in_fp32_compute_are_refused_early():
    """torchtitan casts grouped experts to bf16, which codes gathered for fp32 cannot follow."""
    from nvfp4_titan.titan.converter import check_gathers
    from nvfp4_titan.titan.trainer import parse

    fp4, fp32 = "--nvfp4.fp4_all_gather", "--training.mixed_precision_param=float32"
    grouped, loop = (deepseek(use_grouped_mm)[0] for use_grouped_mm in (True, False))
    with pytest.raises(ConfigError, match="mixed_precision_param = 'bfloat16'"):
        check_gathers(grouped, parse([fp4, fp32]))
    for model, argv in ((grouped, [fp4]), (grouped, [fp32]), (loop, [fp4, fp32])):
        check_gathers(model, parse(argv))


@pytest.mark.parametrize("use_grouped_mm", [True, False])
def test_experts_train_quantized_and_close_to_the_control(use_grouped_mm):
    model, tokens, report = deepseek(use_grouped_mm)
    assert isinstance(model.layers["1"].moe.experts, WrappingExperts)
    assert {f"layers.1.moe.experts.w{i}" for i in (1, 2, 3)} <= set(report.converted)
    control, _, _ = deepseek(use_grouped_mm, converted=False)
    loss, grads = gradients(model, tokens)
    expected_loss, expected = gradients(control, tokens)
    assert loss != expected_loss and abs(loss - expected_loss) < 0.05
    for name in ("w1", "w2", "w3"):
        ours, theirs = (g[f"layers.1.moe.experts.{name}"] for g in (grads, expected))
        assert not torch.equal(ours, theirs)
        assert torch.cosine_similarity(ours.flatten(), theirs.flatten(), dim=0) > 0.9


def test_token_alignment_does_not_change_the_bits(alignment):
    results = []
    for size in (8, 16, 32):
        alignment.set_token_group_alignment_size_m(size)
        model, tokens, _ = deepseek()
        results.append(gradients(model, tokens))
    for loss, grads in results[1:]:
        assert loss == results[0][0]
        assert all(torch.equal(grads[n], g) for n, g in results[0][1].items())


def test_routing_stays_in_high_precision():
    model, _, report = deepseek()
    control, _, _ = deepseek(converted=False)
    assert "layers.1.moe.router.gate" in report.kept
    x = torch.randn(64, 256)
    ours, theirs = (m.layers["1"].moe.router(x) for m in (model, control))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_alignment_is_set_kept_or_refused(alignment):
    from nvfp4_titan.titan.converter import align_token_groups

    for before, after in ((8, 16), (16, 16), (32, 32)):
        alignment.set_token_group_alignment_size_m(before)
        align_token_groups()
        assert alignment.TOKEN_GROUP_ALIGN_SIZE_M == after
    alignment.set_token_group_alignment_size_m(24)
    with pytest.raises(ConfigError, match="multiple of 16"):
        align_token_groups()


def test_odd_sizes_of_deepseek_convert():
    from test_models import meta_model

    report = convert(meta_model("deepseek_v3", "16B"))
    sizes = {size for entry in report.entries if entry.converted for size in entry.shape}
    assert {576, 10944, 1408} <= sizes


@pytest.mark.slow
def test_validation_leaves_training_alone(train):
    """torchtitan corrects the balance of experts by validation's tokens, too."""
    options = (
        "--model.name=deepseek_v3", "--model.flavor=debugmodel", "--model.converters=nvfp4",
        "--training.dataset=stdlib", "--training.steps=5", "--lr_scheduler.warmup_steps=1",
    )  # fmt: skip
    validation = (
        "--validation.enable", "--validation.dataset=stdlib_validation", "--validation.steps=1",
        "--validation.freq=2", "--validation.local_batch_size=2", "--validation.seq_len=64",
    )  # fmt: skip
    without = train(*options, folder="without")
    assert train(*options, *validation, folder="with") == without
    recipe = "--nvfp4.validation_recipe=bf16"
    assert train(*options, *validation, recipe, folder="as_bf16") == without


@pytest.mark.slow
def test_expert_parallel_run(tmp_path):
    """Two processes over gloo, EP=2 with FSDP, a checkpoint, and a resumed run."""
    argv = [
        "--model.name=deepseek_v3",
        "--model.flavor=debugmodel",
        "--model.converters=nvfp4",
        "--training.dataset=stdlib",
        "--training.seq_len=64",
        "--training.local_batch_size=1",
        "--training.mixed_precision_param=float32",
        "--lr_scheduler.warmup_steps=1",
        "--nvfp4.bf16_last_fraction=0.5",
        "--parallelism.expert_parallel_degree=2",
        "--activation_checkpoint.mode=none",
        "--optimizer.implementation=foreach",
        "--checkpoint.enable",
        "--metrics.log_freq=1",
        "--metrics.enable_tensorboard",
        "--checkpoint.no-last-save-model-only",
        "--debug.seed=0",
        f"--job.dump_folder={tmp_path}",
    ]
    for steps in (1, 2):
        train_on_ranks(2, [*argv, f"--training.steps={steps}"])
        assert list(logged_losses(tmp_path)) == list(range(1, steps + 1))
    counts = json.loads((tmp_path / "tokens_per_expert.json").read_text())
    assert len(counts) == 5


def test_shapes_that_pipeline_stages_find_out_count_no_tokens():
    from types import SimpleNamespace

    from torch import nn

    from nvfp4_titan.titan.pipeline import keep_token_counts

    moe = nn.Module()
    moe.register_buffer("tokens_per_expert", torch.tensor([3.0, 5.0]))
    model = nn.ModuleDict({"moe": moe})
    passes = ("_prepare_forward_infra", "_prepare_backward_infra")  # one that recomputes counts
    stage = SimpleNamespace(**{name: lambda: moe.tokens_per_expert.fill_(64) for name in passes})
    for schedule in (SimpleNamespace(_stage=stage), SimpleNamespace(_stages=[stage])):
        keep_token_counts(schedule, [model])
        for name in passes:
            getattr(stage, name)()
            assert moe.tokens_per_expert.tolist() == [3.0, 5.0]
