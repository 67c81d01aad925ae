"""Makes .venv from uv.lock, with every download's hash checked. Needs only Python 3.11 to 3.13; gets uv by itself.

    python3 tools/environment.py            the locked environment in .venv (does nothing when it is up to date)
    python3 tools/environment.py latest     shared packages with the newest transformers and torch, in .venv-latest
    python3 tools/environment.py uv ARGS    any uv command, with the uv and the settings used here

A site's own settings are honoured: uv's variables (UV_DEFAULT_INDEX and so on) as they are, and where they are not
set, the index and the certificate file that pip is configured with.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
UV_REQUIREMENT = "uv>=0.13,<0.14"
STAMP = "leanformers.stamp"
# of `uv export`: the lock as it is installed; vLLM, which llm-compressor refuses beside itself, goes with no whole
EXPORT = ("--frozen", "--all-packages", "--all-extras", "--no-extra", "vllm", "--no-emit-workspace", "--no-annotate")


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def run(command: list[str | Path], **options: object) -> subprocess.CompletedProcess[str]:
    """Runs `command` and ends this program with its exit code when it fails."""
    done = subprocess.run([str(part) for part in command], text=True, **options)  # type: ignore[call-overload]
    if done.returncode:
        say(f"failed ({done.returncode}): {' '.join(str(part) for part in command)}")
        if done.stderr:
            say(done.stderr.rstrip())
        sys.exit(done.returncode if done.returncode > 0 else 1)
    return done  # type: ignore[no-any-return]


def python_supported() -> None:
    if not (3, 11) <= sys.version_info[:2] <= (3, 13):
        say(f"Python 3.11 to 3.13 is needed, this is {sys.version.split()[0]}; name one: `make PYTHON=python3.12`")
        sys.exit(2)


def pip_settings() -> dict[str, str]:
    """What pip is configured with, from its files and variables together: {"index-url": ..., "cert": ...}."""
    listed = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True)
    settings: dict[str, str] = {}
    for line in listed.stdout.splitlines():  # global, user and site files come before the variables, which win
        key, _, value = line.partition("=")
        settings[key.rpartition(".")[2]] = value.strip("'\"")
    return settings


def site_environment() -> dict[str, str]:
    """The environment for uv: this process's, filled up from pip's settings where uv's own are not set."""
    environment = dict(os.environ)
    environment.pop("VIRTUAL_ENV", None)  # an activated environment must not be taken for the project's
    environment.setdefault("UV_PYTHON_DOWNLOADS", "never")
    environment.setdefault("UV_HTTP_TIMEOUT", "180")
    pip = pip_settings()
    if "index-url" in pip and not {"UV_DEFAULT_INDEX", "UV_INDEX_URL"} & environment.keys():
        environment["UV_DEFAULT_INDEX"] = pip["index-url"]
    if "cert" in pip:
        environment.setdefault("SSL_CERT_FILE", pip["cert"])
    return environment


def find_uv() -> Path:
    """uv from the PATH when it is new enough, else from .tools/, where it is installed with pip on first use."""
    own = ROOT / ".tools" / "bin" / "uv"
    for found in (shutil.which("uv"), str(own)):
        if found and Path(found).exists():
            version = subprocess.run([found, "--version"], capture_output=True, text=True).stdout.split()
            if len(version) > 1 and version[1].startswith("0.13."):
                return Path(found)
    say("installing uv into .tools/")
    run([sys.executable, "-m", "venv", "--clear", ROOT / ".tools"])
    run([ROOT / ".tools/bin/python", "-m", "pip", "install", "--quiet", UV_REQUIREMENT])
    return own


def members(root: Path = ROOT) -> list[Path]:
    """Folders of the workspace's packages, as the root pyproject.toml lists them."""
    patterns = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["uv"]["workspace"]["members"]
    return sorted(file.parent for pattern in patterns for file in root.glob(f"{pattern}/pyproject.toml"))


def fingerprint() -> str:
    """Changes when an installed environment is out of date: the lock, a package's metadata, the Python version."""
    digest = hashlib.sha256(sys.version.encode())
    for file in [ROOT / "uv.lock", *(folder / "pyproject.toml" for folder in members()), Path(__file__).resolve()]:
        digest.update(str(file.relative_to(ROOT)).encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


def up_to_date(folder: Path, wanted: str) -> bool:
    stamp = folder / STAMP
    return stamp.exists() and stamp.read_text() == wanted and (folder / "bin/python").exists()


def create(uv: Path, folder: Path, environment: dict[str, str]) -> list[str | Path]:
    """An empty environment of this Python in `folder` (kept if it is there); returns the start of its uv commands."""
    if not (folder / "bin/python").exists():
        run([uv, "venv", "--quiet", "--clear", "--python", sys.executable, folder], env=environment, cwd=ROOT)
    (folder / STAMP).unlink(missing_ok=True)
    return [uv, "pip"]


def install_locked() -> None:
    """.venv as uv.lock says: third-party packages with their hashes required, then ours, editable, built offline."""
    folder, wanted = ROOT / ".venv", fingerprint()
    if up_to_date(folder, wanted):
        return
    python_supported()
    uv, environment = find_uv(), site_environment()
    say("making .venv from uv.lock (torch with CUDA: about 5 GB, half a minute on a fast line)")
    pip = create(uv, folder, environment)
    export: list[str | Path] = [uv, "export", "--quiet", *EXPORT, "--all-groups"]
    with tempfile.TemporaryDirectory() as room:
        pinned = Path(room) / "pinned.txt"
        pinned.write_text(run(export, env=environment, cwd=ROOT, capture_output=True).stdout)
        run([*pip, "sync", "--require-hashes", "--python", folder, pinned], env=environment, cwd=ROOT)
    editable: list[str | Path] = [part for member in members() for part in ("--editable", member)]
    alone = ["--no-deps", "--no-build-isolation", "--offline", "--quiet"]
    run([*pip, "install", *alone, "--python", folder, *editable], env=environment, cwd=ROOT)
    (folder / STAMP).write_text(wanted)


def with_extras(folder: Path) -> str:
    """A package's folder with all its extras but those that hold transformers back."""
    project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    extras = [name for name in project.get("optional-dependencies", {}) if name not in ("prune", "vllm")]
    return f"{folder}[{','.join(extras)}]"


def install_latest() -> None:
    """.venv-latest: the shared packages and the test tools with the newest versions that the bounds allow."""
    python_supported()
    folder = ROOT / ".venv-latest"
    uv, environment = find_uv(), site_environment()
    pip = create(uv, folder, environment)
    folders = [member for member in members() if member.parent != ROOT / "packages"]
    shared: list[str | Path] = [part for member in folders for part in ("--editable", with_extras(member))]
    tests: list[str | Path] = ["--group", f"{ROOT / 'pyproject.toml'}:dev"]
    # --no-config: without the constraints of [tool.uv], which hold the lock back
    run([*pip, "install", "--no-config", "--upgrade", "--python", folder, *shared, *tests], env=environment, cwd=ROOT)


def main(arguments: list[str]) -> int:
    match arguments:
        case []:
            install_locked()
        case ["latest"]:
            install_latest()
        case ["uv", *rest]:
            return subprocess.run([str(find_uv()), *rest], env=site_environment()).returncode
        case _:
            say(__doc__ or "")
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
