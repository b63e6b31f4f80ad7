"""The settings: each is read from the environment once, and a wrong one is refused where it is set."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from cuflash.errors import ArgumentError, UnsupportedError
from cuflash.settings import Config


def test_every_setting_is_an_environment_variable():
    config = Config(
        {
            "CUFLASH_BACKEND": "emulator",
            "CUFLASH_ARCH": "sm_90",
            "CUFLASH_CHECK": "1",
            "CUFLASH_CACHE_DIR": "~/kernels",
            "CUFLASH_DUMP": "texts",
            "CUFLASH_ON_COMPILE": "error",
        }
    )
    assert (config.backend, config.arch, config.check) == ("emulator", "sm_90a", True)
    assert config.cache_dir == Path.home() / "kernels"
    assert config.dump == Path("texts")
    assert config.on_compile == "error"


@pytest.mark.parametrize("empty", ["", None])
def test_what_is_not_set_has_its_default(empty):
    names = ("BACKEND", "ARCH", "CHECK", "CACHE_DIR", "DUMP", "ON_COMPILE")
    config = Config({} if empty is None else {f"CUFLASH_{name}": empty for name in names})
    assert (config.backend, config.arch, config.check) == ("auto", "sm_80", False)
    assert config.cache_dir.name == "cuflash" and config.dump is None


@pytest.mark.parametrize(
    "terminal, notebook, mode", [(False, False, "quiet"), (True, False, "progress"), (False, True, "progress")]
)
def test_whoever_looks_on_sees_that_something_compiles(monkeypatch, terminal, notebook, mode):
    monkeypatch.setattr(sys, "stderr", SimpleNamespace(isatty=lambda: terminal))
    shell = SimpleNamespace(kernel=object()) if notebook else None
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    config = Config({})
    assert config.on_compile == mode
    config.on_compile = "error"
    assert config.on_compile == "error"
    config.on_compile = None
    assert config.on_compile == mode


@pytest.mark.parametrize("value", ["0", "false", "False", "no"])
def test_check_can_be_switched_off(value):
    assert not Config({"CUFLASH_CHECK": value}).check


@pytest.mark.parametrize(
    "name, value, error, says",
    [
        ("backend", "gpu", ArgumentError, r"config\.backend='gpu' \(CUFLASH_BACKEND\) must be one of auto, cuda"),
        ("arch", "sm_75", UnsupportedError, r"arch='sm_75' is not one of sm_80.*on older GPUs pass host arrays"),
        ("arch", "sm90", ArgumentError, r"arch='sm90' is no architecture's name: pass 'sm_90a'"),
        ("arch", "compute_120", ArgumentError, r"arch='compute_120' is no architecture's name: pass 'sm_120a'"),
        ("cache_dir", "a\0b", ArgumentError, r"config\.cache_dir='a\\x00b' \(CUFLASH_CACHE_DIR\) must be a"),
        ("dump", "~nobody-of-this-name/x", ArgumentError, r"config\.dump='~nobody.*' \(CUFLASH_DUMP\) must be a"),
        ("on_compile", "loud", ArgumentError, r"config\.on_compile='loud' \(CUFLASH_ON_COMPILE\) must be one of prog"),
    ],
)
def test_a_wrong_value_is_refused_and_changes_nothing(name, value, error, says):
    refused(name, value, error, says)
    with pytest.raises(error, match=says):
        Config({f"CUFLASH_{name.upper()}": value})


@pytest.mark.parametrize("name", ["backend", "arch", "check", "cache_dir", "dump", "on_compile"])
@pytest.mark.parametrize("value", [3, 1.5, np.arange(2), np.array(["auto", "cuda"]), [None], b"auto"], ids=repr)
def test_a_value_of_another_type_is_refused(name, value):
    refused(name, value, ArgumentError, rf"arch|config\.{name}=.*must be")


def test_an_architecture_by_its_number_is_no_name():
    refused("arch", 90, ArgumentError, "arch=90 is no architecture's name: pass 'sm_90a'")


def refused(name, value, error, says):
    config = Config({})
    before = repr(config), config.version
    with pytest.raises(error, match=says):
        setattr(config, name, value)
    assert (repr(config), config.version) == before


def test_a_misspelt_setting_is_no_setting():
    with pytest.raises(AttributeError):
        Config({}).bakend = "cuda"  # type: ignore[attr-defined]
