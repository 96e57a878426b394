"""What torchtitan and this project record of a run: names of files, and TensorBoard's events.

A run that was interrupted and went on has an event file per start. A start replaces what earlier
ones recorded from its first step on: those steps were lost with the process, and done again.
"""

from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from .errors import ConfigError

TRAIN_LOSS = "loss_metrics/global_avg_loss"
VALIDATION_LOSS = "validation_metrics/loss"
STEP_SECONDS = "time_metrics/end_to_end(s)"
TOKENS_PER_SECOND = "throughput(tps)"
ACTIVE_GIB, RESERVED_GIB = "memory/max_active(GiB)", "memory/max_reserved(GiB)"
CHECKSUM, TOKENS = "data/checksum", "n_tokens_seen"

RECORD, CONVERSION = "run_record.json", "conversion.json"
EXPERT_TOKENS, NUMERICS = "tokens_per_expert.json", "numerics.json"
"""Files that a run leaves beside them."""


def read_scalars(folder: Path) -> dict[str, dict[int, float]]:
    """What a run recorded: by tag, values by step, of all of its starts.

    Raises:
        ConfigError: there is no event file.
    """
    files = sorted(folder.glob("tb/*/events.out.tfevents.*"), key=_started)
    if not files:
        raise ConfigError(
            f"{folder} holds no TensorBoard file: give the dump folder of one run with "
            "metrics.enable_tensorboard = true"
        )
    merged: dict[str, dict[int, float]] = {}
    for file in files:
        accumulator = EventAccumulator(str(file), size_guidance={"scalars": 0})
        accumulator.Reload()
        tags = accumulator.Tags()["scalars"]
        found = {tag: {e.step: e.value for e in accumulator.Scalars(tag)} for tag in tags}
        if TRAIN_LOSS not in found:
            continue  # it ended before its first step
        first = min(found[TRAIN_LOSS])
        for tag, values in merged.items():
            # Validation of the checkpoint's own step is done again, the step is not.
            start = min(found.get(tag, {first: None}))
            merged[tag] = {step: value for step, value in values.items() if step < start}
        for tag, values in found.items():
            merged.setdefault(tag, {}).update(values)
    return merged


def _started(events: Path) -> tuple[int, str]:
    """Sort key of event files: events.out.tfevents.SECONDS.HOST.PID.NUMBER."""
    seconds = events.name.split(".")[3]
    return int(seconds) if seconds.isdecimal() else 0, events.name
