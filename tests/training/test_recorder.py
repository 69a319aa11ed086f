"""What a recorder writes, and what is read of it."""

import copy
import json

import numpy as np
import pytest
import torch
from torch import nn

import bayesinf as bi
from bayesinf.evaluation import AdamWRecipe, SGDRecipe, train_one
from bayesinf.training import CheckpointRecorder, _writing, open_checkpoints, unrolled_response
from bayesinf.training._intervals import interval_sums
from tests.recorded_runs import ADAMW, SGD, STEPS, N, Tied, batches, mlp, numbers, recorded


def rate(step, highest):
    return highest * 0.5 * (1 + np.cos(np.pi * step / STEPS))


def begin(make_optimizer):
    torch.manual_seed(1)
    model = mlp().double()
    optimizer = make_optimizer(model.parameters())
    return model, optimizer


def loop(model, optimizer, recorder, start=0, stop=STEPS, seen=None):
    x, y = numbers(N, 1)
    highest = 0.02 if isinstance(optimizer, torch.optim.AdamW) else 0.1
    for step in range(start, stop):
        ids = batches()[step]
        for group in optimizer.param_groups:
            group["lr"] = rate(step, highest)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[ids]), y[ids]).backward()
        optimizer.step()
        for group in optimizer.param_groups:  # as a schedule does that steps before the recorder
            group["lr"] = 0.0
        recorder.step(ids)
        if seen is not None:
            seen.append(copy.deepcopy(model.state_dict()))


def test_checkpoints_rates_and_batches_are_those_of_the_loop(tmp_path):
    model, optimizer = begin(ADAMW)
    start, seen = copy.deepcopy(model.state_dict()), []
    with CheckpointRecorder(tmp_path, model, optimizer, every=6) as recorder:
        loop(model, optimizer, recorder, seen=seen)
    run = open_checkpoints(tmp_path)
    assert run.steps.tolist() == [3, 9, 15, 21, 27]
    assert (len(run), run.total, run.rule.kind) == (5, STEPS, "adamw")
    for step, expected in [(0, start), (3, seen[2]), (27, seen[26]), (30, seen[29])]:
        held = run.weights(step)
        assert held.keys() == expected.keys()
        assert all(torch.equal(held[name], expected[name]) for name in held)
    expected = [rate(step, 0.02) for step in range(STEPS)]
    np.testing.assert_array_equal(run.learning_rates, expected)
    assert [ids.tolist() for ids in run.batches] == [ids.tolist() for ids in batches()]
    moment = optimizer.state[model[0].weight]["exp_avg_sq"]
    torch.testing.assert_close(
        run.optimizer_state(30)["exp_avg_sq"]["0.weight"], moment, rtol=0, atol=0
    )
    torch.testing.assert_close(
        run.second_moments(30)["0.weight"], moment / (1 - 0.95**30), rtol=1e-12, atol=0
    )
    with pytest.raises(KeyError, match=r"no checkpoint at step 4; they are at \[0, 3, 9"):
        run.weights(4)


def test_rate_sums_are_of_the_schedule(tmp_path):
    """Not the last rate times the number of steps, nor a rate for each checkpoint."""
    _, run = recorded(SGD, tmp_path, scale=0.5)
    sums, rates = run.rate_sums(3), run.learning_rates
    unit = 0.5 / (1 - 0.6)
    assert sums.shape == (3, 6)
    np.testing.assert_allclose(sums.sum(1), unit * rates.reshape(3, 10).sum(1))
    np.testing.assert_allclose(sums.sum(0), unit * rates.reshape(6, 5).sum(1))
    np.testing.assert_allclose(run.rate_sums([10, 20]), sums)
    np.testing.assert_allclose(run.rate_sums([2]).sum(1), unit * np.array([rates[:2].sum(),
                               rates[2:].sum()]))  # fmt: skip
    for segments, words in ((0, "between 1 and the 30 steps"), ([20, 10], "ascending steps")):
        with pytest.raises(ValueError, match=words):
            run.rate_sums(segments)


def test_steps_go_to_the_nearest_checkpoint_within_their_segment():
    weights = np.array([1.0, 2.0, 4.0, 8.0, 16.0, 32.0])
    np.testing.assert_array_equal(
        interval_sums(weights, np.array([1, 5]), np.array([0, 2, 6])), [[3, 0], [4, 56]]
    )
    np.testing.assert_array_equal(
        interval_sums(weights, np.array([0, 1, 2]), np.array([0, 6])), [[1, 2, 60]]
    )


