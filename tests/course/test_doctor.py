import importlib.metadata
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch

from minillm.course import doctor
from minillm.model.families import preset
from minillm.model.flops import training_flops_per_token
from minillm.nn import onednn

Usage = namedtuple("Usage", "total used free")


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    """A machine of known speed and room: products need not be measured for what is tested here."""
    monkeypatch.setattr(doctor, "matmul_rate", lambda dtype, *_: {torch.float32: 5e10, torch.bfloat16: 2e10}[dtype])
    monkeypatch.setattr(onednn, "helps", lambda: False)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(9e9, 1e9, 8e9))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)


def report():
    lines, healthy = doctor.examine()
    return "\n".join(lines), healthy


def test_a_healthy_machine_is_ready():
    text, healthy = report()
    assert healthy and "verdict    ready: make run" in text and "packages   all" in text
    for words in (f"torch      {torch.__version__.split('+')[0]}", "8 GB free",
                  "fp32 50 GFLOP/s, bf16 20 GFLOP/s", "gpu        none", "tokens/s in fp32"):
        assert words in text, text


def test_where_onednn_helps_its_products_are_what_the_promise_is_made_of(monkeypatch):
    monkeypatch.setattr(onednn, "helps", lambda: True)
    monkeypatch.setattr(doctor, "matmul_rate", lambda dtype, device, size, multiply=None: 9e10 if multiply is onednn.product else 5e10)
    text, _ = report()
    assert "fp32 50 GFLOP/s, bf16 50 GFLOP/s, fp32 by oneDNN 90 GFLOP/s" in text
    assert f"at most {9e10 / training_flops_per_token(preset('first')):,.0f} tokens/s in fp32" in text


def test_the_promised_speed_is_the_products_over_the_models_cost():
    assert f"at most {5e10 / training_flops_per_token(preset('first')):,.0f} tokens/s" in report()[0]


def test_a_missing_package_is_named_with_the_way_out(monkeypatch):
    real = importlib.metadata.version

    def version(name):
        if name == "tyro":
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    text, healthy = report()
    assert not healthy and "tyro       MISSING: pip install -r requirements.txt" in text
    assert "not ready, see above" in text and "packages   all" not in text


def test_too_little_room_is_not_ready(monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(9e9, 8.5e9, 5e8))
    text, healthy = report()
    assert not healthy and "too little, the course needs 1 GB" in text and "not ready" in text


def test_every_package_that_is_asked_for_is_in_the_requirements():
    pinned = (Path(__file__).parents[2] / "requirements.txt").read_text()
    assert all(f"\n{name}" in "\n" + pinned for name in doctor.NEEDED)


def test_a_measured_rate_is_a_positive_number(monkeypatch):
    monkeypatch.undo()
    ticks = iter(range(100))
    monkeypatch.setattr(doctor.time, "perf_counter", lambda: next(ticks))
    assert doctor.matmul_rate(torch.float32, size=8, repeats=3) == 2 * 8 ** 3  # each product takes one tick of this clock
