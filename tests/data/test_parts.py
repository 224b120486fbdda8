"""Parts of files hold every document once, and what is no such file is refused by its name."""

import gzip
import json
import os
import re

import pyarrow
import pyarrow.parquet
import pytest

from tests.data.tables import TEXTS, write_jsonl, write_parquet
from titanfunc.data import parts
from titanfunc.data.parts import Unreadable


def read_all(files, root, column="text"):
    found = parts.cut(files, str(root), column)
    return found, [row for part in found for row in parts.read(part)]


@pytest.mark.parametrize("size", [1, 50, 300, 1 << 20])
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_every_document_is_in_one_part(tmp_path, monkeypatch, kind, size):
    monkeypatch.setattr(parts, "PART_BYTES", size)
    write = {"jsonl": write_jsonl, "parquet": write_parquet}[kind]
    write(tmp_path / f"a.{kind}", TEXTS[:35])
    write(tmp_path / "b" / f"c.{kind}", TEXTS[35:])
    found, rows = read_all([f"a.{kind}", f"b/c.{kind}"], tmp_path)
    assert [text for _, text in rows] == TEXTS
    assert len({name for name, _ in rows}) == len(TEXTS)
    assert len(found) > 2 if size < 1000 else len(found) == 2
    assert len({part.key for part in found}) == len(found)
    whole = [
        row for part in parts.whole([f"a.{kind}", f"b/c.{kind}"], str(tmp_path), "text") for row in parts.read(part)
    ]
    assert whole == rows


def test_names_tell_the_row_or_the_byte(tmp_path):
    write_parquet(tmp_path / "a.parquet", ["zero", " ", "two"], rows=1)
    assert read_all(["a.parquet"], tmp_path)[1] == [("a.parquet:0", "zero"), ("a.parquet:2", "two")]
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n\n{"text": null}\n{"text": "four"}')
    assert read_all(["a.jsonl"], tmp_path)[1] == [("a.jsonl:0", "one"), ("a.jsonl:32", "four")]


def test_compressed_lines(tmp_path):
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in TEXTS)
    (part,), rows = read_all(["a.jsonl.gz"], tmp_path)
    assert [text for _, text in rows] == TEXTS
    assert part.size == (tmp_path / "a.jsonl.gz").stat().st_size  # by which cores are shared out
    whole = (tmp_path / "a.jsonl.gz").read_bytes()
    (tmp_path / "a.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(Unreadable, match=r"a\.jsonl\.gz: cannot be read \("):
        read_all(["a.jsonl.gz"], tmp_path)
    (tmp_path / "a.jsonl.gz").write_bytes(b"no gzip at all")
    with pytest.raises(Unreadable, match=r"a\.jsonl\.gz: cannot be read \(Not a gzipped file"):
        read_all(["a.jsonl.gz"], tmp_path)


GOOD = b'{"text": "fine"}\n'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (GOOD + b"text, but no JSON\n", r"line 2: not JSON \(Expecting value at column 1\)$"),
        (GOOD + b'{"text": "cut', r"line 2: not JSON \(Unterminated string starting at column 10\)$"),
        (GOOD + b'\n{"text": "a\tb"}\n', r"line 3: not JSON \(Invalid control character at column 12\)$"),
        (GOOD * 20 + b'{"text":\n', r"line 21: not JSON \(Expecting value at column 10\)$"),
        (b"\0" * 5000, r"line 1: not JSON \("),
        (b"\xff\xfe{\0", r"line 1: not JSON \('utf-8' codec can't decode byte 0xff in position 0"),
        (b"[" * 100_000 + b"\n", r"line 1: not JSON \("),
        (b'["text"]\n', "line 1: no 'text' .*; it is no object but list"),
        (b'{"txt": "a"}\n', "line 1: no 'text' .*; it has txt"),
        (b'{"text": 5}\n', "line 1: wanted text in 'text' .*, got int"),
        (b'{"text": "\\ud800"}\n', "line 1: half of a surrogate pair"),
    ],
)
def test_lines_that_are_no_documents_are_told(tmp_path, content, message):
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(Unreadable, match=rf"^{tmp_path}/a\.jsonl: {message}") as error:
        read_all(["a.jsonl"], tmp_path)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(content))
    with pytest.raises(Unreadable, match=rf"^{tmp_path}/a\.jsonl\.gz: {message}"):
        read_all(["a.jsonl.gz"], tmp_path)


