"""benchmarks/paper/records.py: what is done is known after a kill."""

import threading
import time

import pytest

from benchmarks.paper.loop import alone
from benchmarks.paper.records import Records


def test_rows_come_back(tmp_path):
    path = tmp_path / "new" / "file.csv"
    records = Records(path)
    assert not records.has(model="gpt2")
    records.add({"model": "gpt2", "seqlen": 1024, "loss": 1.5, "note": None})
    records.add({"model": "gpt2", "seqlen": 2048, "loss": 1.25, "note": 'a, "b"'})
    again = Records(path)
    assert again.rows == records.rows
    assert again.has(model="gpt2", seqlen=2048, loss=1.25) and again.has(note=None)
    assert not again.has(model="gpt2", seqlen=4096) and not again.has(other=1)
    assert again.rows[0]["device"] and again.rows[0]["torch"] and again.rows[0]["command"]


def test_a_row_that_was_cut_short(tmp_path):
    path = tmp_path / "file.csv"
    Records(path).add({"a": 1, "b": 2})
    path.write_text(path.read_text() + "3,")
    assert [row["a"] for row in Records(path).rows] == ["1"]


def test_other_columns(tmp_path):
    records = Records(tmp_path / "file.csv")
    records.add({"a": 1})
    with pytest.raises(ValueError, match="give another file"):
        records.add({"b": 1})


def test_rows_that_belong_together(tmp_path):
    path = tmp_path / "file.csv"
    Records(path).extend([{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}])
    assert [row["step"] for row in Records(path).rows] == ["1", "2"]
    with pytest.raises(ValueError, match="give another file"):
        Records(path).extend([{"step": 3, "loss": 1.0}, {"loss": 1.0}])
    assert len(Records(path).rows) == 2


def test_two_processes_share_a_file(tmp_path):
    one, other = Records(tmp_path / "file.csv"), Records(tmp_path / "file.csv")
    one.add({"run": "a"})
    other.add({"run": "b"})
    assert [row["run"] for row in Records(one.path).rows] == ["a", "b"]
    assert not one.has(run="b") and other.has(run="a")
    one.refresh()
    assert one.has(run="b")


def test_one_process_at_a_time(tmp_path):
    order = []

    def enter(number):  # a lock is its opener's, threads do
        with alone(tmp_path / "new"):
            order.append(number)
            time.sleep(0.1)
            order.append(number)

    threads = [threading.Thread(target=enter, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert order in ([0, 0, 1, 1], [1, 1, 0, 0])
