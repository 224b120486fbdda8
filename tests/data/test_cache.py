"""Tokens are made once, whatever stops the making, and what is not as it was written is refused by its name."""

import dataclasses
import errno
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests.data.tables import TEXTS, write_jsonl, write_parquet
from titanfunc import data
from titanfunc.config.data import DataConfig
from titanfunc.config.failures import Damaged, Killed, NotWritten
from titanfunc.data import cache, corpora, making, parts, shards
from titanfunc.data.stored import StoredTokens
from titanfunc.data.tokenizers import byte_tokenizer, train_bpe


@pytest.fixture
def config(tmp_path, monkeypatch):
    """60 documents in two files, which make some ten parts."""
    monkeypatch.setattr(parts, "PART_BYTES", 500)
    write_jsonl(tmp_path / "texts" / "a.jsonl", TEXTS[:30])
    write_parquet(tmp_path / "texts" / "b.parquet", TEXTS[30:])
    return DataConfig(corpus="files", path=str(tmp_path / "texts"), cache_dir=str(tmp_path / "cache"))


def open_all(config):
    return cache.open_cache(config, byte_tokenizer(), corpora.list_files(config))


def texts(found):
    tokenizer = byte_tokenizer()
    return [
        tokenizer.decode(piece[:-1])
        for shard in found
        for piece in np.split(np.asarray(shard.tokens), shard.ends[:-1])
        if len(piece)
    ]


def folder_of(config):
    (folder,) = Path(config.cache_dir).glob("tokens-*")
    return folder


def test_a_large_file_that_was_edited_between_its_samples_is_read_anew(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", ["word " * 50_000, "word " * 100_000, "word " * 150_000])
    config = DataConfig("files", str(tmp_path / "a.jsonl"), cache_dir=str(tmp_path / "cache"))
    listing = corpora.list_files(config)
    before, identity, about = texts(open_all(config)), listing.identify(), os.stat(config.path)
    with open(config.path, "r+b") as file:
        file.seek(200_000)
        file.write(b"WORDS")
    os.utime(config.path, ns=(about.st_atime_ns, about.st_mtime_ns + 10**9))
    assert texts(open_all(config)) != before and listing.identify() == identity


@pytest.mark.parametrize("corpus", ["text_folder", "files", "stream"])
def test_names_of_files_need_not_be_text(tmp_path, corpus):
    folder = tmp_path / "texts"
    folder.mkdir()
    ending, stream = ("txt", False) if corpus == "text_folder" else ("jsonl", corpus == "stream")
    for name in (b"\xffone", b"two"):
        with open(os.path.join(os.fsencode(folder), name + b"." + ending.encode()), "w") as file:
            file.writelines([json.dumps({"text": text}) + "\n" for text in TEXTS])
    settings = {"cache_dir": "" if stream else str(tmp_path / "cache"), "seq_len": 16, "validation_fraction": 0.4}
    config = DataConfig("files" if stream else corpus, str(folder), stream=stream, **settings)
    source = data.open_source(config, 1)
    named = {os.fsencode(name).partition(b".")[0] for step in range(20) for name in source.documents(step)}
    assert named <= {b"\xffone", b"two"}
    assert stream or len(named) == (1 if corpus == "text_folder" else 2)
    assert [name.partition(".")[0] for name in data.load_documents(config)["name"]].count("\ufffdone") in (1, 60)


def umask():
    """The bits that new files of this process do not have."""
    bits = os.umask(0)
    os.umask(bits)
    return bits


@pytest.fixture
def made(monkeypatch):
    """The numbers of the shards that are made, as they are."""
    numbers = []
    make = making._make
    monkeypatch.setattr(making, "_make", lambda job, *a: numbers.append(job.number) or make(job, *a))
    return numbers


def test_tokens_are_made_once_and_then_read(config, made):
    first = open_all(config)
    assert texts(first) == TEXTS and len(first) == len(made) > 5
    assert all(isinstance(shard.tokens, StoredTokens) for shard in first)
    assert [shard.sizes.sum() for shard in first] == [len(shard.tokens) - len(shard.ends) for shard in first]
    assert first[0].name(0) == "a.jsonl:0" and first[-1].name(len(first[-1].ends) - 1) == "b.parquet:29"
    made.clear()
    assert texts(open_all(config)) == TEXTS
    assert made == []
    assert {path.stat().st_mode & 0o777 for path in folder_of(config).glob("shard-*")} == {0o666 & ~umask()}
    left = {path.name.rpartition(".")[2] for path in folder_of(config).iterdir()}
    assert left == {"tokens", "documents", "names", "json", "lock"}


def test_what_the_tokens_depend_on_has_another_folder(config, made, tmp_path):
    open_all(config)

    def count():
        made.clear()
        open_all(config)
        return len(made)

    assert count() == 0
    write_jsonl(tmp_path / "texts" / "a.jsonl", [*TEXTS[:29], "another text"])
    assert count() > 0 and "another text" in texts(open_all(config))
    write_jsonl(tmp_path / "texts" / "c.jsonl", ["a third file"])
    assert count() > 0
    made.clear()
    cache.open_cache(config, train_bpe(TEXTS, 300), corpora.list_files(config))
    assert len(made) > 0
    assert len(list(Path(config.cache_dir).glob("tokens-*"))) == 4


def test_a_new_split_or_seed_needs_no_new_tokens(config, made):
    one = data.load(config)
    made.clear()
    two = data.load(dataclasses.replace(config, seed=5, validation_fraction=0.4, seq_len=16))
    assert made == [] and len(two.validation.tokens) > 2 * len(one.validation.tokens)


def test_finished_shards_are_kept_when_making_is_interrupted(config, made, monkeypatch):
    write = shards.write_shard

    def interrupt(folder, number, *rest):
        if number == 3:
            raise KeyboardInterrupt
        return write(folder, number, *rest)

    monkeypatch.setattr(making, "write_shard", interrupt)
    with pytest.raises(KeyboardInterrupt):
        open_all(config)
    monkeypatch.setattr(making, "write_shard", write)
    assert made == [0, 1, 2, 3]
    made.clear()
    found = open_all(config)
    assert texts(found) == TEXTS and made == list(range(3, len(found)))


def test_a_full_disk_is_told_and_costs_nothing(config, made, monkeypatch):
    sync = os.fsync
    written = []

    def full(handle):
        written.append(handle)
        if len(written) > 20:
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        NotWritten, match=r"^data.cache_dir: cannot write .*shard-\d+\.\w+ \(No space left on device\);"
    ):
        open_all(config)
    monkeypatch.setattr(os, "fsync", sync)
    assert not list(folder_of(config).glob(".writing-*"))
    made.clear()
    found = open_all(config)
    assert texts(found) == TEXTS and 0 < len(made) < len(found)


