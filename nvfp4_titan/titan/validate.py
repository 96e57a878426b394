"""A validator for the models whose train spec has none."""

from torchtitan.components.validate import Validator


class PlainAttentionValidator(Validator):
    """torchtitan's Validator, without attention masks for models that take none.

    torchtitan 0.2.2's builds masks whenever the model can; deepseek_v3 with SDPA refuses them.
    """

    def post_dataloading_process(self, input_dict, labels, model_parts):
        """As torchtitan's; `attention_masks` only for flex and varlen attention."""
        inputs, labels, extra_inputs, extra_kwargs = super().post_dataloading_process(
            input_dict, labels, model_parts
        )
        if getattr(model_parts[0].model_args, "attn_type", "sdpa") == "sdpa":
            extra_kwargs.pop("attention_masks", None)
        return inputs, labels, extra_inputs, extra_kwargs
