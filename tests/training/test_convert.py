"""Conversion: what is swapped, what is kept, what is refused, and that it is really so."""

import pytest
import torch
from support import saved_tensors
from torch import nn

from nvfp4_titan import RECIPES, convert
from nvfp4_titan.errors import ConfigError, UnsupportedError
from nvfp4_titan.training import NVFP4Linear


class Block(nn.Module):
    def __init__(self, dim=32):
        super().__init__()
        self.wq = nn.Linear(dim, dim, bias=False)
        self.w1 = nn.Linear(dim, 2 * dim, bias=False)

    def forward(self, x):
        return x + self.w1(self.wq(x)).view(*x.shape, 2).sum(-1)


class Model(nn.Module):
    def __init__(self, num_blocks=10, dim=32):
        super().__init__()
        self.tok_embeddings = nn.Embedding(64, dim)
        self.layers = nn.ModuleDict({str(i): Block(dim) for i in range(num_blocks)})
        self.output = nn.Linear(dim, 64, bias=False)

    def forward(self, tokens):
        x = self.tok_embeddings(tokens)
        for layer in self.layers.values():
            x = layer(x)
        return self.output(x)


def converted_modules(model):
    return {n for n, m in model.named_modules() if isinstance(m, NVFP4Linear)}


def test_report_says_what_the_model_is():
    model = Model()
    before = {n: p for n, p in model.named_parameters()}
    report = convert(model, backend="reference")
    assert set(report.converted) == converted_modules(model)
    assert len(report.converted) == 16 and len(report.kept) == 5
    assert all(before[n] is p for n, p in model.named_parameters())
    # 8 of 10 blocks of 3 * 32 * 32, and an lm head of 64 * 32 kept.
    assert report.flops_share == pytest.approx(8 * 3 / (10 * 3 + 2))
    text = str(report)
    assert "16 of 21 linears" in text and "75.0%" in text
    assert "layers.*.wq [0-7]" in text and "layers.*.wq [8-9]" in text
    assert "lm head" in text and "bf16_last_fraction" in text


def test_converted_linears_really_run_quantized():
    model = Model()
    report = convert(model, backend="reference")
    seen = set()
    hooks = [
        module.register_forward_hook(
            lambda m, args, y, name=name: seen.add((name, saved_tensors(y)[2].dtype))
        )
        for name, module in model.named_modules()
        if isinstance(module, NVFP4Linear)
    ]
    model(torch.randint(0, 64, (2, 8))).sum().backward()
    assert seen == {(name, torch.uint8) for name in report.converted}
    assert len(hooks) == len(report.converted)


@pytest.mark.parametrize(
    ("fraction", "num_blocks", "kept"), [(0.15, 20, 3), (0.15, 6, 1), (0, 6, 0), (0.3, 10, 3)]
)
def test_last_fraction(fraction, num_blocks, kept):
    report = convert(Model(num_blocks), bf16_last_fraction=fraction, backend="reference")
    assert len(report.converted) == 2 * (num_blocks - kept)


def test_first_layers():
    report = convert(Model(), bf16_first_layers=2, bf16_last_fraction=0, backend="reference")
    assert "layers.1.wq" in report.kept and "layers.2.wq" in report.converted


def test_what_is_no_model():
    with pytest.raises(ConfigError, match="an nn.Module, not dict"):
        convert({"weight": torch.zeros(32, 32)}, backend="reference")


def test_no_rules_are_none_or_empty():
    models = nn.Sequential(nn.Linear(32, 32)), nn.Sequential(nn.Linear(32, 32))
    reports = [
        convert(m, rules=r, backend="reference") for m, r in zip(models, (None, []), strict=False)
    ]
    assert reports[0] == reports[1]


def test_rules_override_everything_and_the_last_match_wins():
    report = convert(
        Model(),
        rules=["", "layers.*=bf16", "layers.*.wq=nvfp4", "layers.3.*=bf16", "output=nvfp4"],
        backend="reference",
    )
    expected = {f"layers.{i}.wq" for i in range(10) if i != 3} | {"output"}
    assert set(report.converted) == expected


def test_switches_change_the_formats():
    model = Model()
    convert(model, rht=False, sr=False, weights_2d=False, backend="reference")
    recipe = model.layers["0"].wq.recipe
    assert not recipe.wgrad.left.rht and recipe.wgrad.left.rounding == recipe.dgrad.left.rounding
    assert recipe.dgrad.left.rounding == recipe.fprop.left.rounding
    assert recipe.fprop.right.block == recipe.dgrad.right.block == (1, 16)
    model(torch.randint(0, 64, (2, 8))).sum().backward()
    assert model.layers["0"].wq.weight.grad.isfinite().all()


