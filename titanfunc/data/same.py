"""What a run was begun on, kept in its folder: one that is resumed goes on with the same texts and tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from titanfunc.config.data import DataConfig
from titanfunc.config.files import write_text
from titanfunc.config.runs import TOKENIZER
from titanfunc.data import corpora
from titanfunc.data.source import Source
from titanfunc.data.tokenizers import from_definition

DATA = "data.json"


def keep(folder: Path, config: DataConfig, source: Source) -> None:
    """Write into a run's folder what its tokens come of; of a task without text, nothing. Raises OSError."""
    if source.corpus is None:
        return
    write_text(folder / DATA, json.dumps(_about(config, source), indent=1) + "\n")
    if definition := source.corpus.tokenizer.definition:
        write_text(folder / TOKENIZER, definition)


def require_same(folder: Path, config: DataConfig, source: Source) -> None:
    """Raise ValueError where a run would go on with tokens of another meaning than those that it has learned, or with
    files that have changed under their name since ``keep``; other files may be named.
    """
    if source.corpus is None:
        return
    kept = folder / TOKENIZER
    if kept.is_file():
        mine = source.corpus.tokenizer
        theirs = from_definition(str(kept), kept.read_text(encoding="utf-8"), mine.separator)
        if theirs.definition != mine.definition:
            raise ValueError(f"data.tokenizer: wanted that of the run, {kept}, got {mine.name}, which is another")
    if (folder / DATA).is_file():
        _require_same_files(folder / DATA, _about(config, source), config.path or config.corpus)


def _about(config: DataConfig, source: Source) -> dict[str, Any]:
    assert source.corpus is not None
    documents = sum(len(split.ends) for split in (source.corpus.train, source.corpus.validation))
    read = {} if config.stream else {"documents": documents}
    return {"named": corpora.named(config), **source.corpus.identity._asdict(), **read}


def _require_same_files(kept: Path, mine: dict[str, Any], name: str) -> None:
    try:
        there = json.loads(kept.read_text(encoding="utf-8"))
        other = there["named"] != mine["named"]
        same = there["digest"] == mine["digest"]
        then = _amount(there)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{kept}: cannot be read ({type(error).__name__}: {error}); delete it to go on") from None
    if not (other or same):
        now = f"{_amount(mine)} now" if _amount(mine) != then else "as many now, of other contents or times"
        raise ValueError(
            f"data.path: {name} has changed since the run began ({then} then, {now}); put the files back, or delete "
            f"{kept} to go on with those that are there"
        )


def _amount(about: dict[str, Any]) -> str:
    documents = f"{about['documents']:,} documents, " if "documents" in about else ""
    return f"{documents}{about['bytes']:,} bytes in {about['files']:,} file{'s' if about['files'] != 1 else ''}"