def test_a_folder_that_cannot_be_written_is_told(config, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"^data.cache_dir: "):
        open_all(dataclasses.replace(config, cache_dir=str(tmp_path / "file" / "below")))


def test_text_that_cannot_be_read_is_told_and_the_rest_is_kept(config, made, tmp_path):
    lines = (tmp_path / "texts" / "a.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "texts" / "a.jsonl").write_text("".join([*lines[:-1], "no json\n"]))
    with pytest.raises(ValueError, match=r"texts/a\.jsonl: line 30: not JSON \(Expecting value at column 1\)"):
        open_all(config)
    assert len(made) > 1 and len(list(folder_of(config).glob("shard-*.json"))) == len(made) - 1


DAMAGE = {
    "cut": (lambda content: content[:-1], r"wanted [\d,]+ bytes, got"),
    "longer": (lambda content: content + b"\0", r"wanted [\d,]+ bytes, got"),
    "changed": (lambda content: content[:-2] + bytes([content[-2] ^ 1]) + content[-1:], "its checksum differs"),
}


@pytest.mark.parametrize("ending", shards.ENDINGS)
@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_shard_is_named_and_made_anew_once_deleted(config, made, kind, ending):
    damage, message = DAMAGE[kind]
    open_all(config)
    path = folder_of(config) / f"shard-00002.{ending}"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=rf"shard-00002\.{ending}: {message}.*; delete it, and the next run makes it"):
        open_all(config)
    path.unlink()
    made.clear()
    assert texts(open_all(config)) == TEXTS and made == [2]


@pytest.mark.parametrize("craft", ["descends", "beyond", "short", "negative"])
def test_documents_that_end_where_they_cannot_are_refused(config, monkeypatch, craft):
    open_all(config)
    monkeypatch.setattr(cache, "VERIFIED_BYTES", 0)  # a checksum says nothing of who wrote the file
    path = folder_of(config) / "shard-00000.documents"
    index = np.fromfile(path, dtype="<i8").reshape(2, -1)
    if craft == "descends":
        index[0, 0] = index[0, 1] + 1
    elif craft == "negative":
        index[0, 0] = -1
    else:
        index[0, -1] += 1 if craft == "beyond" else -1
    index.tofile(path)
    with pytest.raises(Damaged, match=r"shard-00000\.documents: wanted ends of documents that ascend to [\d,]+ tok"):
        open_all(config)


def test_a_large_cache_is_verified_when_asked(config, monkeypatch):
    open_all(config)
    path = folder_of(config) / "shard-00001.tokens"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    monkeypatch.setattr(cache, "VERIFIED_BYTES", 0)
    assert len(open_all(config)) > 5
    with pytest.raises(ValueError, match=r"shard-00001\.tokens: its checksum differs"):
        data.verify(folder_of(config))


