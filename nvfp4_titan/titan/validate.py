"""Validation: for models whose train spec has none, over the same tokens, without side effects."""

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

from torch import nn
from torch._inductor import config as inductor
from torchtitan.components.validate import Validator
from torchtitan.distributed import ParallelDims

from .record import kept_token_counts


class PlainAttentionValidator(Validator):
    """torchtitan's Validator, without attention masks for models that take none.

    torchtitan 0.2.2's asks every model for masks; deepseek_v3 with SDPA makes and takes none.
    """

    def post_dataloading_process(self, input_dict, labels, model_parts):
        """As torchtitan's; `attention_masks` only for flex and varlen attention."""
        if getattr(model_parts[0].model_args, "attn_type", "sdpa") == "sdpa":
            model_parts = [_NoMasks()]
        return super().post_dataloading_process(input_dict, labels, model_parts)


class RewoundLoader:
    """A validation dataloader that starts over at every iteration.

    torchtitan's goes on where it stopped: every validation would see other text than the one
    before, and a resumed run other text than one that was not interrupted.
    """

    def __init__(self, loader):
        self.loader = loader
        self._start = copy.deepcopy(loader.dataset.state_dict())

    def __iter__(self):
        self.loader.dataset.load_state_dict(copy.deepcopy(self._start))
        return iter(self.loader)


class TokensOfSequences:
    """Parallel dimensions for torchtitan's Validator, which counts a batch's tokens over "batch".

    Under context parallelism a rank holds parts of sequences, and losses would be as many times too
    large: tokens are counted over its ranks, too.

    Args:
        dims: The job's.
    """

    def __init__(self, dims: ParallelDims):
        self._dims = dims

    def __getattr__(self, name: str):
        return getattr(self._dims, name)

    @property
    def dp_enabled(self) -> bool:
        """Whether tokens are added up over ranks."""
        return self._dims.dp_cp_enabled

    def get_mesh(self, dims: str | list[str]):
        """The job's mesh; that of the loss for the batch's."""
        return self._dims.get_mesh("loss" if dims == "batch" else dims)


def prepare_validator(
    validator: Validator,
    steps: int,
    formats: Callable[[], AbstractContextManager] = nullcontext,
) -> None:
    """Have a validator take the same tokens each time, and validate at the last step too.

    Training goes on as if there had been none: torchtitan counts the tokens that validation sends
    to experts among the next step's, whose balance it corrects by them, and a run that resumes
    has lost those. After the last step they stay, for the record.

    What it compiles runs without CUDA graphs: inductor's free a block's output where the next
    compiled block is called and no backward is to come, and that output is this call's input.

    Args:
        validator: torchtitan's.
        steps: Training steps of the run.
        formats: Makes a context that gives modules their formats for a validation.
    """
    validator.validation_dataloader = RewoundLoader(validator.validation_dataloader)
    if validator.parallel_dims.cp_enabled:
        validator.parallel_dims = TokensOfSequences(validator.parallel_dims)
    by_frequency, validate = validator.should_validate, validator.validate

    def prepared(model_parts: list[nn.Module], step: int) -> None:
        kept = kept_token_counts(model_parts) if step != steps else nullcontext()
        with kept, inductor.patch("triton.cudagraphs", False), formats():
            validate(model_parts, step)

    validator.should_validate = lambda step: step == steps or by_frequency(step)
    validator.validate = prepared


class _NoMasks:
    """Stands for a model in the one place where Validator asks it for masks."""

    def get_attention_masks(self, **kwargs):
        raise TypeError("no masks")  # what Validator takes for an answer
