"""A curvature on disk: bit for bit there and back, never half, never another one's."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import bayesinf as bi
from bayesinf import fit_curvature, load_curvature, save_curvature
from bayesinf.curvature import _saving
from tests import exact
from tests.layered_cases import LAYERED_BY_NAME


def equal(one, other):
    assert one.shapes == other.shapes
    assert list(one.shapes) == list(other.shapes)
    assert one.info == other.info
    assert one.layers == other.layers
    for x, y in zip(one.blocks, other.blocks, strict=True):
        assert (x.form, type(x.basis)) == (y.form, type(y.basis))
        assert torch.equal(x.eigenvalues, y.eigenvalues)
        held, found = x.basis.tensors(), y.basis.tensors()
        assert held.keys() == found.keys()
        assert all(torch.equal(held[k], found[k]) for k in held)


ONE_OF_EACH = ["cnn", "tied", "conv-groups", "conv3d", "stored-transposed", "words-padded", "raw",
               "layer-norm-planes", "rms-norm-gated", "lora-raw", "idle",
               "decoder-tied"]  # fmt: skip


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_round_trip(name, tmp_path):
    task = LAYERED_BY_NAME[name].task()
    curvature = fit_curvature(task, fisher="sampled", draws=2)
    save_curvature(curvature, tmp_path / "new" / "c")
    back = load_curvature(tmp_path / "new" / "c")
    equal(back, curvature)
    back.require_task(task)
    assert sorted(p.name for p in (tmp_path / "new" / "c").iterdir()) == [
        "curvature.json", "factors.safetensors",
    ]  # fmt: skip
    again = load_curvature(tmp_path / "new" / "c")
    fresh, one, two = (
        bi.ekfac(task, curvature=c, damping=0.1).influence for c in (curvature, back, again)
    )
    exact.same(one, two)
    exact.close(one, fresh, 1e-12)  # alignment in memory decides the order of sums


@pytest.mark.parametrize("form", ["dense", "diagonal", "identity", "kfac"])
def test_every_form_and_an_inverse(form, tmp_path):
    task = LAYERED_BY_NAME["decoder-transposed"].task().to(dtype=torch.float32)
    curvature = fit_curvature(task, fisher="empirical", form=form)
    for operator in (curvature, curvature.inverse(0.1)):
        save_curvature(operator, str(tmp_path / "c"))
        equal(load_curvature(str(tmp_path / "c"), device="cpu"), operator)


@pytest.fixture
def saved(tmp_path):
    curvature = fit_curvature(LAYERED_BY_NAME["mlp-gaussian"].task(), fisher="empirical")
    save_curvature(curvature, tmp_path / "c")
    return tmp_path / "c"


def test_an_empty_folder(tmp_path):
    message = r"holds no curvature \(no curvature\.json\)\. One is written by bi\.save_curvature"
    with pytest.raises(FileNotFoundError, match=message):
        load_curvature(tmp_path)


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def rewrite(path, change):
    held = json.loads(path.read_text())
    change(held)
    path.write_text(json.dumps(held))


def drop_tensor(folder):
    tensors = load_file(folder / "factors.safetensors")
    del tensors["1.eigenvalues"]
    save_file(tensors, folder / "factors.safetensors")


DAMAGE = {
    "json cut": lambda f: cut(f / "curvature.json"),
    "json of other content": lambda f: (f / "curvature.json").write_text("[1]"),
    "json without blocks": lambda f: rewrite(f / "curvature.json", lambda h: h.pop("blocks")),
    "json with a strange layer": lambda f: rewrite(
        f / "curvature.json", lambda h: h["blocks"][0]["layer"].update(colour="red")
    ),
    "tensors cut": lambda f: cut(f / "factors.safetensors"),
    "tensors gone": lambda f: os.remove(f / "factors.safetensors"),
    "one tensor gone": drop_tensor,
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_files(saved, damage):
    DAMAGE[damage](saved)
    with pytest.raises(ValueError, match=r"the curvature in .* is damaged .*Fit and save it again"):
        load_curvature(saved)


def test_another_format(saved):
    rewrite(saved / "curvature.json", lambda held: held.update(format=99))
    with pytest.raises(ValueError, match="has format 99, and this version reads format 1"):
        load_curvature(saved)


class Kill(BaseException):
    pass


@pytest.mark.parametrize("survive", range(3))
def test_a_kill_while_saving_over_another_one(saved, tmp_path, monkeypatch, survive):
    """Either of the two is there, or none: never the tensors of one beside the names of another."""
    other = fit_curvature(LAYERED_BY_NAME["mlp-bernoulli"].task(), fisher="empirical")
    before, original, count = load_curvature(saved), os.replace, [0]

    def replace(*paths):
        if count[0] == survive:
            raise Kill
        count[0] += 1
        original(*paths)

    with monkeypatch.context() as broken:
        broken.setattr(_saving.os, "replace", replace)
        try:
            save_curvature(other, saved)
        except Kill:
            assert survive < 2
            with pytest.raises(FileNotFoundError, match="holds no curvature"):
                load_curvature(saved)
        else:
            equal(load_curvature(saved), other)
    save_curvature(other, saved)
    equal(load_curvature(saved), other)
    assert not torch.equal(before.blocks[0].eigenvalues, other.blocks[0].eigenvalues)


def test_moved_folders_load(saved, tmp_path):
    shutil.move(saved, tmp_path / "elsewhere")
    assert len(load_curvature(tmp_path / "elsewhere").blocks) == 2
