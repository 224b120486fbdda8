"""Windows: a pure function of (seed, step), each once an epoch, none across documents."""

import itertools
import logging
import zlib

import numpy as np
import pytest
import torch

from titanfunc.data.stored import StoredTokens
from titanfunc.data.tokens import MappedTokens, TokenArray
from titanfunc.data.windows import Windows, validation_batches

LENGTHS = [40, 9, 8, 100, 1, 57, 17, 16]
SEQ_LEN = 8
COUNTS = [(length - 1) // SEQ_LEN for length in LENGTHS]


def documents(lengths=LENGTHS):
    """A token that tells its document and its place: 1000 * document + place."""
    tokens = np.concatenate([1000 * i + np.arange(n, dtype=np.uint32) for i, n in enumerate(lengths)])
    return TokenArray(tokens.astype(np.uint32), np.cumsum(lengths))


def epoch_rows(windows, epoch):
    """The windows of one epoch [W, T + 1], read through batches."""
    first, count, size = epoch * windows.windows_per_epoch, windows.windows_per_epoch, windows.batch_size
    steps = range(first // size, (first + count - 1) // size + 1)
    rows = torch.cat([windows.batch(step) for step in steps])
    return rows[first - steps[0] * size :][:count].numpy()


@pytest.mark.parametrize("separate", [True, False])
def test_a_batch_is_a_pure_function_of_seed_and_step(separate):
    one = Windows(documents(), SEQ_LEN, 4, seed=3, separate_documents=separate)
    two = Windows(documents(), SEQ_LEN, 4, seed=3, separate_documents=separate)
    other = Windows(documents(), SEQ_LEN, 4, seed=4, separate_documents=separate)
    steps = list(range(60))
    forward = torch.stack([one.batch(step) for step in steps])
    jumping = {step: two.batch(step) for step in np.random.default_rng(0).permutation(steps).tolist()}
    assert forward.dtype == torch.int64
    assert forward.shape == (60, 4, SEQ_LEN + 1)
    assert torch.equal(forward, torch.stack([jumping[step] for step in steps]))
    assert not torch.equal(forward, torch.stack([other.batch(step) for step in steps]))


@pytest.mark.parametrize("batch_size", [1, 3, 7, 50])
def test_batches_continue_over_the_end_of_an_epoch(batch_size):
    """Row r of the stream of rows is the same in batches of any size, even one of several epochs."""
    reference = Windows(documents(), SEQ_LEN, 1, seed=1)
    assert batch_size != 50 or batch_size > 1.5 * reference.windows_per_epoch
    stream = torch.cat([reference.batch(row) for row in range(5 * 50)])
    windows = Windows(documents(), SEQ_LEN, batch_size, seed=1)
    for step in range(len(stream) // batch_size):
        assert torch.equal(windows.batch(step), stream[step * batch_size :][:batch_size])


@pytest.mark.parametrize("epoch", [0, 1, 17])
def test_an_epoch_takes_every_window_of_every_document_once(epoch):
    windows = Windows(documents(), SEQ_LEN, 5, seed=0)
    assert windows.windows_per_epoch == sum(COUNTS)
    rows = epoch_rows(windows, epoch)
    for document, (length, count) in enumerate(zip(LENGTHS, COUNTS, strict=True)):
        mine = np.sort(rows[rows[:, 0] // 1000 == document, 0] % 1000)
        assert len(mine) == count
        if count:
            assert 0 <= mine[0] <= (length - 1) % SEQ_LEN
            np.testing.assert_array_equal(np.diff(mine), SEQ_LEN)


@pytest.mark.parametrize("separate", [True, False])
def test_targets_tile(separate):
    """Within an epoch no token is predicted twice, and all but the left-over of each document are."""
    windows = Windows(documents(), SEQ_LEN, 4, separate_documents=separate)
    targets = epoch_rows(windows, 2)[:, 1:]
    expected = sum(COUNTS) if separate else sum(LENGTHS) // SEQ_LEN
    assert len(np.unique(targets)) == targets.size == expected * SEQ_LEN


@pytest.mark.parametrize("seed", range(5))
def test_no_window_crosses_documents(seed):
    lengths = np.random.default_rng(seed).integers(1, 60, size=40).tolist()
    windows = Windows(documents(lengths), SEQ_LEN, 16, seed=seed)
    for step in range(40):
        rows = windows.batch(step)
        assert torch.equal(rows[:, 1:] - rows[:, :-1], torch.ones_like(rows[:, 1:]))


def test_joined_documents_are_one_ring():
    tokens = TokenArray(np.arange(50, dtype=np.uint8), np.array([20, 50]))
    windows = Windows(tokens, SEQ_LEN, 6, separate_documents=False)
    rows = np.concatenate([epoch_rows(windows, epoch) for epoch in range(60)])
    np.testing.assert_array_equal(np.diff(rows, axis=1) % 50, 1)
    assert set(rows[:, 0]) == set(range(50))


def test_epochs_differ_in_order_and_in_places():
    windows = Windows(documents(), SEQ_LEN, 1)
    first, second = epoch_rows(windows, 0)[:, 0], epoch_rows(windows, 1)[:, 0]
    assert not np.array_equal(first // 1000, second // 1000)
    assert set(first) != set(second)


def test_every_place_of_a_document_is_reached():
    windows = Windows(documents([2 * SEQ_LEN]), SEQ_LEN, 1)
    assert {int(windows.batch(step)[0, 0]) for step in range(100)} == set(range(SEQ_LEN))


def test_a_document_of_just_one_window_is_always_read():
    windows = Windows(documents([SEQ_LEN + 1]), SEQ_LEN, 4)
    assert torch.equal(windows.batch(9), torch.arange(SEQ_LEN + 1).expand(4, -1))


def test_a_batch_belongs_to_the_caller():
    windows = Windows(documents(), SEQ_LEN, 4)
    before = windows.batch(0).clone()
    windows.batch(0).zero_()
    assert torch.equal(windows.batch(0), before)


@pytest.mark.parametrize("make", [lambda *a, **k: Windows(*a, **k), lambda *a, **k: validation_batches(*a, 1, **k)])
def test_no_room_for_a_window_is_refused(make):
    with pytest.raises(
        ValueError,
        match=r"^data.seq_len: wanted at most 99 \(the longest document has 100 tokens, a window takes "
        r"seq_len \+ 1\), or data.separate_documents=false, got 100$",
    ):
        make(documents(), 100, 1)
    make(documents(), 99, 1)
    make(documents(), 100, 1, separate_documents=False)
    with pytest.raises(
        ValueError,
        match=r"^data.seq_len: wanted at most 247 \(all documents together have 248 tokens, a window takes "
        r"seq_len \+ 1\), got 248$",
    ):
        make(documents(), 248, 1, separate_documents=False)


def test_mostly_unused_text_is_reported(caplog):
    with caplog.at_level(logging.WARNING):
        Windows(documents([20, 20, 20, 30]), 10, 1)
        assert caplog.records == []
        Windows(documents([20, 20, 20, 30]), 20, 1)
    assert "78% of the tokens are in no window" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 4), r"^seq_len: wanted a whole number of at least 1, got 0$"),
        ((8, 0), r"^batch_size: wanted a whole number of at least 1, got 0$"),
        ((8, 4, -1), r"^seed: wanted a whole number of at least 0, got -1$"),
    ],
)
def test_numbers_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Windows(documents(), *arguments)


def test_a_negative_step_is_refused():
    with pytest.raises(ValueError, match=r"^step: wanted a whole number of at least 0, got -1$"):
        Windows(documents(), SEQ_LEN, 4).batch(-1)


@pytest.mark.parametrize("separate", [True, False])
def test_validation_is_fixed_full_and_without_repeats(separate):
    batches = validation_batches(documents(), SEQ_LEN, 4, 3, separate_documents=separate)
    again = validation_batches(documents(), SEQ_LEN, 4, 3, separate_documents=separate)
    assert [batch.shape for batch in batches] == [(4, SEQ_LEN + 1)] * 3
    assert all(torch.equal(one, two) for one, two in zip(batches, again, strict=True))
    rows = torch.cat(batches)
    assert rows.dtype == torch.int64
    assert len(rows[:, 1:].unique()) == rows[:, 1:].numel()
    if separate:
        assert torch.all(rows[:, 1:] - rows[:, :-1] == 1)


def test_validation_is_spread_over_the_documents():
    """20 documents of 10 windows each: 40 rows are 2 of each, and a single batch of 5 still reaches far."""
    tokens = documents([81] * 20)
    rows = torch.cat(validation_batches(tokens, SEQ_LEN, 5, 8))
    assert (rows[:, 0] // 1000).bincount().tolist() == [2] * 20
    (batch,) = validation_batches(tokens, SEQ_LEN, 5, 1)
    assert (batch[:, 0] // 1000).tolist() == [2, 6, 10, 14, 18]


def test_validation_stops_at_the_last_full_batch():
    batches = validation_batches(documents(), SEQ_LEN, 4, 1000)
    assert len(batches) == sum(COUNTS) // 4
    assert len(validation_batches(documents(), SEQ_LEN, sum(COUNTS), 1000)) == 1


def test_validation_with_less_than_a_batch_is_refused():
    windows = sum(COUNTS)
    with pytest.raises(ValueError, match=rf"^data.batch_size: wanted at most the {windows} windows .*, got 99; lower"):
        validation_batches(documents(), SEQ_LEN, 99, 1)
    with pytest.raises(ValueError, match=r"^limit: wanted at least 1 batch, got 0$"):
        validation_batches(documents(), SEQ_LEN, 4, 0)


@pytest.mark.parametrize("separate", [True, False])
@pytest.mark.parametrize("world", [1, 2, 3, 6])
def test_ranks_share_out_the_same_batch(world, separate):
    whole = Windows(documents(), SEQ_LEN, 6, seed=1, separate_documents=separate)
    ranks = [
        Windows(documents(), SEQ_LEN, 6, seed=1, separate_documents=separate, rank=rank, world=world)
        for rank in range(world)
    ]
    for step in (0, 1, 7, 30):
        assert torch.equal(torch.cat([each.batch(step) for each in ranks]), whole.batch(step))


def test_ranks_that_do_not_divide_the_batch_are_refused():
    with pytest.raises(ValueError, match=r"^data.batch_size: wanted a multiple of the 3 ranks, got 4$"):
        Windows(documents(), SEQ_LEN, 4, rank=0, world=3)
    with pytest.raises(ValueError, match=r"^rank: wanted from 0 to world - 1 = 1, got 2$"):
        Windows(documents(), SEQ_LEN, 4, rank=2, world=2)


@pytest.mark.parametrize("separate", [True, False])
def test_places_do_not_depend_on_how_many_are_computed_at_once(separate, monkeypatch):
    whole = Windows(documents(), SEQ_LEN, 5, seed=2, separate_documents=separate)
    expected = [whole.batch(step) for step in range(30)]
    monkeypatch.setattr("titanfunc.data.windows._BLOCK", 3)
    small = Windows(documents(), SEQ_LEN, 5, seed=2, separate_documents=separate)
    assert all(torch.equal(small.batch(step), each) for step, each in enumerate(expected))


@pytest.mark.parametrize("separate", [True, False])
def test_the_documents_of_a_batch_are_told(separate):
    """Against the tokens, each of which tells its document."""
    tokens = documents()._replace(name="document {}".format)
    windows = Windows(tokens, SEQ_LEN, 3, seed=4, separate_documents=separate)
    for step in range(40):
        found = dict.fromkeys((windows.batch(step) // 1000).flatten().tolist())
        told = windows.documents(step)
        assert set(told) == {f"document {each}" for each in found} and len(told) == len(found)


def test_a_large_corpus_needs_no_list_of_windows(monkeypatch):
    """Ten billion tokens that are not there: a step touches the places of its own block alone."""
    monkeypatch.setattr("titanfunc.data.windows._BLOCK", 16)
    asked = []

    class Tokens:
        dtype = np.dtype(np.uint8)

        def __len__(self):
            return 10**10

        def locate(self, starts, size):
            asked.append(starts)
            return [lambda place: bytes(size)] * len(starts), starts.tolist()

    windows = Windows(TokenArray(Tokens(), np.array([10**10])), 1024, 4)
    windows.batch(1_000_000)
    windows.batch(2_000_000)
    assert windows.windows_per_epoch == (10**10 - 1) // 1024
    assert len(np.unique(np.concatenate(asked))) == 32 and np.concatenate(asked).max() < 10**10


def on_disk(tokens, folder, cuts=(0, 47, 150, 248)):
    """The same tokens in files, which end within documents, of windows too."""
    ids, starts = np.asarray(tokens.tokens), np.array(cuts[:-1])
    files = []
    for first, end in itertools.pairwise(cuts):
        ids[first:end].tofile(folder / f"{first}")
        files.append(StoredTokens(folder / f"{first}", ids.dtype, end - first))
    mapped = MappedTokens(files, starts, np.arange(len(files)), np.zeros(len(files), dtype=np.int64), cuts[-1])
    return tokens._replace(tokens=mapped)


FROZEN = {
    (True, 0, 1): [[3034, 3010, 15, 3018, 3050, 3082], [3049, 7, 3025, 3033, 5016, 6000], 1861948667],
    (True, 0, 2): [[3034, 3010, 15], [3049, 7, 3025], 4187091480],
    (True, 1, 2): [[3018, 3050, 3082], [3033, 5016, 6000], 3685006074],
    (False, 0, 1): [[3021, 3069, 3093, 5056, 5040, 6007], [3094, 7, 5041, 3086, 5009, 39], 1633303573],
    (False, 0, 2): [[3021, 3069, 3093], [3094, 7, 5041], 1925845025],
    (False, 1, 2): [[5056, 5040, 6007], [3086, 5009, 39], 3985628042],
}


@pytest.mark.parametrize("kept", ["in memory", "on the disk"])
@pytest.mark.parametrize(("separate", "rank", "world"), FROZEN)
def test_batches_are_those_that_they_have_always_been(tmp_path, kept, separate, rank, world):
    """A run goes on with a newer version: the values were written down when this test was."""
    tokens = documents() if kept == "in memory" else on_disk(documents(), tmp_path)
    windows = Windows(tokens, SEQ_LEN, 6, seed=11, separate_documents=separate, rank=rank, world=world)
    batches = [windows.batch(step).numpy().astype("<i8") for step in (0, 1, 6, 7, 1000, 10**9)]
    found = [batches[1][:, 0].tolist(), batches[5][:, 0].tolist(), zlib.crc32(b"".join(map(bytes, batches)))]
    assert found == FROZEN[separate, rank, world]


@pytest.mark.parametrize(
    ("separate", "expected"),
    [
        (True, [151327, 14421, 95490, 145557, 176554, 132170, 3710371033]),
        (False, [222614, 60278, 76070, 134604, 98004, 172671, 2178071638]),
    ],
)
def test_batches_of_a_long_text_are_those_that_they_have_always_been(separate, expected):
    """Of more windows than are placed at once."""
    tokens = TokenArray(np.arange(300_000, dtype=np.uint32), np.arange(1, 301) * 1000)
    windows = Windows(tokens, SEQ_LEN, 1024, seed=2, separate_documents=separate)
    starts = [windows.batch(step)[:, 0].tolist() for step in (0, 3, 35, 36, 37, 12345)]
    assert [each[-1] for each in starts] + [zlib.crc32(np.array(starts, dtype="<i8"))] == expected
