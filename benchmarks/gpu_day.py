"""All that wants a GPU, in one command of at most nine minutes on an H100.

    python benchmarks/gpu_day.py [--out gpu_day] [--parts machine,tests] [--images DIR] [--small]

Every part is a process of its own with a time limit, so that one that fails loses nothing, and
writes OUT/PART.json; OUT/gpu_day.md is written again after each. The same command goes on where it
was stopped: parts with a result are not run again. --images: a folder of small photographs with
train and val, which the recipe small_images trains on. --small: tiny networks, also without a GPU,
to try this program.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch
from PIL import Image
from torch.profiler import ProfilerActivity, profile

from msn.commands.entry import compose, to_plain
from msn.commands.plan import forecast
from msn.commands.step import Case, TrainingStep, ViewMaker, case_of, step_flops
from msn.training.cost import measure_matrix_rate, synchronise

ROOT = Path(__file__).parents[1]
# The parts' processes find this checkout, installed or not.
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PEAK = 989e12  # operations/s of an H100, bf16, by its data sheet
TINY = [
    "experiment=small_images",
    "model.embed_dim=32",
    "model.depth=1",
    "model.num_heads=2",
    "method.num_prototypes=16",
]
# Experiment, images per step, chunk_size, and the milliseconds that the account of simulated
# kernels gives with 75 % of the matrix rate and 85 % of the bandwidth, without launch overhead and
# views.
STEPS: dict[str, tuple[str, int, int | None, float | None]] = {
    "s16": ("msn_vits16", 128, None, 37.3),
    "s16_64": ("msn_vits16", 64, None, 19.1),
    "b16": ("msn_vitb16", 128, None, 88.4),
    "b16_1024": ("msn_vitb16", 1024, 64, None),
    "l16": ("msn_vitl16", 64, None, 136.6),
    "l7": ("msn_vitl7", 16, None, 167.0),
}
SMALL = False  # set by --small
IMAGES: str | None = None  # set by --images


def machine() -> dict[str, Any]:
    """What the device reaches: matrix products, copies."""
    found: dict[str, Any] = {"torch": torch.__version__, "cores": os.cpu_count()}
    for name, dtype in {"bf16": torch.bfloat16, "fp32": torch.float32}.items():
        found[f"{name}_tflops"] = measure_matrix_rate(DEVICE, dtype) / 1e12
    source = torch.randn(2**20 if SMALL else 2**30, device=DEVICE)
    target = torch.empty_like(source)
    seconds = _median(lambda: target.copy_(source), 20)
    found["copy_tb_per_s"] = 2 * source.numel() * 4 / seconds / 1e12
    found["name"] = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "CPU"
    return found


def tests() -> dict[str, Any]:
    """`pytest -m gpu`: its last line and what failed."""
    where = "tests/method/test_flops.py" if SMALL else "tests"
    done = _run(sys.executable, "-m", "pytest", "-q", "-m", "gpu or not gpu" if SMALL else "gpu",
                "-p", "no:cacheprovider", "--timeout=100", where)  # fmt: skip
    lines = done.stdout.strip().splitlines()
    failed = [line[:300] for line in lines if line.startswith(("FAILED", "ERROR", "E   "))]
    return {"summary": lines[-1] if lines else done.stderr[-300:], "failed": failed}


def verify() -> dict[str, Any]:
    """The reference figures, in float64 and float32."""
    from msn.commands.verify import load_golden, replay

    golden = load_golden(ROOT / "msn" / "golden" / "golden_default.safetensors")
    exact = list(replay(golden, DEVICE))
    single = list(replay(golden, DEVICE, torch.float32))
    losses = [figure.max_abs for figure in single if figure.name.endswith(".loss")]
    return {
        "figures": len(exact),
        "out_of_tolerance": [f"{f.name} {f.max_abs:.1e}" for f in exact if not f.ok],
        "largest_share_of_tolerance": max(figure.excess for figure in exact),
        "float32_largest_loss_difference": max(losses),
        "float32_largest_difference": max(figure.max_abs for figure in single),
    }


def equal() -> dict[str, Any]:
    """Three float32 steps on the device beside three on the CPU, same weights and views."""
    case = _case("msn_vits16", 8)._replace(precision="32-true", compile=False)
    here = TrainingStep(case._replace(device="cpu"))
    there = TrainingStep(case)
    there.module.network.load_state_dict(here.module.network.state_dict())
    moved_views = {
        name: getattr(here.views, name).to(DEVICE) for name in ("target", "rand", "focal")
    }
    there.views = here.views._replace(**moved_views)
    losses = []
    for _ in range(3):
        here.step()
        there.step()
        losses.append([float(step.module.loss_value) for step in (here, there)])
    ours = dict(there.module.network.anchor.named_parameters())
    moved = {
        name: float(((ours[name].cpu() - wanted).norm() / wanted.norm().clamp_min(1e-6)).detach())
        for name, wanted in here.module.network.anchor.named_parameters()
        if "bias" not in name
    }
    return {"losses_cpu_device": losses, "largest_relative_weight_difference": max(moved.values())}


def step(name: str) -> Callable[[], dict[str, Any]]:
    """Time, rate and memory of one recipe's step."""
    experiment, batch, chunk, predicted = STEPS[name]

    def measure() -> dict[str, Any]:
        case = _case(experiment, batch, chunk)
        forecast_peak = _forecast(case)
        if DEVICE.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        method = TrainingStep(case)
        method.step()
        synchronise(DEVICE)
        first = time.perf_counter() - start
        method.step()
        seconds = _median(method.step, 20 if chunk is None else 5)
        peak = torch.cuda.max_memory_allocated() if DEVICE.type == "cuda" else 0
        flops, own = step_flops(case).total, seconds
        parts = [method.parts() for _ in range(4)][1:]
        return {
            "batch": case.batch_size,
            "chunk_size": case.chunk_size,
            "compiled": method.compiled,
            "first_step_s": first,
            "ms": own * 1000,
            "predicted_ms": predicted,
            "images_per_s": case.batch_size / own,
            "mfu_of_989": flops / own / PEAK,
            "peak_gib": peak / 2**30,
            "forecast_gib": forecast_peak / 2**30,
            "parts_ms": {k: 1000 * statistics.median(p[k] for p in parts) for k in parts[0]},
        }

    return measure


