"""Which checkpoints there are, and that no file makes anything but data of itself, or takes memory first."""

import json
import os
import shutil
import struct
import time

import pytest

from tests.saved import NO_TENSORS, put_checkpoint, rewrite, sign
from titanfunc.config import checkpoints, evaluate, runs, strict_json
from titanfunc.config.experiment import from_metadata
from titanfunc.config.tensor_header import read_header


def put(run_dir, step, **changes):
    return put_checkpoint(run_dir, step, **{"model": {}, **changes})


def test_checkpoints_are_ordered_by_step_and_complete(tmp_path):
    assert checkpoints.checkpoints(tmp_path) == []
    places = [put(tmp_path, step) for step in (2, 10, 9)]
    checkpoints.checkpoint_dir(tmp_path, 11).mkdir()  # neither json nor tensors
    (tmp_path / checkpoints.CHECKPOINTS / ".writing_step_00000012").mkdir()
    checkpoints.checkpoint_dir(tmp_path, 13).symlink_to(places[0])
    assert checkpoints.checkpoints(tmp_path) == [places[0], places[2], places[1]]


def test_the_newest_whole_one_is_taken_and_what_is_wrong_with_later_ones_is_said(tmp_path, capsys):
    places = [put(tmp_path, step) for step in (1, 2, 3, 4)]
    latest = tmp_path / checkpoints.CHECKPOINTS / checkpoints.LATEST
    latest.write_text("step_00000004\n")
    assert runs.latest(tmp_path) == places[3]
    assert capsys.readouterr().err == ""

    (places[3] / checkpoints.TENSORS).unlink()
    (places[2] / checkpoints.METADATA).write_text(json.dumps({"format": 2, "step": 3, "model": {}, "more": 1}))
    assert runs.find_checkpoint(str(tmp_path)) == places[1]
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.startswith(f"warning: {places[3]}: not a checkpoint that can be read (state")
    assert f"{places[2]}: not" in said and said.endswith(f"{places[1]} is taken instead\n")
    with pytest.raises(ValueError, match=r"step_00000004: not a checkpoint that can be read \(state.safetensors: wan"):
        runs.find_checkpoint(str(places[3]))

    latest.write_text("step_00000005\n")
    assert runs.latest(tmp_path) == places[1]
    assert "step_00000005: gone, though latest names it; " in capsys.readouterr().err


def test_a_run_with_none_but_damaged_ones(tmp_path, capsys):
    (put(tmp_path, 1) / checkpoints.MANIFEST).unlink()
    message = (
        r"^train\.resume: no whole checkpoint in .*manifest\.json: wanted a file, got nothing.*; leave train.resume out"
    )
    with pytest.raises(ValueError, match=message):
        runs.find_checkpoint(str(tmp_path))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("lost", [checkpoints.TENSORS, checkpoints.METADATA, checkpoints.MANIFEST, "all of it"])
def test_an_older_run_is_not_taken_for_the_newest(tmp_path, capsys, lost):
    old, new = put(tmp_path / "old", 9), put(tmp_path / "new", 1)
    for place, age in ((old, 60), (new, 0)):
        (place.parent / checkpoints.LATEST).write_text(place.name)
        then = time.time() - age
        for path in (place / checkpoints.METADATA, place, place.parent / checkpoints.LATEST):
            os.utime(path, (then, then))
    assert runs.find_checkpoint("latest", root=tmp_path) == new
    shutil.rmtree(new) if lost == "all of it" else (new / lost).unlink()
    message = (
        rf"^train\.resume: wanted a whole checkpoint in {tmp_path}/new, the newest run, got none \({new}: .*\); to "
        rf"take an older run, name it, as train\.resume={tmp_path}/old$"
    )
    with pytest.raises(ValueError, match=message) as error:
        runs.find_checkpoint("latest", root=tmp_path)
    assert "\n" not in str(error.value) and capsys.readouterr().err == ""
    assert runs.find_checkpoint(str(tmp_path / "old")) == old
    with pytest.raises(ValueError, match=r"^run: wanted a whole checkpoint in .*, as run="):
        evaluate.prepare(evaluate.EvaluateConfig(), tmp_path)


