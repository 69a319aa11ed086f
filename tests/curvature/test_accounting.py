"""The account of a computation."""

import time

import pytest

from bayesinf.curvature._accounting import Costs


def test_a_stage_within_another_counts_for_itself_alone(monkeypatch):
    clock = iter([0.0, 1.0, 4.0, 10.0, 20.0, 25.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    costs = Costs()
    with costs.stage("outer"), costs.stage("inner"):
        pass
    with costs.stage("outer"):
        pass
    assert costs.seconds == {"inner": 3.0, "outer": 7.0 + 5.0}


def test_time_counts_where_a_stage_fails(monkeypatch):
    clock = iter([0.0, 2.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    costs = Costs()
    with pytest.raises(KeyError), costs.stage("only"):
        raise KeyError
    assert costs.seconds == {"only": 2.0}
