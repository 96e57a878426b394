"""What pipeline stages compute only to find out shapes and dtypes must leave no trace.

Before their first microbatch, and again between validation and training, they send zeros, ones or
uninitialized memory through the model. torchtitan's MoE layers count it as tokens of experts, which
moves the balance between them.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial, wraps

from torch import nn

from .record import kept_token_counts


def around_shape_inference(pp_schedule, context: Callable[[], AbstractContextManager]) -> None:
    """Have the stages of one of torch's pipeline schedules find out shapes inside a context.

    Args:
        pp_schedule: torch.distributed.pipelining's; its stages are changed in place.
        context: Makes the context, one for each forward and backward.
    """

    def inside(prepare):
        @wraps(prepare)
        def prepare_inside(*args, **kwargs):
            with context():
                return prepare(*args, **kwargs)

        return prepare_inside

    for stage in getattr(pp_schedule, "_stages", None) or [pp_schedule._stage]:
        for name in ("_prepare_forward_infra", "_prepare_backward_infra"):
            setattr(stage, name, inside(getattr(stage, name)))


def keep_token_counts(pp_schedule, model_parts: list[nn.Module]) -> None:
    """Have a schedule's stages leave the counts of experts' tokens as they were; in place."""
    # Backwards count, too, under activation checkpointing.
    around_shape_inference(pp_schedule, partial(kept_token_counts, model_parts))