def test_tensors_of_another_step_are_damage(tmp_path, capsys):
    """However well they are signed, such as of a folder put together of two checkpoints."""
    good, place = put(tmp_path, 1), put(tmp_path, 2)
    step = {"step": entry((), (0, 8), "I64")}
    for value in (2, 1):
        (place / checkpoints.TENSORS).write_bytes(header(step, value.to_bytes(8, "little")))
        sign(place)
        assert runs.latest(tmp_path) == (place if value == 2 else good)
    assert "state.safetensors is of step 1, but checkpoint.json of 2" in capsys.readouterr().err
    (place / checkpoints.TENSORS).write_bytes(header({"step": entry((1,), (0, 8), "I64")}, bytes(8)))
    assert checkpoints.check(sign(place))["step"] == 2  # which is no step, and nothing to be compared


def test_format_1_has_no_checksums_and_is_read(tmp_path, capsys):
    place = put(tmp_path, 1, format=1)
    (place / checkpoints.MANIFEST).unlink()
    assert checkpoints.check(place)["step"] == 1
    checkpoints.warn_unless_verified(place, checkpoints.check(place))
    assert capsys.readouterr().err == f"warning: {place} is of format 1, which has no checksums: it is not verified\n"


GOOD = {"format": 2, "step": 1, "model": {}}
METADATA = {
    "another format": ({"format": 99}, "wanted a checkpoint of format 2, got 99"),
    "a format that equals one": ({"format": True}, "wanted a checkpoint of format 2, got True"),
    "no step": ({"format": 2, "model": {}}, "no whole number 'step'"),
    "a step that is a word": ({"format": 2, "step": "1", "model": {}}, "no whole number 'step'"),
    "a step that is true": ({"format": 2, "step": True, "model": {}}, "no whole number 'step'"),
    "a step below 0": ({"format": 2, "step": -1, "model": {}}, "no whole number 'step'"),
    "no model": ({"format": 2, "step": 1, "model": []}, "has no 'model'"),
    "settings that are a list": ({"format": 2, "step": 1, "model": {}, "train": [1]}, "wanted a mapping for 'train'"),
    "a step of 400 digits": ({"format": 2, "step": 10**400, "model": {}}, "no whole number 'step'"),
    "a loss of 400 digits": ({**GOOD, "validation_loss": 10**400}, "wanted a number for 'validation_loss'"),
    "a loss that is a word": ({**GOOD, "validation_loss": "low"}, "wanted a number for 'validation_loss'"),
    "a loss that is true": ({**GOOD, "validation_loss": True}, "wanted a number for 'validation_loss'"),
    "another step": ({"format": 2, "step": 2, "model": {}}, "is of step 2"),
    "no json": ("{", "checkpoint.json: Expecting property name"),
    "no mapping": ("[]", "got None"),
    "nan": ('{"format": 2, "step": NaN, "model": {}}', "NaN is no number of json"),
    "infinity": ('{"format": 2, "step": 1, "model": {"dim": -Infinity}}', "-Infinity is no number of json"),
    "an endless number": ('{"format": 2, "step": 1, "model": {"dim": 1e999}}', "1e999 is no finite number"),
    "a number of 5,000 digits": ('{"format": 2, "step": ' + "9" * 5000 + "}", "Exceeds the limit"),
    "a key twice": ('{"format": 2, "step": 1, "step": 1, "model": {}}', "the key 'step' comes twice"),
    "40 levels": ('{"model": ' + "[" * 40 + "]" * 40 + "}", "nested too deeply"),
    "a million levels": ("[" * 10**6, "nested too deeply"),
    "5 MB": ('"' + "a" * 5 * 2**20 + '"', "wanted at most 4,194,304 bytes, got more"),
}


