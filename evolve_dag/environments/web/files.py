"""``file``: documents of one folder as text. Nothing outside the folder can be named, through links neither."""

from __future__ import annotations

import io
import os
import stat
import unicodedata
import zipfile
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from evolve_dag.environments.web.documents import OFFICE
from evolve_dag.environments.web.reader import decoded, parse
from evolve_dag.plain import head, one_line
from evolve_dag.protocols import ToolError

if TYPE_CHECKING:
    from evolve_dag.environments.web.sandbox import Sandbox

MAX_FILE = 50_000_000
"""Bytes of a file, or of a member of an archive once it is unpacked."""
MAX_MEMBERS = 10_000
SHOWN_MEMBERS = 200
PARSED = ("pdf", "html", "htm", *OFFICE)
"""Endings that a library reads; the others are shown as text, if they are text."""


@dataclass(frozen=True)
class FileReader:
    """Reads one folder."""

    folder: Path
    parser: Callable[[], Sandbox]
    characters: int
    """Most of a file that is shown."""

    def read(self, name: str) -> str:
        """The observation for one file: ``file: <name>`` and its text. Members of a ZIP archive are ``archive.zip/member``.

        Raises:
            ToolError: there is no such file inside the folder, or it cannot be read.
        """
        parts = _parts(name)
        body, left = self._open(parts)
        shown = "/".join(parts)
        if left:
            ending = left.rpartition(".")[2].lower()
            if ending == "zip":
                raise ToolError("an archive within an archive is not opened")
            body = _member(body, left)
        else:
            ending = parts[-1].rpartition(".")[2].lower()
            if ending == "zip":
                return f"file: {shown}\n{head(_members(body), self.characters)}"
        return f"file: {shown}\n{head(self._text(body, ending), self.characters)}"

    def _text(self, body: bytes, ending: str) -> str:
        if ending in PARSED:
            kind = "html" if ending == "htm" else ending
            # One character more than is shown, so that the cut is told.
            arguments = {"url": "", "charset": "", "characters": self.characters + 1}
            return parse(self.parser(), body, kind, arguments).lstrip("\n") or "(no text)"
        if b"\0" in body[:8192] and not body.startswith((b"\xff\xfe", b"\xfe\xff")):
            raise ToolError("this file is not text, and no reader is known for its kind")
        beginning = body[: 4 * self.characters + 4]
        return decoded(beginning, whole=len(beginning) == len(body)) or "(empty)"

    def _open(self, parts: tuple[str, ...]) -> tuple[bytes, str]:
        """Content of the file that ``parts`` begin with, and the archive's member that the rest names.

        Folder by folder, by descriptor and without following a link: between check and opening nothing can be exchanged.
        """
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
        try:
            current = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError:
            raise ToolError("the folder of files is not there") from None
        try:
            for position, part in enumerate(parts):
                following = _opened(part, flags, current)
                os.close(current)
                current = following
                status = os.fstat(current)
                if stat.S_ISDIR(status.st_mode):
                    continue
                left = "/".join(parts[position + 1 :])
                if not stat.S_ISREG(status.st_mode) or (left and not part.lower().endswith(".zip")):
                    raise FileNotFoundError
                if status.st_size > MAX_FILE:
                    raise ToolError(f"the file is larger than {MAX_FILE} bytes")
                with os.fdopen(os.dup(current), "rb") as handle:
                    return handle.read(MAX_FILE), left
        except (OSError, ValueError):
            raise ToolError(f"there is no file named {one_line('/'.join(parts), 100)}; {self._known()}") from None
        finally:
            os.close(current)
        raise ToolError(f"{one_line('/'.join(parts), 100)} is a folder; {self._known()}")

    def _known(self) -> str:
        names = sorted(
            path.relative_to(self.folder).as_posix()
            for path in self.folder.rglob("*")
            if path.is_file() and not path.is_symlink()
        )
        listing = ", ".join(one_line(name, 100) for name in names[:20])
        return f"the files are: {listing}{' and more' if len(names) > 20 else ''}" if names else "there are no files"


def _parts(name: str) -> tuple[str, ...]:
    """The names on the way to a file."""
    path = PurePosixPath(name.strip())
    if path.is_absolute() or "\\" in name or "\0" in name or ".." in path.parts or not path.parts:
        raise ToolError("name a file of the folder, without a leading slash and without ..")
    return path.parts


def _opened(name: str, flags: int, folder: int) -> int:
    """A file of an open folder, whose name may write accents in another way (NFD, as macOS has them) than a model can."""
    try:
        return os.open(name, flags, dir_fd=folder)
    except FileNotFoundError:
        return os.open(_spelled(name, os.listdir(folder)), flags, dir_fd=folder)


def _spelled(name: str, names: Iterable[str]) -> str:
    """The one of ``names`` that reads the same; ``name`` itself where there is none."""
    wanted = unicodedata.normalize("NFC", name)
    return next((one for one in names if unicodedata.normalize("NFC", one) == wanted), name)


def _archive(body: bytes) -> zipfile.ZipFile:
    try:
        archive = zipfile.ZipFile(io.BytesIO(body))
    except (zipfile.BadZipFile, ValueError, OSError, NotImplementedError, UnicodeError):
        raise ToolError("the archive is damaged") from None
    if len(archive.infolist()) > MAX_MEMBERS:
        raise ToolError(f"the archive holds more than {MAX_MEMBERS} files")
    return archive


def _members(body: bytes) -> str:
    members = [member for member in _archive(body).infolist() if not member.is_dir()]
    lines = [f"{one_line(member.filename, 200)} ({member.file_size} bytes)" for member in members[:SHOWN_MEMBERS]]
    more = [f"... and {len(members) - SHOWN_MEMBERS} more"] * (len(members) > SHOWN_MEMBERS)
    head_line = f"{len(members)} file{'' if len(members) == 1 else 's'} in the archive; open one as archive.zip/name"
    return "\n".join([head_line, *lines, *more])


def _member(body: bytes, name: str) -> bytes:
    """One member, never more of it than :data:`MAX_FILE`; it is read into memory, so its name opens nothing."""
    archive = _archive(body)
    try:
        member = archive.getinfo(name if name in archive.NameToInfo else _spelled(name, archive.namelist()))
    except KeyError:
        raise ToolError(f"there is no {one_line(name, 100)} in the archive; open the archive to see its files") from None
    if member.flag_bits & 1:
        raise ToolError("the archive is locked by a password")
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ToolError("the archive is packed in a way that is not read")  # others take memory as the archive says
    try:
        with archive.open(member) as handle:
            content = handle.read(MAX_FILE + 1)
    except (zipfile.BadZipFile, zlib.error, OSError, EOFError, ValueError, NotImplementedError, RuntimeError):
        raise ToolError("the archive is damaged") from None
    if len(content) > MAX_FILE:
        raise ToolError(f"the file unpacks to more than {MAX_FILE} bytes")
    return content
