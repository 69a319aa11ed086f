"""The PBRF program on a few examples of its smallest task."""

from __future__ import annotations

import pytest

from benchmarks import pbrf as program


def test_program_judges_the_exact_method(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    few = ["diabetes-mlp", "--examples", "6", "--queries", "10", "--weight", "0.01"]
    exact, plain = (s for s in program.SOLVERS if s.exact or s.name == "GradDot")
    monkeypatch.setattr(program, "SOLVERS", (exact, plain))
    assert program.main(few) == 0
    out = capsys.readouterr().out
    assert "6 of 342 training examples × 10 queries, λ = 0.1, ε = ±0.01/n" in out
    lines = out.splitlines()
    assert [line.split("  ")[0] for line in lines[-2:]] == ["Gauss–Newton, exact", "GradDot"]
    assert "met" in lines[-2]
    judged = program.Solver("GradDot", plain.scores, exact=True)
    monkeypatch.setattr(program, "SOLVERS", (judged,))
    assert program.main(few) == 1
    assert "MISSED" in capsys.readouterr().out


def test_too_few_examples() -> None:
    with pytest.raises(SystemExit):
        program.main(["diabetes-mlp", "--examples", "3"])