def views() -> dict[str, Any]:
    """Views of a batch that lies on the device: device time, host time, launches."""
    found = {}
    for batch in (8,) if SMALL else (64, 128, 256, 1024):
        make_views = ViewMaker(_case("msn_vits16", batch), torch.bfloat16)
        seconds = _median(make_views, 10)
        synchronise(DEVICE)
        start = time.perf_counter()
        make_views()
        host = time.perf_counter() - start
        kernels, _ = _profiled(make_views, 1)
        found[str(batch)] = {
            "ms": seconds * 1000,
            "ms_per_image": seconds * 1000 / batch,
            "host_ms": host * 1000,
            "launches": sum(count for _, count in kernels.values()),
        }
    return found


def trace() -> dict[str, Any]:
    """Where an S/16 step's time goes: kernels by time, and the share in which none runs."""
    method = TrainingStep(_case("msn_vits16", 128))
    for _ in range(3):
        method.step()
    kernels, wall = _profiled(method.step, 3)
    busy = sum(seconds for seconds, _ in kernels.values())
    slowest = sorted(kernels, key=lambda name: -kernels[name][0])[:40]
    return {
        "wall_ms": wall / 3 * 1000,
        "busy_share": busy / wall,
        "launches": sum(count for _, count in kernels.values()) / 3,
        "kernels_ms_calls": {
            name[:90]: [kernels[name][0] / 3 * 1000, kernels[name][1] / 3] for name in slowest
        },
    }


