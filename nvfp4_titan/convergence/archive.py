"""Finished runs in one small file: what `read_run` reads, and the request that they answer.

Runs made on a machine that keeps nothing travel in it, and count elsewhere as if made there.
"""

import gzip
import io
import shutil
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath

from ..command import check_writable
from ..errors import ConfigError
from ..scalars import CONVERSION, EXPERT_TOKENS, NUMERICS, RECORD
from .launch import REQUEST, read_request

_RECORDS = (RECORD, CONVERSION, EXPERT_TOKENS, NUMERICS)


def pack(folders: Iterable[Path], archive: Path) -> list[str]:
    """Write finished runs into a .tar.gz, by the names of their folders; returns these.

    Args:
        folders: Dump folders; unfinished ones, and what is no run, are left out.
        archive: File to write.

    Raises:
        ConfigError: none has finished.
    """
    finished = [folder for folder in folders if _finished(folder)]
    if not finished:
        raise ConfigError(f"nothing to pack into {archive}: no run has finished")
    archive.parent.mkdir(parents=True, exist_ok=True)
    # The file of before may hold the only copy of its runs: it stays until the new one is whole.
    unfinished = archive.with_name(f"{archive.name}.unfinished")
    with tarfile.open(unfinished, "w:gz") as tar:
        for folder in finished:
            events = sorted(folder.glob("tb/*/events.out.tfevents.*"))
            for file in [folder / REQUEST, *(folder / name for name in _RECORDS), *events]:
                if file.is_file():
                    tar.add(file, f"{folder.name}/{file.relative_to(folder)}")
    unfinished.replace(archive)
    return [folder.name for folder in finished]


def pack_finished(runs: Path, archive: Path | None) -> str:
    """Pack what has finished of a folder of runs; returns a line that says what, "" for no archive.

    Args:
        runs: Folder of dump folders.
        archive: File to write, or None.
    """
    if archive is None:
        return ""
    try:
        folders = sorted(runs.iterdir()) if runs.is_dir() else []
        return f"{archive}: {', '.join(pack(folders, archive))}"
    except ConfigError as error:
        return str(error)


@contextmanager
def carried(runs: Path, take: Iterable[Path], archive: Path | None) -> Iterator[Callable[[], None]]:
    """Take runs out of archives before, and pack what has finished after, however far it got.

    Gives what packs those that have finished so far; a disk that is full then stops no run.

    Args:
        runs: Folder of dump folders.
        take: Archives to take from.
        archive: File to write, or None.

    Raises:
        ConfigError: a file of `take` is no archive of runs, or `archive` holds runs that the folder
            then still lacks.
    """

    def pack_now() -> None:
        with suppress(OSError):
            pack_finished(runs, archive)

    if archive is not None:
        check_writable(archive)
    for given in take:
        print(f"{given}: took {', '.join(unpack(given, runs)) or 'nothing new'}")
    if archive is not None and archive.is_file():
        lost = sorted(name for name in names(archive) if not _finished(runs / name))
        if lost:
            raise ConfigError(
                f"{archive} holds runs that {runs} does not, and would lose them: "
                f"{', '.join(lost)}. Add --take {archive}, or give --pack another file"
            )
    try:
        yield pack_now
    finally:
        if packed := pack_finished(runs, archive):
            print(packed)


def names(archive: Path) -> set[str]:
    """Names of the runs in an archive.

    Raises:
        ConfigError: the file is no archive of runs.
    """
    with _opened(archive) as tar:
        return {_run_of(member) for member in tar.getmembers() if not member.isdir()}


@contextmanager
def _opened(archive: Path) -> Iterator[tarfile.TarFile]:
    try:
        # Whole, which checks its sum: of a damaged one tarfile reads the runs before the damage.
        content = io.BytesIO(gzip.decompress(archive.read_bytes()))
        with tarfile.open(fileobj=content) as tar:
            yield tar
    except (tarfile.TarError, zlib.error, EOFError, OSError) as error:
        raise ConfigError(f"{archive} cannot be read as an archive of runs: {error}") from error


def unpack(archive: Path, folder: Path) -> list[str]:
    """Take runs out of an archive into a folder; one that has finished there already stays.

    Returns:
        Names of the runs that were taken.

    Raises:
        ConfigError: the file is no archive of runs.
    """
    with _opened(archive) as tar:
        members = [member for member in tar.getmembers() if not member.isdir()]
        runs = [_run_of(member) for member in members]
        taken = sorted(name for name in set(runs) if not _finished(folder / name))
        chosen = [m for m, run in zip(members, runs, strict=True) if run in taken]
        if linked := [name for name in taken if (folder / name).is_symlink()]:
            raise tarfile.TarError(f"{folder / linked[0]} is a link: remove it first")
        for name in taken:
            shutil.rmtree(folder / name, ignore_errors=True)  # an unfinished run's events
        # The request last: what says that a run has finished.
        for member in sorted(chosen, key=lambda m: m.name.endswith(f"/{REQUEST}")):
            _write(tar, member, folder)
    return taken


def _run_of(member: tarfile.TarInfo) -> str:
    """The run's name in a member's; a name that may lead elsewhere is refused."""
    path = PurePosixPath(member.name)
    if not member.isfile() or path.is_absolute() or ".." in path.parts or len(path.parts) < 2:
        raise tarfile.TarError(f"{member.name} is no file of a run")
    return path.parts[0]


def _write(tar: tarfile.TarFile, member: tarfile.TarInfo, folder: Path) -> None:
    target = folder / member.name
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(tar.extractfile(member).read())


def _finished(folder: Path) -> bool:
    try:
        return read_request(folder).get("finished", False)
    except ConfigError:
        return False
