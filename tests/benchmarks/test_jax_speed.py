"""The race of JAX against torch: what is counted, who takes turns, when the bar is met."""

import pytest

from benchmarks import jax_speed as program


def test_the_rate_leaves_out_what_comes_before_the_first_mark():
    assert program.rate([(8, 3.0), (10, 3.5), (38, 9.0)]) == 5.0


def way(name, log, seconds):
    def run(row, until):
        log.append((name, row.kernel))
        until.marks += [(8, 100.0), (8 + 30, 100.0 + seconds[len(log) % len(seconds)])]

    return run


@pytest.mark.parametrize(("seconds", "status"), [(2.0, 0), (4.0, 1)])
def test_medians_of_turns_and_the_exit_status(monkeypatch, capsys, seconds, status):
    log = []
    torch, jax = way("torch", log, [3.0]), way("jax", log, [seconds])
    monkeypatch.setattr(program, "runs", lambda *_: (torch, jax))
    monkeypatch.setattr(program.os, "sched_setaffinity", lambda *_: None, raising=False)
    monkeypatch.setenv("XLA_FLAGS", "")
    assert program.main(["--repeats", "2", "--only", "SGLD"]) == status
    assert [name for name, _ in log[:4]] == ["jax", "torch", "torch", "jax"]
    printed = capsys.readouterr().out
    assert printed.count("RMSpropSGLD") == 2
    assert f"{30 / seconds:.1f}" in printed
    assert f"{3 / seconds:.2f}" in printed
    assert ("MISSED" in printed) == bool(status)


def test_both_ways_draw(monkeypatch):
    pytest.importorskip("jax")
    pytest.importorskip("sklearn")
    row = program.Row("SGLD", {"step_size": 1e-7}, 100, "plain")
    clocks = [program.Clock(), program.Clock()]
    found = [run(row, clock) for run, clock in zip(program.runs(11, 1, 2), clocks, strict=True)]
    for traces, clock in zip(found, clocks, strict=True):
        assert traces.values("train").shape == (2, 11, 1000)
        assert [draws for draws, _ in clock.marks] == [8, 10]
        assert program.rate(clock.marks) > 0
    ours, theirs = (float(t.values("train").mean()) for t in found)
    assert ours == pytest.approx(theirs, rel=0.2)
