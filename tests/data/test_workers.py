"""Batches leave workers also where memory or files are short; what ends them is one line."""

import errno
import gc
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset

from msn.data import workers
from msn.data.workers import explain, in_one_line, make_loader, shared_flags
from msn.errors import UserError
from tests.conftest import ROOT
from tests.data.datamodules import make_datamodule
from tests.data.photos import make_folder

NO_ROOM = "unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)"


class Rows(Dataset):
    def __len__(self):
        return 6

    def __getitem__(self, i):
        return torch.full((3, 4), float(i)), i, i % 2 == 0, f"row {i}"


def test_more_workers_than_cores_are_no_warning(recwarn):
    iter(make_loader(Rows(), num_workers=3 * (os.cpu_count() or 1), batch_size=1))
    said = [str(warning.message) for warning in recwarn]
    assert [line for line in said if "use of fork() may" not in line] == []  # Python 3.12's own


def no_room(*_):
    raise RuntimeError(NO_ROOM)


def full(monkeypatch):
    """No room when it is looked for."""
    monkeypatch.setattr(workers, "_fits", lambda count: False)


def taken(monkeypatch):
    """Another worker takes the room between the look and the allocation."""
    monkeypatch.setattr(torch.UntypedStorage, "_new_shared", no_room)


def few_files(monkeypatch):
    """Few files may be open."""
    monkeypatch.setattr(workers, "open_files_limit", lambda: len(os.listdir("/dev/fd")) + 26)
    monkeypatch.setattr(workers, "_fits", no_room)  # is not asked


@pytest.fixture
def folder(tmp_path):
    return make_folder(tmp_path / "in")


@pytest.mark.parametrize("short", [None, full, taken, few_files])
def test_batches_are_the_same_with_and_without_shared_memory(short, folder, monkeypatch):
    def batches(num_workers):
        data = make_datamodule(folder, num_workers=num_workers)
        return list(data.loader(data.sampler(rank=0, world_size=1)))

    expected = batches(0)
    if short is not None:
        short(monkeypatch)
    for batch, other in zip(batches(1), expected, strict=True):
        assert batch.pixels.is_shared() == (short is None)
        for name in ("pixels", "starts", "sizes", "table", "indices"):
            assert torch.equal(getattr(batch, name), getattr(other, name))
        batch.pixels.add_(1)  # arrives writable


@pytest.mark.parametrize("short", [None, full, taken, few_files])
def test_rows_arrive_as_columns_with_and_without_shared_memory(short, monkeypatch):
    if short is not None:
        short(monkeypatch)
    for num_workers in (0, 1):
        first = next(iter(make_loader(Rows(), num_workers=num_workers, batch_size=4)))
        assert torch.equal(first[0], torch.arange(4.0)[:, None, None].expand(4, 3, 4))
        assert (first[1].tolist(), first[2].tolist()) == ([0, 1, 2, 3], [True, False, True, False])
        assert (first[2].dtype, first[3]) == (torch.bool, ["row 0", "row 1", "row 2", "row 3"])


def test_too_few_files_for_the_workers_are_said_before_any_is_started(monkeypatch):
    gc.collect()  # or what earlier tests opened is closed meanwhile
    opened = len(os.listdir("/dev/fd"))
    monkeypatch.setattr(workers, "open_files_limit", lambda: opened + 14)
    with pytest.raises(UserError) as caught:
        make_loader(Rows(), num_workers=4)
    assert str(caught.value).startswith(
        f"data.num_workers=4: too many for the {opened + 14} files that may be open ("
    )
    assert "1 is the most, or raise `ulimit -n`" in str(caught.value)


def test_flags_are_the_process_s_own_where_there_is_no_shared_memory(monkeypatch):
    assert shared_flags(3).is_shared()
    monkeypatch.setattr(torch.Tensor, "share_memory_", no_room)
    assert shared_flags(3).tolist() == [False] * 3


def in_worker(kind, text=""):
    """An error as a worker sends it: of its type, with its traceback as text."""
    lines = ["DataLoader worker process 0.", "Original Traceback (most recent call last):", text]
    return kind(f"Caught {kind.__name__} in " + "\n".join(lines))


