import math

import pytest

from titanfunc.train.metrics import UNFINISHED
from titanfunc.train.tracker import TensorBoard


def test_tensorboard_shows_the_numbers(tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")

    def scalars() -> dict[str, list[tuple[int, float]]]:
        reader = events.EventAccumulator(str(tmp_path / "tensorboard"))
        reader.Reload()
        return {tag: [(e.step, e.value) for e in reader.Scalars(tag)] for tag in reader.Tags()["scalars"]}

    first = TensorBoard(tmp_path)
    for step in (1, 2, 3):
        first.write(step, {"loss": 0.5 * step, "grad_norm": math.nan, "device": "cpu"})
    first.write(3, {"loss": 8.0, UNFINISHED: True})  # a resumed run ends the interval
    first.close()
    assert scalars() == {"loss": [(1, 0.5), (2, 1.0), (3, 1.5)]}

    resumed = TensorBoard(tmp_path, resume_step=1)  # steps 2 and 3 came after the checkpoint
    resumed.write(2, {"loss": 9.0})
    resumed.close()
    assert scalars() == {"loss": [(1, 0.5), (2, 9.0)]}
