"""Tables of docs/scaling.md: bytes and time of each collective on paper, from the formulas alone.

python benchmarks/scaling.py
"""

import math
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.traffic import Collective, step_traffic
from msn.commands.entry import compose, to_plain
from msn.training.cost import flops_per_image

MODELS = {
    "S/16": "msn_vits16",
    "B/16": "msn_vitb16",
    "B/8": "msn_vitb8",
    "B/4": "msn_vitb4",
    "L/16": "msn_vitl16",
    "L/7": "msn_vitl7",
}
GPUS = (8, 16, 32, 64, 128, 256, 512)
GPUS_A_NODE = 8
# Operations/s of an H100 in bf16: shares of its 989 TFLOP/s. S/16 and B/16 measured (gpu.md), the
# rest estimated from them.
RATES = {name: share * 989e12 for name, share in {"S": 0.217, "B": 0.356, "L": 0.38}.items()}
INSIDE, BETWEEN = 450e9, 50e9  # bytes/s of a GPU and direction: NVLink; one 400 Gb/s NIC a GPU
LATENCY_INSIDE, LATENCY_BETWEEN = 20e-6, 10e-6  # s a call; and for each doubling of the nodes


def settings_of(experiment: str) -> dict[str, Any]:
    """The resolved configuration of a preset."""
    return to_plain(compose("train", [f"experiment={experiment}", "data.root=unused"]))


def traffic(settings: dict[str, Any], processes: int) -> list[Collective]:
    """Collectives of a preset's step."""
    method, views = settings["method"], settings["data"]["views"]
    return step_traffic(
        model=settings["model"],
        head=method["head"],
        num_prototypes=method["num_prototypes"],
        use_sinkhorn=method["use_sinkhorn"],
        sinkhorn_iterations=method["sinkhorn_iterations"],
        view_groups=1 + (views["focal_views"] > 0),
        processes=processes,
        element_size=4,
    )


def seconds(collective: Collective, processes: int) -> float:
    """Time of a collective's calls: rings inside nodes, then between them, and latencies."""
    nodes = max(1, processes // GPUS_A_NODE)
    inside, between = (GPUS_A_NODE - 1) / GPUS_A_NODE, (nodes - 1) / nodes
    ways = 2 if collective.kind == "all-reduce" else 1
    size = collective.payload * (processes if collective.kind == "all-gather" else 1)
    wire = ways * size * (inside / INSIDE + between / GPUS_A_NODE / BETWEEN)
    return wire + collective.calls * (LATENCY_INSIDE + LATENCY_BETWEEN * math.log2(nodes))


def step(settings: dict[str, Any], processes: int, rate: float) -> tuple[float, float, float]:
    """Seconds of computing, of gradients that the backward pass does not hide, of the rest."""
    views, method = settings["data"]["views"], settings["method"]
    focal = views["focal_size"] or settings["model"]["patch_size"] * round(
        views["rand_size"] * 3 / 7 / settings["model"]["patch_size"]
    )
    flops = flops_per_image(
        model=settings["model"],
        head=method["head"],
        num_prototypes=method["num_prototypes"],
        patch_drop=method["patch_drop"],
        rand_views=views["rand_views"],
        focal_views=views["focal_views"],
        rand_size=views["rand_size"],
        focal_size=focal,
    )
    images = settings["data"]["global_batch_size"] / processes
    computing = images * flops.total / rate
    backward = images * (flops.rand + flops.focal) * 2 / 3 / rate
    gradients, *rest = traffic(settings, processes)
    shown = max(0.0, seconds(gradients, processes) - backward)
    return computing, shown, sum(seconds(part, processes) for part in rest)


def main() -> None:
    """Print the tables as Markdown."""
    presets = {name: settings_of(experiment) for name, experiment in MODELS.items()}
    print("| collective | calls | " + " | ".join(f"{name}, bytes" for name in presets) + " |")
    print("|---" * (2 + len(presets)) + "|")
    for i, part in enumerate(traffic(presets["S/16"], 8)):
        sizes = " | ".join(f"{traffic(p, 8)[i].payload:,}" for p in presets.values())
        print(f"| {part.name} ({part.kind}) | {part.calls} | {sizes} |")
    print("\n| ms | " + " | ".join(f"{n} GPUs" for n in GPUS) + " |")
    print("|---" * (1 + len(GPUS)) + "|")
    rows = {f"gradients, {name}": (preset, 0) for name, preset in presets.items()}
    for i, part in enumerate(traffic(presets["S/16"], 8)[1:], start=1):
        rows[f"{part.name}, all models"] = (presets["S/16"], i)
    for label, (preset, i) in rows.items():
        times = (seconds(traffic(preset, n)[i], n) * 1e3 for n in GPUS)
        print(f"| {label} | " + " | ".join(f"{t:.2f}" for t in times) + " |")
    print("\n| ms per step | " + " | ".join(f"{n} GPUs" for n in GPUS) + " |")
    print("|---" * (1 + len(GPUS)) + "|")
    for name, preset in presets.items():
        cells = []
        for n in GPUS:
            computing, shown, rest = step(preset, n, RATES[name[0]])
            total = computing + shown + rest
            cells.append(f"{total * 1e3:.1f} ({computing / total:.0%})")
        print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
