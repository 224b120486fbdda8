from __future__ import annotations

import ctypes
import shutil

import pytest

from titanfunc.config import driver


@pytest.fixture
def bare(monkeypatch):
    """A Linux machine without anything of a GPU."""

    def fails(name):
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(driver.sys, "platform", "linux")
    monkeypatch.setattr(driver, "SIGNS", ())
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(ctypes, "CDLL", fails)
    return monkeypatch


@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_a_machine_without_a_driver(bare, device):
    with pytest.raises(ValueError, match=rf"^device: wanted auto or cpu, as this machine has no driver .* '{device}'$"):
        driver.require_driver(device, "device")
    driver.require_driver("auto", "device")
    driver.require_driver("cpu", "device")


@pytest.mark.parametrize("sign", ["file", "program", "library", "platform"])
def test_any_sign_of_a_driver_leaves_it_to_torch(bare, tmp_path, sign):
    assert not driver.has_driver()
    owner, name, value = {
        "file": (driver, "SIGNS", ("/nowhere", str(tmp_path))),
        "program": (shutil, "which", lambda name: f"/usr/bin/{name}"),
        "library": (ctypes, "CDLL", lambda name: name),
        "platform": (driver.sys, "platform", "win32"),
    }[sign]
    bare.setattr(owner, name, value)
    assert driver.has_driver()
    driver.require_driver("cuda", "device")


def test_kernels_need_one(bare, tmp_path):
    bare.delenv("TRITON_INTERPRET", raising=False)
    message = r"^model\.kernels: wanted reference, as this machine has no driver of a GPU, got 'triton'$"
    with pytest.raises(ValueError, match=message):
        driver.require_kernels("triton", "auto", "model.kernels")
    driver.require_kernels("reference", "auto", "model.kernels")
    bare.setattr(driver, "SIGNS", (str(tmp_path),))
    driver.require_kernels("triton", "auto", "model.kernels")
    with pytest.raises(ValueError, match=r"^kernels: wanted reference on device=cpu, got 'triton'$"):
        driver.require_kernels("triton", "cpu", "kernels")
    bare.setenv("TRITON_INTERPRET", "1")
    driver.require_kernels("triton", "cpu", "kernels")
