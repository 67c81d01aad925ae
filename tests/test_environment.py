"""How `make` finds its settings and when it makes the environment anew."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import environment
import pytest


@pytest.fixture
def pip_says(monkeypatch):
    """Makes pip's configuration what a test says, and uv's variables unset."""
    for name in ("UV_DEFAULT_INDEX", "UV_INDEX_URL", "SSL_CERT_FILE"):
        monkeypatch.delenv(name, raising=False)

    def answer(text: str) -> None:
        done = subprocess.CompletedProcess([], 0, stdout=text, stderr="")
        monkeypatch.setattr(environment.subprocess, "run", lambda *_, **__: done)

    return answer


def test_pips_index_and_certificate_become_uvs(pip_says):
    pip_says(
        "global.cert='/ca.pem'\nglobal.index-url='https://old.example/simple'\n:env:.index-url='https://mirror.example/simple'\n"
    )
    settings = environment.site_environment()
    assert settings["UV_DEFAULT_INDEX"] == "https://mirror.example/simple"
    assert settings["SSL_CERT_FILE"] == "/ca.pem"


def test_uvs_own_settings_win(pip_says, monkeypatch):
    monkeypatch.setenv("UV_DEFAULT_INDEX", "https://chosen.example/simple")
    pip_says("global.index-url='https://mirror.example/simple'\n")
    assert environment.site_environment()["UV_DEFAULT_INDEX"] == "https://chosen.example/simple"


def test_no_setting_of_pip_leaves_uvs_default(pip_says):
    pip_says("")
    assert "UV_DEFAULT_INDEX" not in environment.site_environment()


def test_an_activated_environment_is_not_the_target(monkeypatch):
    monkeypatch.setenv("VIRTUAL_ENV", "elsewhere")
    assert "VIRTUAL_ENV" not in environment.site_environment()


@pytest.fixture
def small_workspace(monkeypatch, tmp_path):
    (tmp_path / "pyproject.toml").write_text('[tool.uv.workspace]\nmembers = ["packages/*"]\n')
    (tmp_path / "uv.lock").write_text("version = 1\n")
    (tmp_path / "packages" / "meo").mkdir(parents=True)
    (tmp_path / "packages" / "meo" / "pyproject.toml").write_text("[project]\n")
    (tmp_path / "tools").mkdir()
    shutil.copy(environment.__file__, tmp_path / "tools" / "environment.py")
    monkeypatch.setattr(environment, "ROOT", tmp_path)
    monkeypatch.setattr(environment, "__file__", str(tmp_path / "tools" / "environment.py"))
    return tmp_path


def test_members_are_found_by_their_folders(small_workspace):
    (small_workspace / "packages" / "no-package").mkdir()
    assert [folder.name for folder in environment.members(small_workspace)] == ["meo"]


@pytest.mark.parametrize("changed", ["uv.lock", "packages/meo/pyproject.toml", "tools/environment.py"])
def test_the_stamp_changes_with_what_is_installed(small_workspace, monkeypatch, changed):
    monkeypatch.setattr(environment, "members", lambda: [small_workspace / "packages" / "meo"])
    before = environment.fingerprint()
    assert environment.fingerprint() == before
    with (small_workspace / changed).open("a") as file:
        file.write("\n# changed\n")
    assert environment.fingerprint() != before


def test_an_environment_without_its_python_is_made_anew(tmp_path):
    (tmp_path / environment.STAMP).write_text("wanted")
    assert not environment.up_to_date(tmp_path, "wanted")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").touch()
    assert environment.up_to_date(tmp_path, "wanted")
    assert not environment.up_to_date(tmp_path, "another")


def test_this_environment_is_the_locks():
    """The versions that run these tests are the locked ones, unless the newest were asked for."""
    uv, settings = environment.find_uv(), environment.site_environment()
    options = [*environment.EXPORT, "--all-groups", "--no-hashes", "--no-header"]
    command = [str(uv), "export", "--quiet", *options]
    exported = subprocess.run(command, cwd=environment.ROOT, env=settings, capture_output=True, text=True, check=True)
    frozen = subprocess.run(
        [str(uv), "pip", "freeze", "--python", sys.executable], env=settings, capture_output=True, text=True, check=True
    )
    installed = dict(line.split("==") for line in frozen.stdout.splitlines() if "==" in line)
    lines = [line.split(" ;")[0].strip().split("==") for line in exported.stdout.splitlines() if "==" in line]
    wanted: dict[str, set[str]] = {}
    for name, version in lines:
        wanted.setdefault(name, set()).add(version)
    assert "torch" in installed
    assert {name for name, version in installed.items() if version not in wanted.get(name, set())} == set()


def test_make_help_lists_every_target():
    done = subprocess.run(["make", "help"], cwd=environment.ROOT, capture_output=True, text=True, env=dict(os.environ))
    makefile = (environment.ROOT / "Makefile").read_text()
    (phony,) = [line for line in makefile.splitlines() if line.startswith(".PHONY:")]
    assert done.returncode == 0
    for target in phony.split()[1:]:
        assert f"make {target}" in done.stdout


def test_gpu_tests_say_why_they_are_skipped_and_succeed():
    """With this environment's Python, whose torch is a CUDA build that may see no device."""
    code = "import torch, gpu, sys; torch.cuda.is_available = lambda: False; sys.exit(gpu.main())"
    folder = environment.ROOT / "tools"
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("GPU tests skipped: torch ")
    assert "no CUDA device" in done.stdout