@pytest.mark.parametrize("name", METADATA)
def test_json_that_is_refused(tmp_path, name):
    content, message = METADATA[name]
    place = rewrite(put(tmp_path, 1), content)
    with pytest.raises(ValueError, match="step_00000001: ") as error:
        checkpoints.check(place)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_huge_json_is_not_read(tmp_path):
    place = put(tmp_path, 1)
    os.truncate(place / checkpoints.METADATA, 2**40)  # a sparse file: a TB that takes no room
    with pytest.raises(ValueError, match="wanted at most 4,194,304 bytes"):
        checkpoints.check(place)
    place = put(tmp_path, 2)
    os.truncate(place / checkpoints.MANIFEST, 2**40)
    with pytest.raises(ValueError, match=r"manifest\.json: "):
        checkpoints.check(place)


def header(text, data=b"", length=None):
    raw = text.encode() if isinstance(text, str) else json.dumps(text).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def entry(shape=(2,), offsets=(0, 8), dtype="F32", **more):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets), **more}


TENSORS = {
    "a pickle": (b"\x80\x04\x95" + b"cos\nsystem\n(S'touch owned'\ntR." * 3, "no safetensors file (a header of"),
    "a torch file": (b"PK\x03\x04" + bytes(200), "no safetensors file (a header of"),
    "an empty file": (b"", "no safetensors file"),
    "a header beyond the file": (header("{}", length=2**62), "no safetensors file (a header of 4,611,6"),
    "a header of no length": (header("", length=0), "no safetensors file"),
    "a header that is a list": (header([]), "its header is no mapping"),
    "a size beyond the file": (header({"a": entry((2**40,), (0, 2**42))}, bytes(8)), "but it holds 8"),
    "bytes that its shape has not": (header({"a": entry((3,))}, bytes(8)), "not as many as its shape says"),
    "a shape below 0": (header({"a": entry((-2, -1))}, bytes(8)), "whole numbers of at least 0"),
    "a shape of floats": (header({"a": entry((2.0,))}, bytes(8)), "whole numbers of at least 0"),
    "nan for a shape": (header('{"a": {"dtype": "F32", "shape": [NaN], "data_offsets": [0, 8]}}'), "NaN is no number"),
    "offsets below 0": (header({"a": entry(offsets=(-8, 0))}, bytes(8)), "whole numbers of at least 0"),
    "three offsets": (header({"a": entry(offsets=(0, 8, 8))}, bytes(8)), "whole numbers of at least 0"),
    "tensors that overlap": (header({"a": entry(), "b": entry()}, bytes(8)), "overlap or leave gaps"),
    "a gap": (header({"a": entry(offsets=(8, 16))}, bytes(16)), "overlap or leave gaps"),
    "more behind them": (header({"a": entry()}, bytes(9)), "are 8 bytes, but it holds 9"),
    "an unknown dtype": (header({"a": entry(dtype="object")}, bytes(8)), "wanted a dtype that is known"),
    "a dtype that is a list": (header({"a": entry(dtype=["F32"])}, bytes(8)), "wanted a dtype that is known"),
    "a key more": (header({"a": entry(_target_="os.system")}, bytes(8)), "wanted a dtype that is known"),
    "a shape too long": (header({"a": entry([1] * 17, (0, 4))}, bytes(4)), "wanted at most 16 dimensions, each below"),
    "a dimension too long": (header({"a": entry((2**48, 0), (0, 0))}), "wanted at most 16 dimensions, each below"),
    "a name twice": (header('{"a": {"dtype": "F32"}, "a": {}}'), "the key 'a' comes twice"),
}


@pytest.mark.parametrize("name", TENSORS)
def test_tensors_that_are_refused_however_well_signed(tmp_path, name):
    content, message = TENSORS[name]
    place = put(tmp_path, 1)
    (place / checkpoints.TENSORS).write_bytes(content)
    with pytest.raises(ValueError, match=r"can be read \(state.safetensors: ") as error:
        checkpoints.check(sign(place))
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "owned").exists()