def change(**changes):
    def edit(about):
        about["shards"][1].update(changes)

    return edit


MANIFESTS = {
    "traversal": (change(name="../../../../etc/passwd"), r"wanted the shard shard-00001, got '\.\./"),
    "absolute": (change(name="/etc/passwd"), r"wanted the shard shard-00001, got '/etc"),
    "another": (change(name="shard-00000"), "wanted the shard shard-00001, got 'shard-00000'"),
    "no name": (change(name=None), "wanted the shard shard-00001, got None"),
    "negative": (change(tokens=-1), "shard-00001: wanted whole numbers of at least 0"),
    "fraction": (change(documents=1.5), "shard-00001: wanted whole numbers of at least 0"),
    "endless": (change(tokens=10**400), "shard-00001: wanted whole numbers of at least 0"),
    "dtype": (lambda about: about.update(dtype="object"), "wanted ids of uint8, uint16 or uint32, got 'object'"),
    "format": (lambda about: about.update(format=1), "wanted format 2, got 1"),
    "no shards": (lambda about: about.pop("shards"), "no 'shards'"),
    "list": (lambda about: about.update(shards=[[]]), "list indices must be"),
}


@pytest.mark.parametrize("kind", MANIFESTS)
def test_a_manifest_that_lies_is_refused(config, kind):
    edit, message = MANIFESTS[kind]
    open_all(config)
    path = folder_of(config) / "manifest.json"
    about = json.loads(path.read_text())
    edit(about)
    path.write_text(json.dumps(about))
    with pytest.raises(ValueError, match=rf"^{path}: not a manifest of tokens \({message}.*; delete it"):
        open_all(config)
    path.unlink()
    assert texts(open_all(config)) == TEXTS


@pytest.mark.parametrize("size", [10**12, 2**52])
def test_a_huge_declared_size_is_refused(config, size):
    open_all(config)
    path = folder_of(config) / "manifest.json"
    about = json.loads(path.read_text())
    change(tokens=size)(about)
    path.write_text(json.dumps(about))
    with pytest.raises(ValueError, match=rf"shard-00001\.tokens: wanted {size:,} bytes, got \d+; delete it"):
        open_all(config)