def test_a_linear_registered_twice_stays_one_module():
    model = Model()
    model.layers["1"].wq = model.layers["0"].wq
    convert(model, backend="reference")
    assert model.layers["1"].wq is model.layers["0"].wq
    assert isinstance(model.layers["0"].wq, NVFP4Linear)


def test_tied_weights_stay_tied():
    model = Model()
    model.layers["1"].wq.weight = model.layers["0"].wq.weight
    convert(model, backend="reference")
    assert model.layers["1"].wq.weight is model.layers["0"].wq.weight


def test_training_mode_and_meta():
    with torch.device("meta"):
        model = Model().eval()
    convert(model, backend="reference")
    assert not model.layers["0"].wq.training
    assert model.layers["0"].wq.weight.is_meta


def test_what_cannot_be_converted_is_kept_with_the_reason():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.num_experts, self.kernel = 4, nn.Parameter(torch.randn(4, 8, 8))

        def forward(self, x):
            return x

    class Special(nn.Linear):
        pass

    model = Model()
    model.layers["0"].wq = Special(32, 32, bias=False)
    model.layers["1"].wq.forward = lambda x: x
    model.encoder = nn.TransformerEncoderLayer(32, 2, 64)
    model.other = nn.Module()
    model.other.kernel = nn.Parameter(torch.randn(4, 8, 8))
    model.patched = Experts()
    model.patched.forward = lambda x: x
    report = convert(model, backend="reference")
    reasons = {entry.fqn: entry.reason for entry in report.entries if not entry.converted}
    assert "Special" in reasons["layers.0.wq"]
    assert "forward of its own" in reasons["layers.1.wq"]
    assert "fast path" in reasons["encoder.linear1"]
    assert "num_experts" in reasons["other.kernel"]
    assert "forward was replaced" in reasons["patched.kernel"]
    with pytest.raises(ConfigError, match="is a Special"):
        model = Model()
        model.layers["0"].wq = Special(32, 32)
        convert(model, rules=["layers.0.*=nvfp4"], backend="reference")


def test_a_linear_keeps_its_identity_hooks_and_attributes():
    model = Model()
    linear, calls = model.layers["0"].wq, []
    linear.register_forward_hook(lambda *args: calls.append(1))
    linear.SCALE_INIT = 1
    aside = [linear]
    convert(model, backend="reference")
    assert model.layers["0"].wq is linear is aside[0] and isinstance(linear, NVFP4Linear)
    model(torch.randint(0, 64, (1, 4)))
    assert linear.SCALE_INIT == 1 and calls == [1]


def test_one_parent_that_holds_a_linear_twice():
    shared = nn.Linear(32, 32)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    report = convert(model, backend="reference")
    assert report.converted == ("0", "2") and isinstance(model[2], NVFP4Linear)
    with pytest.raises(ConfigError, match=r"names 0 \(rule 0\), 1 \(rule 1\): let the rules"):
        convert(nn.Sequential(*[nn.Linear(32, 32)] * 2), rules=["0=nvfp4", "1=bf16"])


def test_a_rule_for_one_name_decides_for_all():
    model = nn.Sequential(*[nn.Linear(32, 32)] * 2, nn.Linear(32, 32))
    report = convert(model, rules=["1=bf16"], backend="reference")
    assert report.converted == ("2",) and "shared with 1 (rule 1)" in str(report)