@pytest.mark.parametrize("size", [1, 20, 100, 1000])
def test_a_line_has_its_number_in_the_file_whatever_part_it_is_in(tmp_path, monkeypatch, size):
    import fsspec

    monkeypatch.setattr(parts, "PART_BYTES", size)
    content = GOOD * 3 + b"\n" + GOOD * 17 + b"no JSON\n" + GOOD
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(Unreadable, match=r"/a\.jsonl: line 22: not JSON \(Expecting value at column 1\)$"):
        read_all(["a.jsonl"], tmp_path)
    address = "memory://titanfunc/broken.jsonl"
    with fsspec.open(address, "wb") as file:
        file.write(content)
    where = "line 22: not" if size == 1000 else r"line (\d+) from byte (\d+) on: not"  # none is fetched twice
    with pytest.raises(Unreadable, match=rf"^{address}: {where} JSON") as error:
        read_all([address], "")
    if size < 1000:
        number, begin = map(int, re.search(where, str(error.value)).groups())
        assert content[begin:].splitlines()[number - 1] == b"no JSON"


@pytest.mark.parametrize("lines", [0, 3])
def test_a_line_without_an_end_is_refused(tmp_path, monkeypatch, lines):
    monkeypatch.setattr(parts, "_LINE_BYTES", 1 << 20)
    (tmp_path / "a.jsonl").write_bytes(GOOD * lines + b'{"text": "' + b"a" * (1 << 21))
    with pytest.raises(Unreadable, match=rf"a\.jsonl: line {lines + 1}: longer than 1 MiB"):
        read_all(["a.jsonl"], tmp_path)
    with pytest.raises(Unreadable, match=rf"a\.jsonl: line {lines + 1}: longer than 1 MiB"):  # of another part
        list(parts.read(parts.Part("jsonl", ("a.jsonl",), str(tmp_path), "text", first=100)))


def damaged_parquets(folder):
    write_parquet(folder / "good.parquet", TEXTS)
    good = (folder / "good.parquet").read_bytes()
    footer = int.from_bytes(good[-8:-4], "little")
    return {
        "empty": b"",
        "text": b"this is no parquet file",
        "magic": b"PAR1" + b"\0" * 100 + b"PAR1",
        "huge footer": good[:-8] + (2**31 - 1).to_bytes(4, "little") + b"PAR1",
        "nothing but a huge footer": b"PAR1" + (2**31 - 1).to_bytes(4, "little") + b"PAR1",
        "footer of noise": good[: -8 - footer] + bytes(range(256)) * (footer // 256 + 1) + good[-8:],
        "cut": good[: len(good) // 2],
        "pages of noise": good[:4] + b"\x7f" * (len(good) - footer - 12) + good[-8 - footer :],
    }


DAMAGE = (
    "empty", "text", "magic", "huge footer", "nothing but a huge footer", "footer of noise", "cut", "pages of noise",
)  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGE)
def test_what_is_no_parquet_file_is_told(tmp_path, kind):
    (tmp_path / "a.parquet").write_bytes(damaged_parquets(tmp_path)[kind])
    with pytest.raises(Unreadable, match=rf"^{tmp_path}/a\.parquet: (not a parquet file that|cannot) ") as error:
        read_all(["a.parquet"], tmp_path)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


def test_a_column_must_be_there_and_hold_text(tmp_path):
    write_parquet(tmp_path / "a.parquet", TEXTS)
    with pytest.raises(Unreadable, match=r"a\.parquet: has no column 'words' \(data.column\); it has id, text$"):
        read_all(["a.parquet"], tmp_path, "words")
    with pytest.raises(Unreadable, match=r"a\.parquet: wanted text in column 'id' \(data.column\), got int64$"):
        read_all(["a.parquet"], tmp_path, "id")


@pytest.mark.parametrize(
    "kind",
    [pyarrow.dictionary(pyarrow.int32(), pyarrow.string()), pyarrow.string_view(), pyarrow.large_string()],
    ids=str,
)
def test_texts_of_parquet_however_they_are_kept(tmp_path, kind):
    texts = ["a", None, "é🙂", "a", " "] * 50
    table = pyarrow.table({"text": pyarrow.array(texts, type=kind)})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=60)
    assert pyarrow.parquet.read_schema(tmp_path / "a.parquet").field("text").type == kind
    assert [text for _, text in read_all(["a.parquet"], tmp_path)[1]] == ["a", "é🙂", "a"] * 50


