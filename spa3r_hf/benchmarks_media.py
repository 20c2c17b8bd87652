"""Videos and pictures of benchmarks, from extracted folders or out of the zips they are published in."""

import hashlib
import os
import shutil
import stat
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from zipfile import BadZipFile, ZipFile, ZipInfo

from huggingface_hub.constants import HF_HOME

from .errors import BadSampleError


# How many names an error spells out.
_NUM_NAMED = 10


def find_files(names: Iterable[str], root: str | Path, cache_dir: str | Path | None = None) -> dict[str, Path]:
    """
    Find files by name below a folder, or in the zips of that folder. Only what is asked for is extracted.

    Args:
        names: Relative, with forward slashes: "scannet/scene0011_00.mp4".
        root: A folder that holds the files under these names, or zips (`*.zip`) that do; or one such zip.
        cache_dir: Where files of zips are extracted to, and found again; by default `$HF_HOME/spa3r_hf/media`.

    Returns:
        Name -> file, in the order of `names`.

    Raises:
        FileNotFoundError: Some are missing or empty: the first ten and how many, before anything is extracted.
        BadSampleError: A zip is damaged or truncated, or holds names that lead out of its folder, or links.
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
    if len(files) < len(names):  # large zips take a while to list
        for archive in sorted(root.glob("*.zip")) if root.is_dir() else [root]:
            members |= {info.filename: (archive, info) for info in _members(archive) if info.file_size > 0}
    missing = [name for name in names if name not in files and name not in members]
    if missing:
        more = f" and {len(missing) - _NUM_NAMED} more" if len(missing) > _NUM_NAMED else ""
        raise FileNotFoundError(
            f"{len(missing)} of {len(names)} media files are missing or empty below {root} and in its zips: "
            f"{missing[:_NUM_NAMED]}{more}"
        )
    cache = Path(HF_HOME, "spa3r_hf", "media") if cache_dir is None else Path(cache_dir)
    for archive in dict.fromkeys(members[name][0] for name in names if name not in files):
        wanted = [members[name][1] for name in names if name not in files and members[name][0] == archive]
        files |= _extract(archive, wanted, cache)
    return {name: files[name] for name in names}


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


def _extract(archive: Path, members: Iterable[ZipInfo], cache: Path) -> dict[str, Path]:
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
        raise BadSampleError(
            f"zip {archive} cannot be read: {error}; expected a whole zip (truncated download?)"
        ) from error
