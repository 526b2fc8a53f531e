from __future__ import annotations

import io
import os
import zipfile
from pathlib import Path

import pytest
import web_fakes
from hypothesis import given
from hypothesis import strategies as st

from evolve_dag.environments.web import files
from evolve_dag.environments.web.files import FileReader
from evolve_dag.environments.web.sandbox import open_parser
from evolve_dag.protocols import ToolError


def zipped(members: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return out.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "files"
    (root / "sub").mkdir(parents=True)
    (root / "a.csv").write_text("name,year\nRato,1999\n")
    (root / "sub" / "note.txt").write_text("a note")
    (tmp_path / "secret.txt").write_text("TOP")
    (tmp_path / "files2").mkdir()
    (tmp_path / "files2" / "near.txt").write_text("TOP")
    return root


def reader(folder: Path, characters: int = 1000) -> FileReader:
    return FileReader(folder, open_parser, characters)


def test_text_files(folder: Path) -> None:
    assert reader(folder).read("a.csv") == "file: a.csv\nname,year\nRato,1999\n"
    assert reader(folder).read(" ./sub//note.txt ") == "file: sub/note.txt\na note"
    (folder / "old.csv").write_bytes("größe;1".encode("cp1252"))
    assert reader(folder).read("old.csv").endswith("größe;1")
    (folder / "wide.txt").write_bytes("größe".encode("utf-16"))
    assert reader(folder).read("wide.txt").endswith("größe")
    (folder / "mark.txt").write_bytes(b"\xef\xbb\xbfmark")
    assert reader(folder).read("mark.txt") == "file: mark.txt\nmark"
    (folder / "empty.txt").touch()
    assert reader(folder).read("empty.txt") == "file: empty.txt\n(empty)"


def test_long_files_are_cut_between_characters(folder: Path) -> None:
    (folder / "long.txt").write_text("漢" * 5000)
    shown = reader(folder, 300).read("long.txt")
    assert shown == f"file: long.txt\n{'漢' * 300}\n... (cut after 300 characters)"


def test_documents(folder: Path) -> None:
    import openpyxl

    book = openpyxl.Workbook()
    book.active.append(["name", "year"])
    book.active.append(["Rato", 1999])
    book.save(folder / "b.xlsx")
    (folder / "p.PDF").write_bytes(web_fakes.pdf("Bado in figures"))
    assert "| Rato | 1999 |" in reader(folder).read("b.xlsx")
    assert reader(folder).read("p.PDF").startswith("file: p.PDF\nBado in figures")
    (folder / "bad.docx").write_bytes(b"no archive")
    with pytest.raises(ToolError, match="the docx could not be read"):
        reader(folder).read("bad.docx")


@pytest.mark.parametrize(
    "name",
    [
        "../secret.txt", "sub/../../secret.txt", "/etc/passwd", "//etc/passwd", "sub/../a.csv", "..", "", " ", ".", "a\\..\\b",
        "a.csv\0.txt", "....//secret.txt", "../files2/near.txt", "~/.bashrc", "a.csv/x", "sub", "nothing.txt", "a" * 5000,
        "link.txt", "linked/secret.txt", "sub/up/secret.txt", "pipe", "\ud800",
    ],
)  # fmt: skip
def test_what_is_outside_or_no_file_is_not_read(folder: Path, name: str) -> None:
    (folder / "link.txt").symlink_to(folder.parent / "secret.txt")
    (folder / "linked").symlink_to(folder.parent)
    (folder / "sub" / "up").symlink_to("../..")
    os.mkfifo(folder / "pipe")
    with pytest.raises(ToolError) as caught:
        reader(folder).read(name)
    assert "TOP" not in str(caught.value)
    assert str(folder) not in str(caught.value)


@given(st.lists(st.sampled_from(["..", ".", "", "sub", "secret.txt", "files2", "near.txt", "linked", "/", "up"]), max_size=6))
def test_no_path_leads_out(tmp_path_factory: pytest.TempPathFactory, parts: list[str]) -> None:
    base = tmp_path_factory.getbasetemp() / "no_path"
    root = base / "files"
    if not root.exists():
        (root / "sub").mkdir(parents=True)
        (base / "secret.txt").write_text("TOP")
        (root / "linked").symlink_to(base)
        (root / "sub" / "up").symlink_to("../..")
    try:
        shown = reader(root).read("/".join(parts))
    except ToolError as problem:
        shown = str(problem)
    assert "TOP" not in shown


def test_the_files_there_are_named(folder: Path) -> None:
    with pytest.raises(ToolError, match=r"there is no file named b\.csv; the files are: a\.csv, sub/note\.txt"):
        reader(folder).read("b.csv")
    with pytest.raises(ToolError, match="folder of files is not there"):
        reader(folder / "gone").read("x")


def test_large_and_binary_files(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "x.bin").write_bytes(b"\x7fELF\0\0")
    with pytest.raises(ToolError, match="not text"):
        reader(folder).read("x.bin")
    monkeypatch.setattr(files, "MAX_FILE", 10)
    with pytest.raises(ToolError, match="larger than 10 bytes"):
        reader(folder).read("a.csv")


def test_archives(folder: Path) -> None:
    (folder / "z.zip").write_bytes(
        zipped({"in/one.csv": b"a,b\n1,2\n", "two.pdf": web_fakes.pdf("within"), "more.zip": zipped({})})
    )
    assert reader(folder).read("z.zip") == (
        "file: z.zip\n3 files in the archive; open one as archive.zip/name\nin/one.csv (8 bytes)\n"
        f"two.pdf ({len(web_fakes.pdf('within'))} bytes)\nmore.zip (22 bytes)"
    )
    assert reader(folder).read("z.zip/in/one.csv") == "file: z.zip/in/one.csv\na,b\n1,2\n"
    assert "within" in reader(folder).read("z.zip/two.pdf")
    with pytest.raises(ToolError, match="archive within an archive"):
        reader(folder).read("z.zip/more.zip")
    with pytest.raises(ToolError, match="no missing in the archive"):
        reader(folder).read("z.zip/missing")


def test_a_name_is_found_however_its_accents_are_written(folder: Path) -> None:
    """macOS takes letters and accents apart; a model reads and writes them as one."""
    apart, whole = "Re\u0301sume\u0301.txt", "R\u00e9sum\u00e9.txt"
    (folder / apart).write_text("a life")
    (folder / "pack.zip").write_bytes(zipped({apart: b"in it"}))
    assert reader(folder).read(whole).endswith("a life")
    assert reader(folder).read(f"pack.zip/{whole}").endswith("in it")
    with pytest.raises(ToolError, match="there is no file named Resume"):
        reader(folder).read("Resume.txt")


def test_archives_that_do_harm(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "bomb.zip").write_bytes(zipped({"zeros.txt": b"0" * 60_000_000}))
    with pytest.raises(ToolError, match="unpacks to more"):
        reader(folder).read("bomb.zip/zeros.txt")
    (folder / "slip.zip").write_bytes(zipped({"../../evil.txt": b"x", "/etc/evil": b"x"}))
    assert "../../evil.txt (1 bytes)" in reader(folder).read("slip.zip")
    with pytest.raises(ToolError):
        reader(folder).read("slip.zip/../../evil.txt")
    (folder / "bad.zip").write_bytes(b"PK\x03\x04 broken")
    with pytest.raises(ToolError, match="damaged"):
        reader(folder).read("bad.zip")
    content = bytearray(zipped({"a.txt": b"hello world" * 100}))
    content[45:60] = bytes(15)
    (folder / "cut.zip").write_bytes(bytes(content))
    with pytest.raises(ToolError, match="damaged"):
        reader(folder).read("cut.zip/a.txt")
    (folder / "lzma.zip").write_bytes(zipped({"a.txt": b"x"}, zipfile.ZIP_LZMA))
    with pytest.raises(ToolError, match="packed in a way"):
        reader(folder).read("lzma.zip/a.txt")
    monkeypatch.setattr(files, "MAX_MEMBERS", 3)
    (folder / "many.zip").write_bytes(zipped({str(n): b"" for n in range(4)}))
    with pytest.raises(ToolError, match="more than 3 files"):
        reader(folder).read("many.zip")
