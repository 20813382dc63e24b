"""Workers and the main process do not grow over thousands of batches."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from tests.data.photos import make_folder

RUN = """
import sys
from pathlib import Path
from tests.data.datamodules import make_datamodule

def resident():
    # Private memory of this process and its workers, and the shared memory that batches travel in.
    tasks = [Path("/proc/self")]
    children = Path(f"/proc/self/task/{Path('/proc/self').resolve().name}/children")
    tasks += [Path(f"/proc/{pid}") for pid in children.read_text().split()]
    lines = [line for t in tasks for line in (t / "status").read_text().splitlines()]
    kinds = ("RssAnon", "RssShmem")
    return sum(int(line.split()[1]) for line in lines if line.startswith(kinds)) / 1024

module = make_datamodule(sys.argv[1], num_workers=4, global_batch_size=8, max_bad_fraction=0.5)
sampler = module.sampler(rank=0, world_size=1)
loader = module.loader(sampler)
done, marks = 0, {}
for epoch in range(10_000):
    sampler.set_epoch(epoch)
    for batch in loader:
        module._record(batch)
        module.make_views(batch)
        done += 1
        if done in (300, 2300):
            marks[done] = resident()
    if done >= 2300:
        break
print(marks[300], marks[2300])
"""


@pytest.mark.slow
@pytest.mark.skipif("MSN_TEST_LONG" not in os.environ, reason="two minutes; MSN_TEST_LONG=1")
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_two_thousand_batches_with_four_workers_grow_by_less_than_a_twentieth(tmp_path):
    root = make_folder(tmp_path, classes=4, images=40)
    for number, side in enumerate((30, 90, 200, 333)):
        Image.new("RGB", (2 * side, side), "teal").save(root / "class_0" / f"{number}.jpg")
    (root / "class_1" / "0.jpg").write_bytes(b"")
    repository = Path(__file__).parents[2]
    out = subprocess.run(
        [sys.executable, "-c", RUN, str(root)],
        env={**os.environ, "PYTHONPATH": str(repository)},
        cwd=repository,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    before, after = map(float, out.split())
    assert after < 1.05 * before, (before, after)
