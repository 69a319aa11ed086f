"""The program that measures streamed token scores, on a tiny problem."""

import pytest

from benchmarks import streaming

TINY = streaming.Size(sequences=6, length=5, queries=2, chains=2, width=4, vocabulary=7)


def test_a_measurement():
    found = streaming.measure(TINY, 6)
    assert found["tokens"] == 6 * 4
    assert 0 < found["sums"] < 1
    assert found["peak"] >= 0


@pytest.mark.parametrize(
    ("peaks", "status", "words"),
    [
        ([900.0, 905.0], 0, ["met", "met", "met"]),
        ([900.0, 960.0], 1, ["met", "MISSED", "MISSED"]),
        ([800.0, 900.0], 1, ["met", "met", "MISSED"]),
    ],
)
def test_verdicts(monkeypatch, capsys, peaks, status, words):
    given = iter(peaks)
    monkeypatch.setattr(
        streaming,
        "_in_a_process",
        lambda size, draws: {"peak": next(given), "seconds": 1.0, "sums": 2.0, "tokens": 24.0},
    )
    assert streaming.main([]) == status
    table = capsys.readouterr().out.splitlines()
    assert [line.split()[-1] for line in table[2:]] == words
    assert [line.split()[0] for line in table[2:]] == ["20", "100", "growth"]
