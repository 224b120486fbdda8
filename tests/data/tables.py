"""Small tables of documents for the tests of readers, caches and streams."""

import json

import pyarrow
import pyarrow.parquet

TEXTS = [f"document {i}: " + "é🙂 word " * (i % 7) for i in range(60)]


def write_parquet(path, texts, rows=10, column="text"):
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pyarrow.table({"id": list(range(len(texts))), column: texts})
    pyarrow.parquet.write_table(table, path, row_group_size=rows)


def write_jsonl(path, texts, column="text"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"n": i, column: text}) + "\n" for i, text in enumerate(texts)))


def hub_folder(folder, files=4, texts=TEXTS):
    """A folder laid out like a dataset of the hub, with two subsets."""
    each = len(texts) // files
    for i in range(files):
        write_parquet(folder / "sample" / f"train-{i:05d}.parquet", texts[i * each : (i + 1) * each])
    write_jsonl(folder / "other" / "train.jsonl", ["other one", "other two"])
    subsets = "".join(
        f"- config_name: {name}\n  data_files:\n  - split: train\n    path: {name}/*\n" for name in ("sample", "other")
    )
    (folder / "README.md").write_text(f"---\nconfigs:\n{subsets}---\n")
    return folder