def test_two_columns_of_one_name_are_refused(tmp_path):
    table = pyarrow.Table.from_arrays([pyarrow.array(["a"]), pyarrow.array(["b"])], names=["text", "text"])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(Unreadable, match=r"a\.parquet: has 2 columns 'text' \(data\.column\), "):
        read_all(["a.parquet"], tmp_path)


def test_a_file_that_went_away_is_told(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", TEXTS)
    (part,) = parts.cut(["a.jsonl"], str(tmp_path), "text")
    (tmp_path / "a.jsonl").unlink()
    with pytest.raises(Unreadable, match=r"a\.jsonl: cannot be read \(No such file or directory\)"):
        list(parts.read(part))
    with pytest.raises(Unreadable, match=r"a\.jsonl: cannot be read \(No such file or directory\)"):
        parts.cut(["a.jsonl"], str(tmp_path), "text")


def test_text_files_are_grouped(monkeypatch):
    monkeypatch.setattr(parts, "PART_BYTES", 100)
    found = parts.group([("a", 60), ("b", 60), ("c", 10), ("d", 500), ("e", 1)], "/root")
    assert [part.files for part in found] == [("a", "b"), ("c", "d"), ("e",)]
    assert found[0].name == "a and 1 more" and found[2].name == "e"


def test_a_digest_changes_with_the_files(tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl"

    def digest(times=True):
        return parts.identify(["a.jsonl"], str(tmp_path), times)

    path.write_bytes(b"a" * 100)
    first, times = digest(), path.stat()
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns + 10**9))
    assert digest() == first  # a small file's content is all that counts
    path.write_bytes(b"a" * 99 + b"b")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert digest() != first
    monkeypatch.setattr(parts, "_SAMPLE", 10)
    large, untimed = digest(), digest(times=False)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns + 10**9))
    assert digest() != large and digest(times=False) == untimed
    assert parts.identify(["hf://a@1/x.parquet"], "") != parts.identify(["hf://a@2/x.parquet"], "")
    with pytest.raises(Unreadable, match=r"b\.jsonl: cannot be read"):
        parts.identify(["b.jsonl"], str(tmp_path))


def test_files_elsewhere_are_read_by_their_address(tmp_path, monkeypatch):
    """An address as the hub's, of a file system that is in memory."""
    import fsspec

    monkeypatch.setattr(parts, "PART_BYTES", 500)
    write_jsonl(tmp_path / "a.jsonl", TEXTS)
    write_parquet(tmp_path / "b.parquet", TEXTS)
    files = ["memory://titanfunc/a.jsonl", "memory://titanfunc/b.parquet"]
    for address, name in zip(files, ("a.jsonl", "b.parquet"), strict=True):
        with fsspec.open(address, "wb") as file:
            file.write((tmp_path / name).read_bytes())
    found, rows = read_all(files, "")
    assert [text for _, text in rows] == TEXTS * 2 and len(found) > 4
    assert rows[0][0] == "memory://titanfunc/a.jsonl:0"
    with pytest.raises(Unreadable, match=r"^memory://titanfunc/c\.jsonl: cannot be read \("):
        parts.cut(["memory://titanfunc/c.jsonl"], "", "text")
