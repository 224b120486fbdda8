"""What a run was begun on, kept in its folder: one that is resumed goes on with the same texts and tokens."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from titanfunc.config.data import DataConfig
from titanfunc.config.files import write_text
from titanfunc.config.runs import DATA, TOKENIZER
from titanfunc.data import corpora
from titanfunc.data.source import Source
from titanfunc.data.tokenizers import from_definition


def keep(folder: Path, config: DataConfig, source: Source) -> None:
    """Write into a run's folder what its tokens come of, unless it is there: what a run was begun on stays. Of a task
    without text, nothing. Raises OSError."""
    if source.corpus is None:
        return
    if not (folder / DATA).is_file():
        write_text(folder / DATA, json.dumps(_about(config, source), indent=1) + "\n")
    if source.corpus.tokenizer.definition and not (folder / TOKENIZER).is_file():
        write_text(folder / TOKENIZER, source.corpus.tokenizer.definition)


def require_same(folder: Path, config: DataConfig, source: Source, trained_on: Mapping[str, Any] | None = None) -> None:
    """Raise ValueError where a run would go on with tokens of another meaning than those that it has learned, or with
    other texts than those of ``keep``, wherever they lie.

    trained_on: of a run that goes on in another folder, the data settings of its checkpoint: where ``config`` names
    other texts than these, others are meant.
    """
    if source.corpus is None:
        return
    kept = folder / TOKENIZER
    if kept.is_file():
        mine = source.corpus.tokenizer
        theirs = from_definition(str(kept), kept.read_text(encoding="utf-8"), mine.separator)
        if theirs.definition != mine.definition:
            raise ValueError(f"data.tokenizer: wanted that of the run, {kept}, got {mine.name}, which is another")
    meant = trained_on is not None and any(trained_on.get(name) != getattr(config, name) for name in _NAMES)
    if (folder / DATA).is_file() and not meant:
        _require_same_texts(folder / DATA, _about(config, source), config)


_NAMES = ("corpus", "path", "subset", "revision")


def _about(config: DataConfig, source: Source) -> dict[str, Any]:
    assert source.corpus is not None
    documents = sum(len(split.ends) for split in (source.corpus.train, source.corpus.validation))
    identity = {name: value for name, value in source.corpus.identity._asdict().items() if value != ""}
    return {"named": corpora.named(config), **identity, **({} if config.stream else {"documents": documents})}


def _require_same_texts(kept: Path, mine: dict[str, Any], config: DataConfig) -> None:
    try:
        there = json.loads(kept.read_text(encoding="utf-8"))
        same = there["digest"] == mine["digest"]
        where = there["named"][1] or there["named"][0]
        renamed, then = there["named"][:3] != mine["named"][:3], _amount(there)
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{kept}: cannot be read ({type(error).__name__}: {error}); delete it to go on") from None
    if same:
        return
    name, now = config.path or config.corpus, f"{_amount(mine)} now"
    now = now if _amount(mine) != then else "as many now, of other contents"
    on_purpose = f"or delete {kept} to go on with those that are there"
    if renamed:
        raise ValueError(
            f"data.path: wanted the texts that the run began with, {where} ({then}), got others, {name} ({now}); name "
            f"those, {on_purpose}"
        )
    if "commit" in mine:
        commit = there.get("commit")
        ask = f"ask for the former by data.revision={commit}" if commit else "name that commit by data.revision"
        raise ValueError(
            f"data.revision: {name} has changed since the run began ({then} then, {now}); {ask}, {on_purpose}"
        )
    raise ValueError(
        f"data.path: {name} has changed since the run began ({then} then, {now}); put the files back, {on_purpose}"
    )


def _amount(about: dict[str, Any]) -> str:
    documents = f"{about['documents']:,} documents, " if "documents" in about else ""
    size = f"{about['bytes']:,} bytes" if "commit" not in about else f"commit {str(about['commit'])[:12]}"
    return f"{documents}{size} in {about['files']:,} file{'s' if about['files'] != 1 else ''}"
