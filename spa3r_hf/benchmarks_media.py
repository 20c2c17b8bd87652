"""Videos and pictures of benchmarks, from extracted folders or out of the zips they are published in."""

import hashlib
import os
import shutil
import stat
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from zipfile import BadZipFile, ZipFile, ZipInfo

from huggingface_hub.constants import HF_HOME

from .errors import BadSampleError


# How many names an error spells out.
_NUM_NAMED = 10


class _DamagedZipError(BadSampleError):
    pass


def find_files(
    names: Iterable[str],
    root: str | Path,
    cache_dir: str | Path | None = None,
    unusable: dict[str, str] | None = None,
) -> dict[str, Path]:
    """
    Find files by name below a folder, or in the zips of that folder. Only what is asked for is extracted.

    Args:
        names: Relative, with forward slashes: "scannet/scene0011_00.mp4".
        root: A folder that holds the files under these names, or zips (`*.zip`) that do; or one such zip.
        cache_dir: Where files of zips are extracted to, and found again; by default `$HF_HOME/spa3r_hf/media`.
        unusable: Takes up, where given, the files that are empty, or are or may be in a damaged zip: name -> reason.
            They are then left out, and do not stop the others.

    Returns:
        Name -> file, in the order of `names`.

    Raises:
        FileNotFoundError: Some are missing or empty: the first ten and how many, before anything is extracted.
        BadSampleError: A zip is damaged or truncated, or holds names that lead out of its folder, or links; the
            latter whether or not there is `unusable`.
        ValueError: A name itself leads out of the folder.
    """
    root = Path(root)
    names = list(dict.fromkeys(names))
    for name in names:
        if not _is_inside(name):
            raise ValueError(f"media file {name!r}; expected a relative name without '..' or backslashes")
    if not root.exists():
        raise FileNotFoundError(f"media folder {root} does not exist; expected a folder of files or of zips, or a zip")
    files = {name: root / name for name in names if _has_content(root / name)}
    members: dict[str, tuple[Path, ZipInfo]] = {}
    empty, damaged = {name for name in names if (root / name).is_file()} - files.keys(), []
    if len(files) < len(names):  # large zips take a while to list
        for archive in sorted(root.glob("*.zip")) if root.is_dir() else [root]:
            try:
                listed = _members(archive)
            except _DamagedZipError as error:
                if unusable is None:
                    raise
                damaged.append(str(error))
                continue
            members |= {info.filename: (archive, info) for info in listed if info.file_size > 0}
            empty |= {info.filename for info in listed if info.file_size == 0}
    missing = [name for name in names if name not in files and name not in members]
    if unusable is not None:
        bad = {name: f"{name} is empty; expected a video or picture" for name in missing if name in empty}
        if damaged:  # they may have been in there
            bad |= {name: f"{name} is nowhere; {'; '.join(damaged)}" for name in missing if name not in empty}
        unusable |= bad
        missing = [name for name in missing if name not in bad]
    if missing:
        more = f" and {len(missing) - _NUM_NAMED} more" if len(missing) > _NUM_NAMED else ""
        raise FileNotFoundError(
            f"{len(missing)} of {len(names)} media files are missing or empty below {root} and in its zips: "
            f"{missing[:_NUM_NAMED]}{more}"
        )
    cache = Path(HF_HOME, "spa3r_hf", "media") if cache_dir is None else Path(cache_dir)
    wanted = {name: members[name] for name in names if name not in files and name in members}
    for archive in dict.fromkeys(archive for archive, _ in wanted.values()):
        files |= _extract(archive, [info for of, info in wanted.values() if of == archive], cache, unusable)
    return {name: files[name] for name in names if name in files}


def _is_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return (
        bool(path.parts) and not path.is_absolute() and ".." not in path.parts and "\\" not in name and ":" not in name
    )


def _has_content(path: Path) -> bool:
    return path.is_file() and path.stat().st_size > 0


def _members(archive: Path) -> list[ZipInfo]:
    """The files in a zip; one unsafe name and the whole zip is not to be trusted."""
    with _open(archive) as content:
        for info in content.infolist():
            if not _is_inside(info.filename):
                raise BadSampleError(f"zip {archive} is refused: member {info.filename!r} leads out of its folder")
            if stat.S_ISLNK(info.external_attr >> 16):
                raise BadSampleError(f"zip {archive} is refused: member {info.filename!r} is a link; expected files")
        return [info for info in content.infolist() if not info.is_dir()]


def _extract(
    archive: Path, members: Sequence[ZipInfo], cache: Path, unusable: dict[str, str] | None = None
) -> dict[str, Path]:
    """Members -> files; one that is damaged stops it, or, where there is `unusable`, is named there and left out."""
    try:
        return _extract_all(archive, members, cache)
    except _DamagedZipError as error:
        if unusable is None:
            raise
        if len(members) == 1:
            unusable[members[0].filename] = f"{members[0].filename}: {error}"
            return {}
    # One at a time; those that are out already stay.
    return {name: file for info in members for name, file in _extract(archive, [info], cache, unusable).items()}


def _extract_all(archive: Path, members: Iterable[ZipInfo], cache: Path) -> dict[str, Path]:
    status = archive.stat()
    key = (
        f"{archive.resolve()}|{status.st_size}|{status.st_mtime_ns}"  # another zip of the same name is extracted anew
    )
    folder = cache / f"{archive.stem}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
    files = {info.filename: folder / info.filename for info in members}
    with _open(archive) as content:
        for name, file in files.items():
            if file.is_file():
                continue
            file.parent.mkdir(parents=True, exist_ok=True)
            # Under its name only once it is whole: a run may be killed, and several may extract at once.
            descriptor, partial = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
            try:
                with os.fdopen(descriptor, "wb") as target, content.open(name) as source:
                    shutil.copyfileobj(source, target, 1 << 20)
                os.replace(partial, file)
            except BaseException:
                os.unlink(partial)
                raise
    return files


@contextmanager
def _open(archive: Path) -> Iterator[ZipFile]:
    try:
        with ZipFile(archive) as content:
            yield content
    # Encrypted members and unknown compression are a RuntimeError and its subclass NotImplementedError.
    except (BadZipFile, EOFError, RuntimeError, zlib.error) as error:
        raise _DamagedZipError(
            f"zip {archive} cannot be read: {error}; expected a whole zip (truncated download?)"
        ) from error
