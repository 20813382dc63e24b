"""What a compiled training step asks of an H100, counted on a CUDA device that is not there.

    python benchmarks/account.py [--cases s16,b16,l16] [--kernels 20]

Bytes, operations and launches of every kernel of a step (tests/cuda says how), and the time that
they take if each runs at the larger of operations / rate and bytes / bandwidth: with the rates of
the data sheet, with 75 % and 85 % of them, and then with 2.5 us per kernel at least. Views are made
already. It cannot show what a kernel really reaches; benchmarks/gpu.md compares.
"""

import argparse
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from msn.commands.entry import compose, to_plain
from msn.commands.step import TrainingStep, case_of, step_flops
from tests.cuda.fake_cuda import FakeCuda, Launch, build_guard
from tests.cuda.fake_triton import fake_inductor

# Operations/s by type and bytes/s of an H100 SXM (data sheet).
RATES = {torch.bfloat16: 989e12, torch.float32: 67e12, torch.float64: 67e12}
BANDWIDTH = 3.35e12
LEAST = 2.5e-6  # s, from the start of a kernel to that of the next
# Experiment, images, chunk_size.
# Names that end in "_stream" are taken with method.bf16_stream=true.
CASES: dict[str, tuple[str, int, int | None]] = {
    "s16": ("msn_vits16", 128, None),
    "s16_64": ("msn_vits16", 64, None),
    "b16": ("msn_vitb16", 128, None),
    "b16_chunks": ("msn_vitb16", 128, 32),
    "l16": ("msn_vitl16", 64, None),
    "l7": ("msn_vitl7", 16, None),
}


def seconds(
    launches: Sequence[Launch], rate: float = 1.0, bandwidth: float = 1.0, least: float = 0.0
) -> float:
    """Time of all kernels at these shares of the data sheet's figures."""
    return sum(_one(launch, rate, bandwidth, least) for launch in launches)


def _one(launch: Launch, rate: float, bandwidth: float, least: float) -> float:
    computing = launch.operations / (RATES.get(launch.dtype, 67e12) * rate)
    return max(computing, launch.moved / (BANDWIDTH * bandwidth), least)


def step_launches(name: str) -> tuple[list[Launch], float, float]:
    """Kernels of the second step of a case, its nominal operations and its peak in bytes."""
    experiment, batch, chunk = CASES[name.removesuffix("_stream")]
    settings = to_plain(compose("bench", ["what=step", f"experiment={experiment}"]))
    settings["method"]["bf16_stream"] = name.endswith("_stream")
    torch._dynamo.reset()
    with FakeCuda() as gpu, fake_inductor(gpu):
        gpu.strict = False
        case = case_of(settings)._replace(batch_size=batch, chunk_size=chunk)
        method = TrainingStep(case)
        method.step()
        gpu.reset()
        method.step()
        return gpu.launches, step_flops(case).total, gpu.peak


def main() -> None:
    """Print the table as Markdown, and the kernels that take most."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", default="s16,b16,l16")
    parser.add_argument("--kernels", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        build_guard(Path(folder))
    print("| case | images | launches | TFLOP done / nominal | GB | ms ideal (products) | of 989 "
          "TFLOP/s | ms at 75 / 85 % | with 2.5 us a kernel | peak GiB |")  # fmt: skip
    print("|---" * 10 + "|")
    for name in options.cases.split(","):
        launches, nominal, peak = step_launches(name)
        ideal = seconds(launches)
        products = seconds([launch for launch in launches if launch.operations])
        print(
            f"| {name} | {CASES[name.removesuffix('_stream')][1]} | {len(launches):,} | "
            f"{sum(launch.operations for launch in launches) / 1e12:.1f} / {nominal / 1e12:.1f} | "
            f"{sum(launch.moved for launch in launches) / 1e9:.1f} | {ideal * 1e3:.2f} "
            f"({products * 1e3:.2f}) | {nominal / ideal / 989e12:.1%} | "
            f"{seconds(launches, 0.75, 0.85) * 1e3:.1f} | "
            f"{seconds(launches, 0.75, 0.85, LEAST) * 1e3:.1f} | {peak / 2**30:.2f} |",
            flush=True,
        )
        time: Counter[str] = Counter()
        for launch in launches:
            time[launch.name] += seconds([launch])
        for kernel, spent in time.most_common(options.kernels):
            own = [launch for launch in launches if launch.name == kernel]
            moved = sum(launch.moved for launch in own) / 1e9
            print(f"    {spent * 1e3:7.3f} ms {moved:7.2f} GB {len(own):4d} x {kernel}")


if __name__ == "__main__":
    main()