@pytest.mark.parametrize("content", ["", "{", "[]", "[" * 100_000])
def test_a_manifest_that_is_none_is_refused(config, content):
    open_all(config)
    path = folder_of(config) / "manifest.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"manifest\.json: not a manifest of tokens \(.*; delete it"):
        open_all(config)


def test_other_processes_make_the_same_shards(config, tmp_path):
    tokenizer = train_bpe(TEXTS, 270)
    wanted = corpora.cut(config, corpora.list_files(config))
    one, two = tmp_path / "one", tmp_path / "two"
    alone = making.make_shards(one, wanted, tokenizer, processes=1)
    assert making.make_shards(two, wanted, tokenizer, processes=2) == alone
    assert {path.name: path.read_bytes() for path in one.iterdir()} == {
        path.name: path.read_bytes() for path in two.iterdir()
    }


def test_an_error_of_another_process_is_told_as_it_is(config, tmp_path):
    wanted = corpora.cut(config, corpora.list_files(config))
    (tmp_path / "texts" / "b.parquet").unlink()
    with pytest.raises(parts.Unreadable, match=r"b\.parquet: cannot be read \(No such file or directory\)"):
        making.make_shards(tmp_path / "one", wanted, byte_tokenizer(), processes=2)
    assert (tmp_path / "one" / "shard-00000.json").is_file()


def test_cores_are_counted_where_the_system_does_not_tell_which_may_be_used(monkeypatch):
    assert making._cores() == len(os.sched_getaffinity(0))
    monkeypatch.delattr(os, "sched_getaffinity")
    assert making._cores() == os.cpu_count()


def test_a_killed_process_is_told(tmp_path):
    class Deadly(parts.Part):
        """What ends the process that it is sent to."""

        def __reduce__(self):
            return _end, ()

    with pytest.raises(Killed, match=r"^data.cache_dir: a process that tokenizes was killed \(is there enough"):
        making.make_shards(tmp_path / "one", [Deadly("sotu", ())], byte_tokenizer(), processes=2)


def _end():
    os.kill(os.getpid(), signal.SIGKILL)


MAKE = """
import sys
import time
from titanfunc.config.data import DataConfig
from titanfunc.data import cache, corpora, making, parts
from titanfunc.data.stored import StoredTokens
from titanfunc.data.tokenizers import byte_tokenizer
parts.PART_BYTES = 500
if len(sys.argv) > 3:
    write = making.write_shard
    def kill(folder, number, *rest):
        if number == 3:
            __import__("os").kill(__import__("os").getpid(), 9)
        return write(folder, number, *rest)
    making.write_shard = kill
config = DataConfig(corpus="files", path=sys.argv[1], cache_dir=sys.argv[2])
found = cache.open_cache(config, byte_tokenizer(), corpora.list_files(config))
print(sum(len(shard.tokens) for shard in found))
"""


def begin(config, *more):
    command = [sys.executable, "-c", MAKE, config.path, config.cache_dir, *more]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


UNGUARDED = """
import sys
import time
from pathlib import Path
from titanfunc.config.data import DataConfig
from titanfunc.data import cache, corpora, making, parts
from titanfunc.data.stored import StoredTokens
from titanfunc.data.tokenizers import byte_tokenizer
parts.PART_BYTES = 500
making._ALONE_BYTES = 0
config = DataConfig(corpus="files", path=sys.argv[1], cache_dir=sys.argv[2])
print(len(cache.open_cache(config, byte_tokenizer(), corpora.list_files(config))))
"""


def test_a_script_needs_no_guard(config, tmp_path):
    """It is not run again by the processes that it starts."""
    (tmp_path / "script.py").write_text(UNGUARDED)
    command = [sys.executable, str(tmp_path / "script.py"), config.path, config.cache_dir]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 5
    assert texts(open_all(config)) == TEXTS


def test_processes_at_the_same_time_and_one_that_is_killed(config, made):
    killed = begin(config, "killed")
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    assert len(list(folder_of(config).glob("shard-*.json"))) == 3
    (folder_of(config) / f".writing-{killed.pid}-shard-00003.tokens").write_text("begun")
    running = [begin(config) for _ in range(2)]
    told = [process.communicate()[0] for process in running]
    size = sum(len(text.encode()) + 1 for text in TEXTS)
    assert [int(each) for each in told] == [size] * 2
    assert not list(folder_of(config).glob(".writing-*"))
    assert texts(open_all(config)) == TEXTS and made == []


def test_a_process_waits_for_the_one_that_makes(config):
    folder = Path(config.cache_dir) / "x"
    with cache.locked(folder / "lock"):
        waiting = multiprocessing.get_context("fork").Process(target=lambda: cache.locked(folder / "lock").__enter__())
        waiting.start()
        waiting.join(0.2)
        assert waiting.is_alive()
    waiting.join(10)
    assert waiting.exitcode == 0


def test_a_terminal_sees_how_far_it_is(config, monkeypatch, capfd):
    open_all(dataclasses.replace(config, cache_dir=config.cache_dir + "/quiet"))
    assert capfd.readouterr() == ("", "")
    monkeypatch.setenv("FORCE_COLOR", "1")
    open_all(config)
    shown = capfd.readouterr()
    assert shown.out == "" and "M tokens" in shown.err and "100%" in shown.err


SLOW = """
import os, signal, sys, threading, time
from pathlib import Path
from titanfunc.data import parts
from titanfunc.data.parts import Part
from titanfunc.data.tokenizers import byte_tokenizer

class Slow(Part):
    '''Text that takes long in the process that it is sent to.'''
    def __reduce__(self):
        return eval, ("__import__('time').sleep(60)",)

def interrupt():
    while not Path(sys.argv[1], "shard-00000.json").is_file():
        time.sleep(0.01)
    time.sleep(0.2)
    Path(sys.argv[1], "when").write_text(str(time.time()))
    os.killpg(0, signal.SIGINT) if sys.argv[3] == "all" else os.kill(os.getpid(), signal.SIGINT)

from titanfunc.data import making
folder, root = Path(sys.argv[1]), sys.argv[2]
threading.Thread(target=interrupt, daemon=True).start()
wanted = [Part("text", ("a.txt",), root, size=1), *(Slow("text", ("b.txt",), root, first=i, size=1) for i in range(9))]
making.make_shards(folder, wanted, byte_tokenizer(), processes=2)
"""


@pytest.mark.parametrize("to", ["all", "one"])
def test_an_interrupt_ends_what_is_under_way_at_once(tmp_path, to):
    """Whether the terminal sends it to every process, or somebody to the first alone."""
    (tmp_path / "a.txt").write_text("text")
    command = [sys.executable, "-c", SLOW, str(tmp_path / "made"), str(tmp_path), to]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, start_new_session=True)
    took = time.time() - float((tmp_path / "made" / "when").read_text())
    assert done.returncode == -signal.SIGINT and took < 10  # of 60 s
    told, *trace = done.stderr.splitlines()
    assert told == "tokenizing was interrupted: what is finished is kept, and the next run goes on from there"
    assert trace[0].startswith("Traceback") and done.stderr.count("Traceback") == 1  # the first process's, of no other
    part = parts.Part("text", ("a.txt",), str(tmp_path), size=1)
    assert shards.finished(tmp_path / "made", 0, {"part": part.key})
    assert {path.name for path in (tmp_path / "made").glob("*.json")} == {"shard-00000.json"}