@pytest.mark.parametrize(("every", "nodes"), [(1, [0, 1, 2, 3, 4]), (2, [1, 3]), (3, [1, 4])])
def test_checkpoints_are_in_the_middle_of_their_steps(every, nodes, tmp_path):
    """Gradients of steps ``k·every …`` are at ``θ`` with these numbers."""
    model, optimizer = begin(SGD)
    with CheckpointRecorder(tmp_path, model, optimizer, every=every) as recorder:
        loop(model, optimizer, recorder, stop=4)
    run = open_checkpoints(tmp_path)
    assert run.steps.tolist() == nodes
    counts = interval_sums(np.ones(4), run.steps, np.array([0, 4]))[0].tolist()
    assert counts == {1: [1, 1, 1, 1, 0], 2: [2, 2], 3: [3, 1]}[every]


@pytest.mark.parametrize("optimizer", [SGD, ADAMW], ids=["sgd", "adamw"])
def test_an_interrupted_run_resumes_to_the_bit(optimizer, tmp_path):
    model, steps = begin(optimizer)
    with CheckpointRecorder(tmp_path / "whole", model, steps, every=6) as recorder:
        loop(model, steps, recorder)
    model, steps = begin(optimizer)
    recorder = CheckpointRecorder(tmp_path / "cut", model, steps, every=6, resume=True)
    loop(model, steps, recorder, stop=14)  # killed: nothing is closed
    assert open_checkpoints(tmp_path / "cut").total == 9
    for stop in (17, STEPS):
        model, steps = begin(optimizer)
        with CheckpointRecorder(tmp_path / "cut", model, steps, every=6, resume=True) as recorder:
            assert recorder.steps == {17: 9, STEPS: 17}[stop]
            loop(model, steps, recorder, start=recorder.steps, stop=stop)
    whole, cut = (open_checkpoints(tmp_path / name) for name in ("whole", "cut"))
    assert cut.steps.tolist() == whole.steps.tolist()
    np.testing.assert_array_equal(cut.learning_rates, whole.learning_rates)
    assert [b.tolist() for b in cut.batches] == [b.tolist() for b in whole.batches]
    for step in (0, *whole.steps.tolist(), STEPS):
        expected = whole.weights(step)
        assert all(torch.equal(expected[k], v) for k, v in cut.weights(step).items())
    names = {p.name for p in (tmp_path / "cut").iterdir()}
    assert "checkpoint-00000017.safetensors" not in names  # where a session closed
    assert not [name for name in names if name.endswith(".partial")]


def test_a_full_disk_leaves_the_run_as_it_was(tmp_path, monkeypatch):
    model, optimizer = begin(SGD)
    recorder = CheckpointRecorder(tmp_path, model, optimizer, every=6)
    loop(model, optimizer, recorder, stop=5)

    def full(*_, **__):
        raise OSError("no space left")

    monkeypatch.setattr(_writing.np, "savez", full)
    with pytest.raises(bi.StoreError, match=r"no space left.*Free space and resume the run"):
        loop(model, optimizer, recorder, start=5, stop=9)
    monkeypatch.undo()
    run = open_checkpoints(tmp_path)
    assert (run.total, run.steps.tolist(), len(run.batches)) == (3, [3], 3)


def test_buffers_and_tied_weights(tmp_path):
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).double()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with CheckpointRecorder(tmp_path / "norm", model, optimizer, every=1) as recorder:
        model(numbers(N, 1)[0]).sum().backward()
        optimizer.step()
        recorder.step()
    held = open_checkpoints(tmp_path / "norm").weights(1)
    assert all(torch.equal(held[k], v) for k, v in model.state_dict().items())
    task, run = recorded(ADAMW, tmp_path / "tied", make=Tied)
    assert set(run.weights(30)) == {"embed.weight", "middle.weight", "middle.bias"}
    run.require_task(task)
    run.require_task(task.at(run.weights(30)))
    run.require_task(task.to(dtype=torch.float32))


@pytest.mark.parametrize(
    "recipe",
    [
        SGDRecipe(epochs=4, batch_size=5, lr=0.1, weight_decay=0.01),
        AdamWRecipe(epochs=4, batch_size=5, lr=0.02, weight_decay=0.1, warmup=0.2),
    ],
    ids=["sgd", "adamw"],
)
def test_recipes_record_the_same_training(recipe, tmp_path):
    """To the bit the same network, and a replay of what was recorded ends there."""

    def make():
        return mlp().double()

    data = numbers(N, 1)
    options = {"train": data, "seed": 3}
    plain = train_one(make, bi.Categorical(), recipe, **options)
    model = train_one(make, bi.Categorical(), recipe, **options, record=tmp_path, checkpoints=3)
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in plain.state_dict().items())
    run = open_checkpoints(tmp_path)
    assert (run.total, run.steps.tolist()) == (12, [2, 6, 10])
    assert run.learning_rates.tolist() == recipe.learning_rates(N)
    task = bi.Task(model, bi.Categorical(), train=data, query=data)
    assert unrolled_response(task, run).attrs["replay_error"] < 1e-13
    with pytest.raises(bi.StoreError, match="holds a run of 12 steps"):
        train_one(make, bi.Categorical(), recipe, **options, record=tmp_path)
    with pytest.raises(ValueError, match="checkpoints must be between 1 and the 12 steps"):
        train_one(make, bi.Categorical(), recipe, **options, record=tmp_path, checkpoints=13)