CPU_FULL = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 4294967296 bytes."
DIED = "DataLoader worker (pid 1) is killed by signal: "
LACKS = {
    "the device": (
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        "out of memory (2.00 GiB more were wanted): LESS",
    ),
    "torch": (RuntimeError(CPU_FULL), "out of memory (4.00 GiB more were wanted): LESS"),
    "Python": (MemoryError(), "out of memory: LESS"),
    "the system": (OSError(errno.ENOMEM, "Cannot allocate memory"), "out of memory: LESS"),
    "a worker": (
        in_worker(MemoryError),
        "out of memory in a data worker: data.num_workers=N takes fewer of them",
    ),
    "files": (OSError(errno.EMFILE, "Too many open files"), "too many open files, the limit is "),
    "files of a worker": (
        in_worker(OSError, "OSError: [Errno 24] Too many open files: 'a'"),
        "too many open files, the limit is ",
    ),
    "shared memory": (
        in_worker(RuntimeError, f"RuntimeError: {NO_ROOM}"),
        "a data worker found no room in shared memory (",
    ),
    "shared memory, found late": (
        RuntimeError(f"{DIED}Bus error."),
        "a data worker found no room in shared memory (",
    ),
    "a killed worker": (
        RuntimeError(f"{DIED}Killed. "),
        f"{DIED}Killed. (out of memory? data.num_workers=N takes fewer)",
    ),
    "threads": (
        RuntimeError("can't start new thread"),
        "too many processes and threads (`ulimit -u`): data.num_workers=N takes fewer",
    ),
    "images": (in_worker(UserError, "msn.errors.UserError: x: no image\n"), "x: no image"),
    "its own mistake": (UserError("its own"), None),
    "another error": (RuntimeError("shapes cannot be multiplied"), None),
    "the disk": (OSError(errno.ENOSPC, "No space left on device"), None),
}


@pytest.mark.parametrize("what", LACKS)
def test_what_the_machine_lacks_is_said_with_what_to_do(what):
    error, line = LACKS[what]
    found = explain(error, lambda: "LESS")
    if line is None:
        assert found is None
        with pytest.raises(type(error)) as caught, in_one_line(lambda: "LESS"):
            raise error
        assert caught.value is error
    else:
        assert found.startswith(line)
        assert "\n" not in found
        with pytest.raises(UserError) as caught, in_one_line(lambda: "LESS", lambda: "; THEN"):
            raise error
        assert str(caught.value) == f"{found}; THEN"


class Refusing(Rows):
    def __getitem__(self, i):
        raise UserError("x: no image of class a can be read")


def test_what_a_worker_tells_the_user_comes_through_whole():
    with pytest.raises(UserError) as caught, in_one_line(lambda: ""):
        list(make_loader(Refusing(), num_workers=1))
    assert str(caught.value) == "x: no image of class a can be read"


SMALL = """
import sys
import time
from tests.data.test_workers import sums
print(sums(sys.argv[1]))
"""


def sums(folder):
    data = make_datamodule(folder, num_workers=2, backend="reference")
    order = data.sampler(rank=0, world_size=1)
    return [int(batch.pixels.long().sum()) for batch in data.loader(order)]


def run_limited(before, folder):
    command = f'{before}; exec "{sys.executable}" -c "$0" "$1"'
    return subprocess.run(
        ["unshare", "-rm", "bash", "-c", command, SMALL, str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.slow
def test_a_container_with_8_mb_of_shared_memory_trains_on_the_same_batches(tmp_path):
    try:
        probe = subprocess.run(["unshare", "-rm", "true"], capture_output=True)
    except OSError:
        pytest.skip("needs unshare")
    if probe.returncode:
        pytest.skip("needs the right to mount")
    (tmp_path / "in").mkdir()
    for i in range(12):
        noise = np.random.default_rng(i).integers(0, 256, (1500, 2000, 3), np.uint8)
        Image.fromarray(noise).save(tmp_path / "in" / f"{i}.bmp")
    done = run_limited("mount -t tmpfs -o size=8m tmpfs /dev/shm", tmp_path / "in")
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[-1] == str(sums(tmp_path / "in"))
    assert "shared memory (/dev/shm, 8 MiB) is too small: batches travel through" in done.stderr
    assert done.stderr.count("is too small") == 1


def test_a_worker_ends_on_sigterm_of_its_parent_alone():
    reading, writing = os.pipe()
    worker = os.fork()
    if worker == 0:
        workers._prepare(0, may_share=True)
        os.write(writing, b"1")
        time.sleep(20)
        os._exit(1)
    assert os.read(reading, 1) == b"1"
    stranger = os.fork()
    if stranger == 0:
        os.kill(worker, signal.SIGTERM)
        os._exit(0)
    os.waitpid(stranger, 0)
    time.sleep(0.1)
    assert os.waitpid(worker, os.WNOHANG) == (0, 0)
    os.kill(worker, signal.SIGTERM)
    assert os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1]) == 0