def test_no_header_takes_long_to_be_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    many = ",".join(f'"{number}":0' for number in range(200_000))
    for content, message in (
        (header({"a": entry([2**47] * 200_000)}), "wanted at most 16 dimensions"),
        (header("{" + many + ',"199999":0}'), "the key '199999' comes twice"),
    ):
        path.write_bytes(content)
        begun = time.process_time()
        with pytest.raises(ValueError, match=message):
            read_header(path)
        assert time.process_time() - begun < 3, "which is minutes where its time grows by the square"


def test_a_header_in_order(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(header({"__metadata__": {"by": "hand"}, "b": entry((1,), (8, 12)), "a": entry()}, bytes(12)))
    assert {name: (each.dtype, each.shape) for name, each in read_header(path).items()} == {
        "a": ("float32", (2,)), "b": ("float32", (1,)),
    }  # fmt: skip


@pytest.mark.parametrize(
    "name", ["../../outside", "/etc/passwd", "step_00000001/../../x", "checkpoint.json/", "other.bin", ""]
)
def test_a_manifest_names_two_files_and_no_path(tmp_path, name):
    place = put(tmp_path, 1)
    manifest = json.loads((place / checkpoints.MANIFEST).read_text())
    for files in ({**manifest["files"], name: {"bytes": 0, "crc32": "00000000"}}, {name: {"bytes": 0}}, [name], name):
        (place / checkpoints.MANIFEST).write_text(json.dumps({**manifest, "files": files}, indent=2) + "\n")
        with pytest.raises(
            ValueError, match=r"bytes and crc32 of checkpoint\.json and state\.safetensors, and nothing"
        ):
            checkpoints.check(place)


@pytest.mark.parametrize(
    "name", ["../../elsewhere", "/etc", "step_1/../../..", "step_99999999999999999999", "a\0b", ""]
)
def test_latest_names_no_path(tmp_path, name, capsys):
    place = put(tmp_path, 1)
    (tmp_path / checkpoints.CHECKPOINTS / checkpoints.LATEST).write_text(name)
    assert runs.latest(tmp_path) == place
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("name", [checkpoints.METADATA, checkpoints.TENSORS, checkpoints.MANIFEST])
def test_links_out_of_the_folder_are_refused(tmp_path, name):
    place = put(tmp_path, 1)
    (place / name).rename(tmp_path / "outside")
    (place / name).symlink_to(tmp_path / "outside")
    with pytest.raises(ValueError, match=rf"\({name}: wanted a file, got a link\)"):
        checkpoints.check(place)
    (place / name).unlink()
    os.mkfifo(place / name)  # reading it would wait for ever
    with pytest.raises(ValueError, match=rf"\({name}: wanted a file, got something else\)"):
        checkpoints.check(place)


@pytest.mark.parametrize("where", ["model", "data"])
def test_settings_are_data_and_build_nothing_by_name(tmp_path, where):
    evil = {"_target_": "os.system", "_args_": [f"touch {tmp_path / 'owned'}"], "_partial_": False}
    metadata = checkpoints.check(put(tmp_path, 1, **{"model": {}, where: evil}))
    with pytest.raises(ValueError, match=rf"^{where}\._target_: no such setting"):
        from_metadata(metadata)
    with pytest.raises(ValueError, match=rf"^{where}\..*_target_: no such setting"):
        from_metadata({where: {next(iter(("recall",) if where == "data" else ("memory",))): evil}})
    assert not (tmp_path / "owned").exists()


def test_json_as_deep_as_allowed(tmp_path):
    levels = strict_json.MOST_LEVELS - 1
    assert strict_json.parse_json(b"[" * levels + b"]" * levels, "x") is not None
    (tmp_path / "x").write_bytes(NO_TENSORS)
    with pytest.raises(ValueError, match=r"^x: "):
        strict_json.read_json(tmp_path / "x")