def test_a_recorder_that_cannot_follow_says_why(tmp_path):
    model, optimizer = begin(SGD)
    own = list(model.parameters())
    for wrong, kind, words in (
        (lambda: torch.optim.RMSprop(own, 0.1), TypeError, "got RMSprop"),
        (lambda: torch.optim.SGD(own, 0.1, maximize=True), ValueError, "maximize=False in all"),
        (lambda: torch.optim.Adam(own, 0.1, amsgrad=True), ValueError, "amsgrad=False in all"),
        (lambda: torch.optim.SGD(mlp().parameters(), 0.1), ValueError, "4 parameters of the opt"),
        (lambda: torch.optim.SGD([{"params": own[:1]}, {"params": own[1:], "momentum": 0.5}], 0.1),
         ValueError, r"must have momentum=0.* in all parameter groups; got 0\.5"),
    ):  # fmt: skip
        with pytest.raises(kind, match=words):
            CheckpointRecorder(tmp_path, model, wrong(), every=6)
    for options, words in (
        ({"every": 0}, "every must be a positive number of steps"),
        ({"every": 6, "loss_scale": 0.0}, "loss_scale must be a positive number"),
    ):
        with pytest.raises(ValueError, match=words):
            CheckpointRecorder(tmp_path, model, optimizer, **options)
    recorder = CheckpointRecorder(tmp_path, model, optimizer, every=6)
    with pytest.raises(RuntimeError, match="the optimiser took 0 steps since the last call"):
        recorder.step([1])
    loop(model, optimizer, recorder, stop=1)
    optimizer.step()
    with pytest.raises(ValueError, match=r"ids must be the integers or strings"):
        recorder.step([0.5])
    optimizer.param_groups[0]["momentum"] = 0.1
    with pytest.raises(ValueError, match=r"only learning rates may.*cycle_momentum=False"):
        recorder.step([1])


def test_a_folder_of_something_else_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no recorded run"):
        open_checkpoints(tmp_path)
    task, run = recorded(SGD, tmp_path)
    model, optimizer = begin(SGD)
    with pytest.raises(bi.StoreError, match=r"holds a run of 30 steps.*resume=True"):
        CheckpointRecorder(tmp_path, model, optimizer, every=5)
    with pytest.raises(bi.StoreError, match="of other settings: every: 5 there, 6 here"):
        CheckpointRecorder(tmp_path, model, optimizer, every=6, resume=True)
    with pytest.raises(ValueError, match="sgd has no second moments at step 2"):
        run.second_moments(2)
    with pytest.raises(ValueError, match=r"not where this run ended \(step 30\)"):
        run.require_task(task.at(run.weights(27)))
    (tmp_path / "checkpoint-00000002.safetensors").write_bytes(b"?")
    with pytest.raises(bi.StoreError, match="is missing or damaged"):
        run.weights(2)
    (tmp_path / "steps-00000000-00000002.npz").unlink()
    with pytest.raises(bi.StoreError, match="is missing or damaged"):
        _ = run.learning_rates
    held = json.loads((tmp_path / "run.json").read_text())
    (tmp_path / "run.json").write_text(json.dumps({**held, "format": 9}))
    with pytest.raises(bi.StoreError, match="of format 9, and this version reads 1"):
        open_checkpoints(tmp_path)
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(bi.StoreError, match=r"run\.json is damaged"):
        open_checkpoints(tmp_path)


def test_what_was_not_recorded_is_asked_for(tmp_path):
    model, optimizer = begin(SGD)
    recorder = CheckpointRecorder(tmp_path / "few", model, optimizer, every=6)
    with pytest.raises(ValueError, match="no step with a positive learning rate"):
        _ = open_checkpoints(tmp_path / "few").learning_rates
    optimizer.step()
    recorder.step()
    recorder.close()
    run = open_checkpoints(tmp_path / "few")
    with pytest.raises(ValueError, match="recorded without the ids of its batches"):
        _ = run.batches
    with pytest.raises(ValueError, match=r"holds no checkpoint. Record with a smaller every="):
        run.rate_sums()
    own = list(model.parameters())
    both = torch.optim.SGD([{"params": own[:1]}, {"params": own[1:], "lr": 0.2}], 0.1)
    with CheckpointRecorder(tmp_path / "groups", model, both, every=1) as recorder:
        both.step()
        recorder.step()
    with pytest.raises(ValueError, match="groups of parameters had different learning rates"):
        open_checkpoints(tmp_path / "groups").rate_sums()
