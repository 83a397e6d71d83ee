"""What may be written where: every check of an output path that can be made before anything is written."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Sequence
from pathlib import Path

from lycoris.checkpoint.checkpoint import Checkpoint
from lycoris.checkpoint.discovery import find_checkpoints
from lycoris.errors import RefusedInput, os_reason

_Identity = tuple[int, int]


def check_output(
    checkpoint: Checkpoint, output: str | os.PathLike[str], overwrite: bool, inputs: Sequence[Path]
) -> Path:
    """Check that a copy of `checkpoint` may be written to `output`.

    Args:
        checkpoint: The base; decides whether a file or a folder is written.
        output: Path as the user gave it.
        overwrite: Whether an existing output may be replaced.
        inputs: Further files and folders that the output must not touch.

    Returns:
        The absolute path to write, links resolved: what a link points to is replaced, not the link.

    Raises:
        RefusedInput: naming the output and what is wrong with it.
    """
    spelled = os.fspath(output)
    if not spelled:
        raise RefusedInput("the output path is empty; give the name of the file or folder to write")
    if checkpoint.kind == "file" and spelled.endswith(os.sep):
        raise RefusedInput(f"{spelled}: names a folder, but the base is a single file; give the name of a file")
    target = Path(os.path.realpath(spelled))
    index = [checkpoint.index.path] if checkpoint.index else []
    own = [checkpoint.path, *index, *(file.path for file in checkpoint.files)]
    try:
        _check_parent(spelled, target.parent)
        _check_aliases(spelled, target, [*own, *inputs])
        _check_existing(checkpoint, spelled, target, overwrite)
    except OSError as error:
        raise RefusedInput(f"{spelled}: cannot be the output ({os_reason(error)}); give another output") from error
    return target


def check_space(output: Path, target: Path, needed: int, reclaimable: int) -> None:
    """Refuse when `target`'s file system has less than `needed` bytes free, with the `reclaimable` ones freed."""
    system = os.statvfs(target.parent)
    free = system.f_bavail * system.f_frsize + reclaimable
    if free < needed:
        raise RefusedInput(
            f"{output}: needs {needed} bytes of disk space in {target.parent}, {free} are free; "
            "free some or write to another disk"
        )


def _check_parent(output: str, parent: Path) -> None:
    if not parent.exists():
        raise RefusedInput(f"{output}: the folder {parent} does not exist; make it first")
    if not parent.is_dir():
        raise RefusedInput(f"{output}: {parent} is not a folder; give a path inside a folder")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise RefusedInput(f"{output}: no permission to write into {parent}; give an output elsewhere")


def _check_aliases(output: str, target: Path, inputs: Iterable[Path]) -> None:
    """Refuse an output that is an input, lies in one, or holds one, however links spell them."""
    own = _identity(target)
    around = _identities([target, *target.parents])
    for given in inputs:
        identity = _identity(given)
        if identity is not None and identity == own:
            raise RefusedInput(f"{output}: is the input {given}, and inputs are never changed; give another output")
        if identity in around:
            raise RefusedInput(f"{output}: lies inside the input {given}; give an output outside of it")
        # A link and what it points to: replacing the folder of either would lose the input.
        places = (Path(os.path.realpath(given)), Path(os.path.realpath(given.parent)) / given.name)
        if own in [identity for place in places for identity in _identities(place.parents)]:
            raise RefusedInput(f"{output}: holds the input {given}; give an output that holds no input")


def _identity(path: Path) -> _Identity | None:
    """Device and inode, which all names of a file share; None where there is no file."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino


def _identities(paths: Iterable[Path]) -> list[_Identity]:
    return [identity for path in paths if (identity := _identity(path)) is not None]


def _check_existing(checkpoint: Checkpoint, output: str, target: Path, overwrite: bool) -> None:
    if not os.path.lexists(target):
        return
    mode = target.lstat().st_mode
    is_folder = stat.S_ISDIR(mode)
    if checkpoint.kind == "file" and not stat.S_ISREG(mode):
        found = "a folder" if is_folder else "not a regular file"
        raise RefusedInput(f"{output}: is {found}, but the base is a single file; give the name of a file")
    if checkpoint.kind != "file" and not is_folder:
        raise RefusedInput(f"{output}: is a file, but a base of kind {checkpoint.kind} makes a folder; name a folder")
    if not overwrite:
        raise RefusedInput(f"{output}: exists; give another output or allow it to be overwritten (--overwrite)")
    if is_folder:
        _check_replaceable(output, target)


def _check_replaceable(output: str, folder: Path) -> None:
    """Refuse to replace a folder that is not just a checkpoint: all that it holds would be deleted."""
    if os.path.ismount(folder):
        raise RefusedInput(f"{output}: is a mount point, which cannot be replaced; give a folder inside it")
    held = sorted(folder.iterdir())
    folders = [path.name for path in held if path.is_dir() and not path.is_symlink()]
    if folders:
        raise RefusedInput(
            f"{output}: holds folders ({', '.join(folders[:3])}), which overwriting would delete; "
            "give another output or remove it yourself"
        )
    count = len(find_checkpoints(folder))
    if held and count != 1:
        raise RefusedInput(
            f"{output}: holds {len(held)} files and {count} checkpoints, wanted one checkpoint, because "
            "overwriting deletes all of them; give another output or remove it yourself"
        )