def test_a_linear_of_several_blocks_stays_where_one_of_them_does():
    model = nn.Module()
    model.layers = nn.ModuleList(Block() for _ in range(4))
    for block in model.layers[1:]:
        block.wq = model.layers[0].wq
    report = convert(model, backend="reference")
    assert {f"layers.{i}.wq" for i in range(4)} <= set(report.kept)
    assert "shared with layers.3.wq (bf16_last_fraction)" in str(report)
    assert len(report.converted) == len(report.entries) - 4 - (len(report.entries) // 4 - 1)


@pytest.mark.parametrize("extra", [nn.Embedding(8, 32), nn.LayerNorm(32), nn.Linear(32, 64)])
def test_blocks_are_where_the_flops_are(extra):
    model = nn.Module()
    model.extra = nn.ModuleList([extra] * 3)
    model.model = nn.Module()
    model.model.layers = nn.ModuleList(nn.Linear(32, 32) for _ in range(8))
    report = convert(model, bf16_last_fraction=0.25, backend="reference")
    assert report.kept == ("model.layers.6", "model.layers.7")
    assert "nothing is named as an lm head" in str(report)


@pytest.mark.parametrize("name", ["heads", "lm_head"])
def test_a_list_of_heads_is_no_stack_of_blocks(name):
    model = nn.Module()
    model.layers = nn.ModuleList(Block() for _ in range(4))
    setattr(model, name, nn.ModuleList(nn.Linear(32, 4096) for _ in range(4)))
    report = convert(model, backend="reference")
    kept = {fqn.rpartition(".")[0] for fqn in report.kept}
    assert kept == ({"layers.3", "lm_head"} if name == "lm_head" else {"layers.3"})
    assert ("nothing is named as an lm head" in str(report)) == (name == "heads")


def test_a_rule_within_the_blocks_does_not_hide_that_no_head_was_found():
    model = nn.Module()
    model.layers = nn.ModuleList(Block() for _ in range(4))
    assert "as an lm head" in str(convert(model, rules=["layers.0.wq=mxfp8"], backend="reference"))


def test_one_block_that_is_registered_several_times():
    model, block = nn.Module(), Block()
    model.layers = nn.ModuleList([block] * 3)
    model.first = nn.Linear(32, 32)
    report = convert(model, rules=["layers.1.wq=mxfp8"], backend="reference")
    assert block.wq.recipe.name == "mxfp8" and "layers.1.wq" in report.converted
    others = {name for name, child in block.named_children() if name != "wq"}
    assert {f"layers.2.{name}" for name in others} <= set(report.kept)  # the tail's


def test_blocks_that_two_lists_hold():
    model = nn.Module()
    blocks = [Block() for _ in range(6)]
    model.draft = nn.ModuleList(blocks[:4])
    model.layers = nn.ModuleList(blocks)
    report = convert(model, bf16_last_fraction=0.3, backend="reference")
    assert {fqn.split(".")[1] for fqn in report.kept} == {"4", "5"}


def test_a_rule_for_another_name_passes_over_no_obstacle():
    model = nn.Module()
    model.encoder = nn.TransformerEncoderLayer(32, 2, 64)
    model.other = model.encoder.linear1
    with pytest.raises(ConfigError, match="rule other names other, which is read by"):
        convert(model, rules=["other=nvfp4"], backend="reference")


def test_a_model_without_blocks_says_that_none_are_kept():
    report = convert(nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32)), backend="reference")
    assert not report.kept and "bf16_last_fraction keeps none" in str(report)


@pytest.mark.parametrize(
    ("weight", "reason"),
    [
        (lambda: torch.zeros(8, 8, dtype=torch.int8), "torch.int8"),
        (lambda: torch.zeros(8, 8, dtype=torch.complex64), "torch.complex64"),
        (lambda: torch.zeros(0, 8), "without elements"),
        (lambda: torch.eye(8).to_sparse_csr(), "torch.sparse_csr"),
    ],
)
def test_weights_that_no_gemm_takes_stay(weight, reason):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8, bias=False))
    model[1].weight = nn.Parameter(weight(), requires_grad=False)
    report = convert(model, backend="reference")
    assert report.kept == ("1",) and reason in str(report)


def test_lazy_parameters_are_refused():
    with pytest.raises(ConfigError, match="0.weight has no shape yet"):
        convert(nn.Sequential(nn.LazyConv2d(4, 3), nn.Linear(64, 64)), backend="reference")


def test_embeddings_of_three_dims_are_no_experts():
    model = nn.Sequential(nn.Linear(32, 32))
    model.positions = nn.Parameter(torch.zeros(1, 4096, 32))
    report = convert(model, backend="reference")
    assert report.flops_share == 1 and len(report.entries) == 1
    model = nn.Sequential(nn.Linear(32, 32))
    model.num_experts, model.one = 1, nn.Parameter(torch.zeros(1, 48, 32))
    assert "one" in convert(model, backend="reference").converted


def test_blocks_among_other_numbered_containers():
    model = Model(10)
    wrapped = nn.Module()
    wrapped.encoder = nn.Module()
    wrapped.encoder.stages = nn.ModuleList([Block(), Block()])
    wrapped.heads = nn.ModuleList([nn.Linear(32, 32)])
    wrapped.layers = nn.ModuleList(model.layers.values())
    report = convert(wrapped, bf16_last_fraction=0.2, backend="reference")
    assert {"layers.8.wq", "layers.9.wq"} <= set(report.kept)
    assert "encoder.stages.1.wq" in report.converted and "heads.0" in report.converted
    plain = nn.Module()
    plain.layers = nn.ModuleList([nn.Linear(32, 32) for _ in range(4)])
    report = convert(plain, bf16_first_layers=2, bf16_last_fraction=0, backend="reference")
    assert report.converted == ("layers.2", "layers.3")
    with pytest.raises(ConfigError, match="numbered blocks"):
        convert(nn.Sequential(nn.Linear(8, 8)), bf16_first_layers=1, backend="reference")


