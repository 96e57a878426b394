"""For `--experimental.custom_import`: a fault in every wgrad, the RHT on dy's operand alone."""

from dataclasses import replace

from nvfp4_titan.training import functions

_use = functions.use


def _without_rht_on_x(recipe, name, side, **options):
    found = _use(recipe, name, side, **options)
    if found is None or (name, side) != ("wgrad", "right"):
        return found
    return replace(found, format=replace(found.format, rht=False))


functions.use = _without_rht_on_x
