"""What pipeline stages compute only to find out shapes and dtypes must leave no trace.

Before their first microbatch, and again between validation and training, they send zeros, ones or
uninitialized memory through the model. torchtitan's MoE layers count it as tokens of experts, which
moves the balance between them.
"""

from functools import wraps

import torch
from torch import nn

from .record import token_counts


def stages(pp_schedule) -> list:
    """The stages of this rank in one of torch's pipeline schedules."""
    return getattr(pp_schedule, "_stages", None) or [pp_schedule._stage]


def keep_token_counts(pp_schedule, model_parts: list[nn.Module]) -> None:
    """Have a schedule's stages leave the counts of experts' tokens as they were; in place."""

    def keeping(prepare):
        @wraps(prepare)
        def prepare_and_restore(*args, **kwargs):
            counts = token_counts(model_parts).values()
            before = [count.clone() for count in counts]
            found = prepare(*args, **kwargs)
            with torch.no_grad():
                for count, kept in zip(counts, before, strict=True):
                    count.copy_(kept)
            return found

        return prepare_and_restore

    for stage in stages(pp_schedule):
        stage._prepare_forward_infra = keeping(stage._prepare_forward_infra)
