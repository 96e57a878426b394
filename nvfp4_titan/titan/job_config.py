"""torchtitan's config module: `--job.custom_config_module nvfp4_titan.titan.job_config`.

Importing it registers the `nvfp4` converter, the dataset names and the model flavors, so that plain
torchtitan needs this one key more than `--model.converters nvfp4`. No `from __future__ import
annotations` here: torchtitan reads field types as classes.
"""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from torchtitan.protocols.model_converter import register_model_converter

from . import datasets, models
from .converter import NVFP4Converter
from .corpus import tokenizer_path
from .qat import QATConverter


def _cached_tokenizer() -> str:
    return str(tokenizer_path())


@dataclass
class NVFP4:
    """Settings of the `nvfp4` converter."""

    trainer_knows_step: ClassVar[bool] = False
    """Set by the trainer that carries out what depends on the step; not a setting."""

    recipe: str = "nvfp4"
    """
    Formats of the three GEMMs: "nvfp4" (1x16 activations, 16x16 weights, RHT on wgrad, SR on dy),
    "nvfp4_46" (the same with four-over-six block scaling), "nvfp4_mxfp8" (NVFP4 forward, MXFP8
    backward; "nvfp4_mxfp8_dequantized": of the forward's operands), "nvfp4_bf16" (NVFP4 forward,
    high-precision backward over the forward's operands, as in QAT; "nvfp4_bf16_original": over the
    originals), "bf16_nvfp4" (high-precision forward, NVFP4 backward), "mxfp8", "mxfp8_floor"
    (scales rounded down) or "bf16" (nothing is converted, a control run).
    """

    rules: list[str] = field(default_factory=list)
    """
    Comma separated "glob=recipe" rules over module names, such as
    "layers.*.attention.wo=bf16,output=nvfp4". The last match wins; rules override everything else,
    the lm head and the routers included. A rule that matches nothing, or decides nothing because
    later ones match all of its modules, is an error; so is one glob with two recipes.
    """

    bf16_first_layers: int = 0
    """Transformer blocks at the start of the model that stay in high precision."""

    bf16_last_fraction: float = 0.15
    """
    Fraction of the model's transformer blocks, rounded up, that stays in high precision at its end;
    0 is none. Counted on the whole model, before pipeline parallelism.
    """

    experts: bool = True
    """Whether the routed experts of MoE models are converted too."""

    backend: Literal["auto", "reference", "triton", "native", "native_software_sr"] = "auto"
    """
    Which implementation runs: "reference" (PyTorch, any device), "triton" (NVIDIA GPUs), "native"
    (Blackwell). "auto" picks the fastest that runs here and logs it. All give the same bits, but
    for "native" on B200 and B300: gradients are rounded stochastically by the hardware there;
    "native_software_sr" rounds them as the others do. See docs/blackwell.md.
    """

    seed: int = 0
    """Seed of stochastic rounding. Together with a layer's name it keys all random bits."""

    rht: bool = True
    """Random Hadamard transform on the operands of wgrad. Switch off for ablations only."""

    sr: bool = True
    """Stochastic rounding of gradients; off is round to nearest. Switch off for ablations only."""

    weights_2d: bool = True
    """16x16 weight blocks, the same values in fprop and dgrad; off is 1x16."""

    tensor_scale: bool = True
    """
    NVFP4's fp32 scale per tensor; off is a single level of scales for x and w, whose amax is then
    not needed. Gradients keep theirs: without it they are zeros.
    """

    schedule: list[str] = field(default_factory=list)
    """
    Comma separated "fraction:gemm=recipe" changes: after this fraction of training.steps (or this
    number of steps, from 1 on) "fprop", "dgrad" or "wgrad" of every converted module takes the
    formats of another recipe, such as "0.82:fprop=bf16". Needs -m nvfp4_titan.train.
    """

    validation_recipe: str = ""
    """
    Recipe that converted modules run in for validation, such as "bf16": the loss of the weights as
    they are, without quantization. Empty is the training's own. Needs -m nvfp4_titan.train.
    """

    fp4_all_gather: bool = False
    """
    Whether FSDP gathers converted weights in codes and scales, a quarter of bf16's bytes, with the
    same bits as a result. Weights whose shards do not end where 16x16 blocks end, and what the
    report keeps in high precision, are gathered as always.
    """

    keep_weights: Literal["auto", "always", "never"] = "auto"
    """
    Whether a weight's quantized form is kept until the optimizer steps, in place of quantizing it
    in every forward; the bits are the same. "auto" keeps it where a step calls the model several
    times (gradient accumulation, pipeline parallelism). It takes 0.56 bytes an element of a weight
    (2 with the triton backend) from one step to the next. Weights that FSDP shards are kept with
    fp4_all_gather only: each rank quantizes its shard after the optimizer's step, once for forward
    and backward, also with "auto", and keeps 0.5 bytes an element of it.
    """

    numerics_log_freq: int = 0
    """
    Every how many steps (and on the first) TensorBoard gets the numerics of each layer's GEMMs:
    SQNR, gain and cosine against high precision, zeros, saturated codes and underflow of operands.
    Such a step runs eagerly and takes several times as long. 0 is never, and costs nothing. Needs
    -m nvfp4_titan.train.
    """


@dataclass
class QAT:
    """Settings of the `qat` converter."""

    recipe: str = "nvfp4"
    """
    What the model is trained for: "nvfp4" (w and x), "nvfp4_single" (no scale per tensor),
    "nvfp4_weight_only", "int8_act_int4_weight", "int4_weight_only", "float8_act_float8_weight",
    "float8_act_int4_weight", "mxfp8" or "mxfp4".
    """

    skip: list[str] = field(default_factory=list)
    """
    Comma separated globs of modules that stay in high precision, beside the lm head and routers.
    """

    experts: bool = True
    """Whether routed experts are trained for it too (nvfp4, nvfp4_single and mxfp8)."""

    share_scales: bool = True
    """
    Whether linears that inference engines run as one GEMM (q, k, v; gate and up) are trained with
    one scale per tensor for all of them, as finalize writes them (nvfp4).
    """

    backend: Literal["auto", "reference", "triton", "native"] = "auto"
    """As nvfp4.backend, for the recipes nvfp4, nvfp4_single and mxfp8."""


@dataclass
class Model:
    """Overrides of torchtitan's [model] section."""

    hf_assets_path: str = field(default_factory=_cached_tokenizer)
    """
    Folder of the tokenizer and other Hugging Face assets. Default: the 2,048-token tokenizer of the
    stdlib corpus, made at first use under the user's cache folder.
    """


@dataclass
class JobConfig:
    """What is merged into torchtitan's JobConfig."""

    nvfp4: NVFP4 = field(default_factory=NVFP4)
    qat: QAT = field(default_factory=QAT)
    model: Model = field(default_factory=Model)


register_model_converter(NVFP4Converter, "nvfp4")
register_model_converter(QATConverter, "qat")
datasets.register()
models.register()
