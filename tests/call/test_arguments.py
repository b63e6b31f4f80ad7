"""The record of a call's keywords says what the signatures say."""

from __future__ import annotations

import inspect

import numpy as np
import pytest

import cuflash
from cuflash.call.arguments import Arguments, normalised
from cuflash.errors import ArgumentError


def test_the_record_is_attentions_signature():
    parameters = list(inspect.signature(cuflash.attention).parameters.values())[3:]
    assert [(p.name, p.default) for p in parameters] == [(n, Arguments._field_defaults[n]) for n in Arguments._fields]


def test_the_backward_takes_the_same_keywords_but_for_results():
    own = {"dlse": None, "captured_grads": False, "dq": None, "dk": None, "dv": None}
    parameters = list(inspect.signature(cuflash.attention_backward).parameters.values())[6:]
    shared = [(n, Arguments._field_defaults[n]) for n in Arguments._fields if n not in ("out", "aux")]
    assert [(p.name, p.default) for p in parameters] == [*shared, *own.items()]


def test_every_keyword_reaches_the_record(monkeypatch):
    """`attention` hands its keywords on by position: none in another's place."""
    from cuflash import api

    seen = []
    monkeypatch.setattr(api, "_attention", lambda q, k, v, arguments: seen.append(arguments))
    given = {name: object() for name in Arguments._fields}
    cuflash.attention(np.zeros(1), 0, 0, **given)
    assert seen == [Arguments(**given)]


def test_every_keyword_reaches_the_record_of_a_backward(monkeypatch):
    from cuflash import api

    seen = []
    monkeypatch.setattr(api, "bind_mods", lambda *_: None)
    monkeypatch.setattr(api, "bind", lambda *given: seen.append(given) or (_ for _ in ()).throw(KeyError))
    given = {name: object() for name in Arguments._fields if name not in ("out", "aux", "deterministic")}
    with pytest.raises(KeyError):
        cuflash.attention_backward(0, 1, 2, 3, 4, 5, **given, deterministic=True)
    ((*_, arguments, _, backward),) = seen
    assert arguments == Arguments(**given) and backward.deterministic


def test_normalised_folds_causal_into_the_window_and_checks_numbers():
    found = normalised(Arguments(causal=True, window_size=(3, None), scale=1, softcap=2, aux=["lse"]))
    assert found[7:11] == (1.0, False, (3, 0), 2.0) and found.aux == ("lse",)
    assert normalised(found) == found
    with pytest.raises(ArgumentError, match="scale=nan"):
        normalised(Arguments(scale=float("nan")))