def test_a_converted_model_pickles(tmp_path):
    model = Model()
    convert(model, backend="reference")
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    tokens = torch.randint(0, 64, (1, 4))
    assert torch.equal(loaded(tokens), model(tokens))


def test_sequential_has_no_blocks():
    report = convert(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)))
    assert report.converted == ("0", "2")


def test_bf16_recipe_converts_nothing_on_request():
    model = Model()
    assert convert(model, recipe="bf16").converted == () and converted_modules(model) == set()


@pytest.mark.parametrize(
    ("kwargs", "error", "fragment"),
    [
        ({"recipe": "nvfp5"}, ConfigError, "use one of nvfp4, bf16"),
        ({"rules": ["layers.*.w9=bf16"]}, ConfigError, "matches no linear"),
        ({"rules": ["layers.*"]}, ConfigError, "glob=recipe"),
        ({"rules": ["layers.*=fp8"]}, ConfigError, "'fp8' is unknown"),
        ({"rules": ["*=bf16"]}, ConfigError, "nothing to convert"),
        ({"bf16_last_fraction": 1.0}, ConfigError, "nothing to convert"),
        ({"bf16_last_fraction": 1.5}, ConfigError, "use 0 to 1"),
        ({"bf16_first_layers": -1}, ConfigError, "must not be negative"),
        ({"backend": "cuda"}, ConfigError, "use one of auto"),
        ({"backend": None}, ConfigError, "must be a name"),
        ({"rules": [3]}, ConfigError, "rule 3 must be"),
        ({"rht": "no"}, ConfigError, "rht='no' must be true or false"),
        ({"experts": 1}, ConfigError, "experts=1 must be true or false"),
        ({"seed": "a"}, ConfigError, "seed='a' must be an integer"),
        ({"bf16_first_layers": True}, ConfigError, "must be an integer"),
        ({"bf16_last_fraction": "0.1"}, ConfigError, "must be a number"),
        ({"backend": "native"}, UnsupportedError, "use backend = 'reference'"),
    ],
)
def test_refused(kwargs, error, fragment):
    model = Model()
    with pytest.raises(error, match=fragment):
        convert(model, **kwargs)


def test_twice_is_refused():
    model = Model()
    convert(model)
    with pytest.raises(ConfigError, match="converted before"):
        convert(model)
    with pytest.raises(ConfigError, match="itself a linear"):
        convert(nn.Linear(8, 8))


def test_recipes_are_frozen():
    with pytest.raises(AttributeError):
        RECIPES["nvfp4"].name = "x"
    with pytest.raises(TypeError):
        RECIPES["x"] = None


@pytest.mark.parametrize("top_k", [1, 4])
def test_the_flops_of_experts_are_those_of_the_chosen(top_k):
    """transformers' routers are called "gate", and beside shared experts lies one more."""
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    model = Qwen2MoeForCausalLM(
        Qwen2MoeConfig(
            vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, num_experts=8, moe_intermediate_size=32,
            shared_expert_intermediate_size=64, num_experts_per_tok=top_k,
        )
    )  # fmt: skip
    report = convert(model, backend="reference", bf16_last_fraction=0)
    entries = {entry.fqn: entry for entry in report.entries}
    experts = entries["model.layers.0.mlp.experts.gate_up_proj"]
    assert experts.flops_per_token == 2 * 64 * 64 * top_k
    assert not entries["model.layers.0.mlp.shared_expert_gate"].converted
    assert entries["model.layers.0.mlp.shared_expert.gate_proj"].converted


def test_matrices_that_are_no_linears_are_named():
    model = nn.TransformerDecoderLayer(64, 4, 128)
    report = convert(model, backend="reference", bf16_last_fraction=0)
    assert "self_attn.in_proj_weight and 1 more are matrices of no nn.Linear" in str(report)


def test_a_gpt2_says_why_nothing_is_converted():
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=64, n_positions=8, n_embd=32, n_layer=1, n_head=2)
    )
    with pytest.raises(
        ConfigError, match="nothing to convert.*c_attn.weight and 3 more are matrices"
    ):
        convert(model, backend="reference")


@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel])
def test_the_lm_head_of_a_wrapped_model_stays(wrap):
    model = nn.Module()
    model.layers = nn.ModuleList([nn.Sequential(nn.Linear(64, 64))])
    model.output = nn.Linear(64, 32)
    report = convert(wrap(model), backend="reference", bf16_last_fraction=0)
    (head,) = (entry for entry in report.entries if entry.fqn.endswith("output"))
    assert not head.converted and head.reason == "lm head or router"
