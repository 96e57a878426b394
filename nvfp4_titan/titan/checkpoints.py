"""Which checkpoint a run resumes from: the newest whole one, and a message for each that is not.

And what to do where one cannot be read or saved.

torchtitan takes the newest `step-N` with a `.metadata` file. DCP writes that file last, so a save
that was cut off is passed over in silence, and a folder whose data files were lost or cut later is
taken and fails. Here every file that the metadata names is checked for its length first.
"""

import os
import pickle
import re
from collections.abc import Callable
from functools import wraps
from pathlib import Path

from torch import distributed
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata
from torchtitan.components.checkpoint import CheckpointManager
from torchtitan.config import JobConfig
from torchtitan.tools.logging import logger

from ..errors import ConfigError
from ..scalars import RECORD

_MODEL_ONLY = "it holds the model alone, nothing to resume from"
_STEP = re.compile(r"step-(\d+)")


def fault(folder: Path, *, resumable: bool = True) -> str | None:
    """What is wrong with a checkpoint, None where it is whole.

    Args:
        folder: A step's folder, of DCP or safetensors files.
        resumable: Whether it must hold more than the model, so that a run can go on from it.
    """
    if not (folder / ".metadata").is_file():
        exported = (folder / "model.safetensors.index.json").is_file()
        return _MODEL_ONLY if exported else "its save was cut off (there is no .metadata)"
    # A seed checkpoint, step 0, is a model to start from.
    resumable = resumable and folder.name != "step-0"
    try:
        metadata = FileSystemReader(folder).read_metadata()
        if resumable and "train_state.step" not in metadata.state_dict_metadata:
            return _MODEL_ONLY
        return _short_file(folder, metadata)
    except Exception as error:  # a damaged pickle raises anything, or gives anything
        if isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
            raise  # a file system that fails now says nothing about the checkpoint
        return f"its .metadata cannot be read ({type(error).__name__}: {error})"


def _short_file(folder: Path, metadata: Metadata) -> str | None:
    """What says that a file lacks bytes which a checkpoint's metadata name, or None."""
    ends = {}
    for part in metadata.storage_data.values():
        ends[part.relative_path] = max(ends.get(part.relative_path, 0), part.offset + part.length)
    for name, end in ends.items():
        file = folder / name
        size = file.stat().st_size if file.is_file() else 0
        if size < end:
            return f"{name} has {size} of {end} bytes"
    return None


def checkpoint_folder(job_config: JobConfig) -> Path:
    """Where a job saves, and resumes from."""
    return Path(job_config.job.dump_folder, job_config.checkpoint.folder)


def saved_steps(folder: Path) -> dict[int, Path]:
    """Folders of checkpoints, whole or not, by their step; {} where the folder is not there."""
    found = {}
    for entry in folder.iterdir() if folder.is_dir() else ():
        match = _STEP.fullmatch(entry.name)
        if match and entry.is_dir():
            found[int(match[1])] = entry
    return found


def newest_whole_step(folder: Path, *, resumable: bool = True) -> tuple[int, list[str]]:
    """The newest step whose checkpoint is whole, and messages about the newer ones.

    Args:
        folder: The run's checkpoint folder.
        resumable: As `fault` takes it.

    Returns:
        The step, -1 for none.
    """
    messages = []
    for step, place in sorted(saved_steps(folder).items(), reverse=True):
        reason = fault(place, resumable=resumable)
        if reason is None:
            return step, messages
        messages.append(f"{place} is skipped: {reason}")
    return -1, messages


def choose_step(folder: Path) -> int:
    """The step that all ranks resume from, -1 to start anew; rank 0 looks and says what it skipped.

    A folder without one whole checkpoint is moved aside: torchtitan would take its presence for a
    run to resume and not load `initial_load_path`.

    Args:
        folder: The run's checkpoint folder.
    """
    found = [-1]
    if distributed.get_rank() == 0:
        found[0], messages = newest_whole_step(folder)
        for message in messages:
            logger.warning(message)
        # Not where checkpoints lie in the dump folder itself, beside the rest of the run.
        if found[0] == -1 and folder.is_dir() and not (folder / RECORD).is_file():
            aside = _unused(folder)
            os.rename(folder, aside)
            logger.warning(f"No checkpoint is whole: {folder} is now {aside}, the run starts anew")
    distributed.broadcast_object_list(found, src=0)
    return found[0]


def explain_failures(checkpointer: CheckpointManager, folder: Path) -> None:
    """Have a checkpointer raise ConfigError, naming what to do, where it cannot load or save.

    Args:
        checkpointer: torchtitan's, changed in place.
        folder: The run's checkpoint folder.
    """
    load = checkpointer.load

    @wraps(load)
    def explained_load(*args, **kwargs) -> bool:
        try:
            return load(*args, **kwargs)
        except (CheckpointException, EOFError, pickle.UnpicklingError, AssertionError) as error:
            reason = _reason(error)
            if "dataloader." in reason or "dp_degree" in reason:
                raise ConfigError(
                    "the checkpoint has the data's place for another number of data-parallel ranks "
                    f"({reason}): add --checkpoint.exclude_from_loading=dataloader, which begins "
                    "the data anew"
                ) from error
            if isinstance(error, AssertionError):
                raise
            raise ConfigError(
                f"a checkpoint cannot be read ({reason}): check that "
                "checkpoint.initial_load_path or checkpoint.load_step names a whole one of this "
                f"model (those of this run are in {folder}: move a damaged one away to go on from "
                "the one before it)"
            ) from error

    def explained(save: Callable) -> Callable:
        @wraps(save)
        def explained_save(*args, **kwargs) -> None:
            try:
                save(*args, **kwargs)
            except (CheckpointException, OSError) as error:
                raise ConfigError(
                    f"a checkpoint cannot be saved in {folder} ({_reason(error)}): make room "
                    "there, or name another checkpoint.folder; the same command goes on from the "
                    "last whole one"
                ) from error

        return explained_save

    checkpointer.load = explained_load
    checkpointer.save = explained(checkpointer.save)
    # Where an asynchronous save that failed is found, by the next save or at the end.
    checkpointer._async_wait = explained(checkpointer._async_wait)


def _reason(error: BaseException) -> str:
    """First line of what was wrong; of ranks' errors, that of the first."""
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def _unused(folder: Path) -> Path:
    number = 1
    while (aside := folder.with_name(f"{folder.name}.incomplete-{number}")).exists():
        number += 1
    return aside
