"""A column that is not there is told by the first row, before anything slow is imported."""

import gzip
import subprocess
import sys

import pytest

from tests.data.tables import write_jsonl, write_parquet
from titanfunc.config.columns import require_column
from titanfunc.config.data import DataConfig


def write_gzip(path, texts, column):
    write_jsonl(path.with_suffix(""), texts, column=column)
    path.write_bytes(gzip.compress(b"\n" + path.with_suffix("").read_bytes()))
    path.with_suffix("").unlink()


WRITE = {"jsonl": write_jsonl, "jsonl.gz": write_gzip, "parquet": write_parquet}


@pytest.mark.parametrize("ending", WRITE)
def test_a_column_that_is_not_there_is_refused(tmp_path, ending):
    WRITE[ending](tmp_path / f"a.{ending}", ["one", "two"], column="words")
    config = {"corpus": "files", "path": str(tmp_path)}
    DataConfig(**config, column="words").check_sources()
    has = "id, words" if ending == "parquet" else "n, words"
    with pytest.raises(ValueError, match=rf"^data.column: wanted one that .*/a\.{ending} has \({has}\), got 'text'$"):
        DataConfig(**config).check_sources()


@pytest.mark.parametrize("content", [b"", b"\n\n", b"no json", b"[1]", b"[" * 100_000, b"\xff\xfe", b'{"a": '])
@pytest.mark.parametrize("ending", WRITE)
def test_what_is_no_table_is_left_to_its_reader(tmp_path, content, ending):
    for path, found in ((tmp_path / f"a.{ending}", content), (tmp_path / "cut.jsonl.gz", gzip.compress(content)[:-5])):
        path.write_bytes(found)
        require_column(path, "text")
    require_column(tmp_path / f"nowhere.{ending}", "text")


def test_nothing_slow_is_imported(tmp_path):
    write_parquet(tmp_path / "a.parquet", ["one"])
    code = (
        "import sys; from titanfunc.config.data import DataConfig\n"
        f"DataConfig(corpus='files', path={str(tmp_path)!r}).check_sources()\n"
        "print(*({'torch', 'datasets', 'pandas'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