def data() -> dict[str, Any]:
    """JPEG files to finished steps by `train.py`, and to the loader's batches alone."""
    root, workers = _photos(), min(16, os.cpu_count() or 1)
    images = ["data=folder", f"data.root={root}", "data.use_labels=false"]
    images += [f"data.num_workers={0 if SMALL else workers}", "data.hold_out=0.01"]
    size = [*_recipe("msn_vits16"), f"data.global_batch_size={8 if SMALL else 128}", *images]
    module = _datamodule(size)
    start, seen = time.perf_counter(), 0  # from the start of the workers on
    for batch in module.train_dataloader():
        seen += len(batch.indices)
    loader = seen / (time.perf_counter() - start)
    with tempfile.TemporaryDirectory() as directory:
        done = _run(sys.executable, "train.py", *size, f"run.dir={directory}/run",
                    "trainer.max_epochs=4", "method.warmup_epochs=1", "report=false",
                    "callbacks.probe.every_n_epochs=null", "trainer.log_every_n_steps=5",
                    "baselines=[]")  # fmt: skip
        rows = _column(Path(directory, "run", "metrics.csv"), "speed/images_per_s")
        waits = _column(Path(directory, "run", "metrics.csv"), "speed/data_wait")
    return {
        "workers": workers,
        "loader_images_per_s": loader,
        "training_images_per_s": statistics.median(rows[len(rows) // 2 :]) if rows else None,
        "data_wait": statistics.median(waits[len(waits) // 2 :]) if waits else None,
        "last_lines": done.stdout.splitlines()[-3:] + done.stderr.splitlines()[-3:],
    }


def features() -> dict[str, Any]:
    """Evaluation features of S/16: images/s of the forward pass alone, in both precisions."""
    from msn.evaluation.features import forward_feature
    from msn.method.vit import VisionTransformer

    model = to_plain(compose("train", _recipe("msn_vits16")))["model"]
    trunk = VisionTransformer(**model).to(DEVICE).eval()
    images = torch.randn(8 if SMALL else 256, 3, model["img_size"], model["img_size"])
    images, found = images.to(DEVICE), {}
    for name, half in {"32": False, "bf16": True}.items():
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=half):
            seconds = _median(lambda: forward_feature(trunk, images, "class_token"), 10)
        found[f"{name}_images_per_s"] = len(images) / seconds
    return found


def digits() -> dict[str, Any]:
    """The default run with its low-shot table."""
    return _trained(["trainer.max_epochs=2"] if SMALL else [])


def small_images() -> dict[str, Any]:
    """The recipe small_images on the folder of --images."""
    if IMAGES is None:
        return {"left_out": "no --images"}
    small = TINY[1:] + ["trainer.max_epochs=1"] if SMALL else []
    return _trained(
        ["experiment=small_images", "data=folder", f"data.root={Path(IMAGES).resolve()}", *small]
    )


def _trained(overrides: list[str]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as directory:
        start = time.perf_counter()
        done = _run(sys.executable, "train.py", f"run.dir={directory}/run", *overrides)
        seconds = time.perf_counter() - start
        table = Path(directory, "run", "lowshot.md")
        rate = _column(Path(directory, "run", "metrics.csv"), "speed/images_per_s")
        return {
            "exit": done.returncode,
            "s": seconds,
            "images_per_s": statistics.median(rate) if rate else None,
            "table": table.read_text() if table.is_file() else None,
            "last_lines": done.stdout.splitlines()[-8:] + done.stderr.splitlines()[-8:],
        }


# Seconds that a part may take, in the order in which they run.
PARTS: dict[str, tuple[Callable[[], dict[str, Any]], int]] = {
    "machine": (machine, 60),
    "verify": (verify, 60),
    "step_s16": (step("s16"), 120),
    "trace": (trace, 90),
    "views": (views, 60),
    "digits": (digits, 120),
    "tests": (tests, 150),
    "equal": (equal, 60),
    "step_b16": (step("b16"), 100),
    "step_l16": (step("l16"), 100),
    "step_s16_64": (step("s16_64"), 100),
    "step_b16_1024": (step("b16_1024"), 120),
    "step_l7": (step("l7"), 100),
    "features": (features, 60),
    "data": (data, 120),
    "small_images": (small_images, 150),
}


def _case(experiment: str, batch: int, chunk: int | None = None) -> Case:
    batch, chunk = (8, chunk and 4) if SMALL else (batch, chunk)
    overrides = ["what=step", f"batch_size={batch}", *_recipe(experiment)]
    if chunk is not None:
        overrides.append(f"chunk_size={chunk}")
    return case_of(to_plain(compose("bench", overrides)))


def _recipe(experiment: str) -> list[str]:
    return TINY if SMALL else [f"experiment={experiment}"]


def _forecast(case: Case) -> float:
    from msn.training.module import MSNModule

    with torch.device("meta"):
        module = MSNModule(
            model=case.model, method=case.method, seed=0, chunk_size=None, compile=False,
        )  # fmt: skip
    return forecast(module, case).peak


def _median(run: Callable[[], object], times: int) -> float:
    """Seconds of one run: the median of five rounds, each waited for at its end."""
    run()
    synchronise(DEVICE)
    times, seconds = 1 if SMALL else times, []
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(times):
            run()
        synchronise(DEVICE)
        seconds.append((time.perf_counter() - start) / times)
    return statistics.median(seconds)


def _profiled(run: Callable[[], object], times: int) -> tuple[dict[str, tuple[float, int]], float]:
    """Seconds and calls of every kernel, and the wall time without the profiler."""
    synchronise(DEVICE)
    start = time.perf_counter()
    for _ in range(times):
        run()
    synchronise(DEVICE)
    wall = time.perf_counter() - start
    activity = ProfilerActivity.CUDA if DEVICE.type == "cuda" else ProfilerActivity.CPU
    with profile(activities=[activity]) as profiler:
        for _ in range(times):
            run()
        synchronise(DEVICE)
    kernels = {}
    for event in profiler.key_averages():
        device_us = event.self_device_time_total or event.self_cpu_time_total * (
            DEVICE.type == "cpu"
        )
        if device_us:
            kernels[event.key] = (device_us / 1e6, event.count)
    return kernels, wall


def _photos() -> Path:
    """Files of 500 x 375 px cut from scikit-learn's two photographs, made once."""
    root = Path(tempfile.gettempdir(), f"gpu_day_photos_{os.getuid()}_{int(SMALL)}")
    if not (root / "done").is_file():
        (root / "images").mkdir(parents=True, exist_ok=True)
        with ProcessPoolExecutor() as pool:
            list(pool.map(_photo, [root / "images"] * _number(), range(_number())))
        (root / "done").touch()
    return root / "images"


def _number() -> int:
    return 32 if SMALL else 4096


def _photo(root: Path, i: int) -> None:
    import sklearn

    folder = Path(sklearn.__file__).parent / "datasets" / "images"
    with Image.open(folder / ("china.jpg", "flower.jpg")[i % 2]) as image:
        draw = np.random.default_rng(i)
        left, top = int(draw.integers(0, 140)), int(draw.integers(0, 52))
        image.crop((left, top, left + 500, top + 375)).save(root / f"{i}.jpg", quality=90)


def _datamodule(overrides: list[str]) -> Any:
    from hydra.utils import instantiate

    config = compose("train", overrides)
    module = instantiate(config.data)
    module.setup("fit")
    return module


def _column(path: Path, name: str) -> list[float]:
    import csv

    if not path.is_file():
        return []
    with path.open() as file:
        return [float(row[name]) for row in csv.DictReader(file) if row.get(name)]


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def main() -> None:
    """Run the parts that have no result yet, each in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="gpu_day")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--images")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # the part that this process runs
    options = parser.parse_args()
    global SMALL, IMAGES
    SMALL, IMAGES = options.small, options.images
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    if options.one:
        _write(out / f"{options.one}.json", PARTS[options.one][0]())
        return
    unknown = [part for part in options.parts.split(",") if part not in PARTS]
    if unknown:
        sys.exit(f"--parts: no part {', '.join(unknown)}; there are {', '.join(PARTS)}")
    for part in options.parts.split(","):
        if not (out / f"{part}.json").is_file():
            start = time.perf_counter()
            failure = _one(part)
            print(f"{part}: {failure or 'done'}, {time.perf_counter() - start:.0f} s", flush=True)
        (out / "gpu_day.md").write_text(markdown(out))


def _one(part: str) -> str | None:
    """Run a part; what went wrong, or None."""
    command = [sys.executable, __file__, *sys.argv[1:], "--one", part]
    limit = PARTS[part][1] * (10 if SMALL else 1)  # a machine without a GPU may be a slow one
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=False)
    except subprocess.TimeoutExpired:
        return f"not done within {limit} s"
    if done.returncode:
        return f"exit {done.returncode}: {done.stderr.strip()[-1500:]}"
    return None


def _write(path: Path, result: dict[str, Any]) -> None:
    path.with_suffix(".part").write_text(json.dumps(result, indent=1))
    path.with_suffix(".part").replace(path)


def markdown(out: Path) -> str:
    """All results so far: a table of the steps, then every part's figures."""
    results = {p: json.loads((out / f"{p}.json").read_text()) for p in PARTS
               if (out / f"{p}.json").is_file()}  # fmt: skip
    lines = ["# A day on a GPU", "", "| step | images | chunk | ms | account, ms | images/s | "
             "of 989 TFLOP/s | peak GiB | forecast GiB | first step, s |",
             "|---|---|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for part, row in results.items():
        if part.startswith("step_"):
            lines.append(
                f"| {part[5:]} | {row['batch']} | {row['chunk_size'] or ''} | {row['ms']:.1f} | "
                f"{row['predicted_ms'] or ''} | {row['images_per_s']:.0f} | "
                f"{row['mfu_of_989']:.1%} | {row['peak_gib']:.2f} | {row['forecast_gib']:.2f} | "
                f"{row['first_step_s']:.0f} |"
            )
    for part, result in results.items():
        lines += ["", f"## {part}", "", "```json", json.dumps(result, indent=1), "```"]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
