"""A validator for the models whose train spec has none."""

from torchtitan.components.validate import Validator


class PlainAttentionValidator(Validator):
    """torchtitan's Validator, without attention masks for models that take none.

    torchtitan 0.2.2's asks every model for masks; deepseek_v3 with SDPA makes and takes none.
    """

    def post_dataloading_process(self, input_dict, labels, model_parts):
        """As torchtitan's; `attention_masks` only for flex and varlen attention."""
        if getattr(model_parts[0].model_args, "attn_type", "sdpa") == "sdpa":
            model_parts = [_NoMasks()]
        return super().post_dataloading_process(input_dict, labels, model_parts)


class _NoMasks:
    """Stands for a model in the one place where Validator asks it for masks."""

    def get_attention_masks(self, **kwargs):
        raise TypeError("no masks")  # what Validator takes for an answer
