"""`python -m msn verify`: compare training steps on this machine with reference figures."""

import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

import msn
from msn.commands.entry import to_plain
from msn.errors import UserError
from msn.files import utf8_path
from msn.method import optim
from msn.method.loss import LossTerms, MSNLoss, sinkhorn
from msn.method.mae import MAE
from msn.method.network import MSN, Projections
from msn.method.schedules import MAESchedule, Schedule, ScheduleValues

SHIPPED = ("default", "mae")
RTOL, ATOL = 1e-8, 1e-10
# For parameters whose true gradient is zero: Adam amplifies the rounding noise of the gradient.
ATOL_ZERO_GRADIENT = 1e-8


class Difference(NamedTuple):
    """One compared figure."""

    name: str
    max_abs: float
    """Largest absolute difference of its elements."""
    excess: float
    """Largest difference divided by its tolerance atol + rtol * |reference|; above 1 is out."""

    @property
    def ok(self) -> bool:
        """Whether it is within tolerance; NaN never is."""
        return self.excess <= 1


class Golden(NamedTuple):
    """A file of reference figures."""

    config: dict[str, Any]
    steps: list[dict[str, float]]
    tensors: dict[str, Tensor]


def load_golden(path: str | Path) -> Golden:
    """Read NAME.safetensors and NAME.json beside it.

    Raises:
        UserError: if one of them is missing, damaged or of another layout.
    """
    tensor_file = Path(path)
    json_file = tensor_file.with_suffix(".json")
    for file in (tensor_file, json_file):
        if not file.is_file():
            raise UserError(f"no such file of reference figures: {file}")
    try:
        figures = json.loads(json_file.read_text())
        with utf8_path(tensor_file) as place:
            golden = Golden(figures["config"], figures["steps"], load_file(place))
    except (
        SafetensorError,
        json.JSONDecodeError,
        KeyError,
        TypeError,
        UnicodeDecodeError,
    ) as error:
        raise UserError(f"cannot read reference figures {tensor_file}: {error}") from None
    return golden


def replay(
    golden: Golden, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float64
) -> Iterator[Difference]:
    """Train the file's network for its steps and compare every figure.

    Args:
        golden: the reference figures, which were computed in float64.
        device: where to train.
        dtype: of weights and views. Tolerances are for float64; in float32 only the size of the
            differences is meaningful.

    Raises:
        UserError: if the file lacks a figure that its layout promises.
    """
    moved = {
        name: tensor.to(device, dtype if tensor.is_floating_point() else None)
        for name, tensor in golden.tensors.items()
    }
    steps = _replay_mae if golden.config.get("kind") == "mae" else _replay
    try:
        yield from steps(golden._replace(tensors=moved), device, dtype)
    except KeyError as error:
        raise UserError(f"reference figures lack {error}") from None


def _replay(golden: Golden, device: torch.device | str, dtype: torch.dtype) -> Iterator[Difference]:
    config, tensors = golden.config, golden.tensors
    network, loss, schedule = build(config)
    network.to(device, dtype)
    load_network(network, tensors)
    optimizer = optim.build_optimizer(network, betas=(0.9, 0.999), eps=1e-8, fused=False)
    for step, figures in enumerate(golden.steps):
        values = schedule.at(step)
        out = network(*step_views(config, tensors, step), tensors[f"step{step}.kept_patches"])
        terms = loss(out.anchor, out.target, network.prototypes, values.sharpen_temperature)
        optimizer.zero_grad()
        terms.loss.backward()
        if step == 0:
            yield from _compare_gradients(network, tensors)
        norm = optim.clip_encoder(network.anchor, config["clip_grad"])
        optim.set_values(optimizer, values)
        optimizer.step()
        network.update_target(values.momentum)
        yield from _compare_step(f"step{step}", figures, tensors, (out, terms, values, norm))
    yield from _compare_final(network, tensors)
    yield from _compare_features(network, tensors)
    balanced = sinkhorn(tensors["sinkhorn.in"].log(), 3).exp()
    yield compare("sinkhorn.out", balanced, tensors["sinkhorn.out"])


def _replay_mae(
    golden: Golden, device: torch.device | str, dtype: torch.dtype
) -> Iterator[Difference]:
    config, tensors = golden.config, golden.tensors
    parts = ("model", "decoder", "mask_ratio", "norm_pix_loss")
    network = MAE(**{name: config[name] for name in parts}).to(device, dtype)
    initial = {name: value for name, value in tensors.items() if name.startswith("init.")}
    network.load_state_dict({name[len("init.") :]: value for name, value in initial.items()})
    schedule = MAESchedule(**config["schedule"])
    optimizer = optim.build_optimizer(
        network, betas=config["betas"], eps=config["eps"], fused=False
    )
    for step, figures in enumerate(golden.steps):
        name, values = f"step{step}", schedule.at(step)
        images, noise = (tensors[f"{name}.{part}"] for part in ("images", "noise"))
        out, errors = network(images, noise), network.learn(images, noise)
        optimizer.zero_grad()
        errors.loss.backward()  # training uses this one; that of `out` must be equal
        if step == 0:
            for parameter, value in network.named_parameters():
                if value.grad is not None:
                    yield compare(f"grad.{parameter}", value.grad, tensors[f"grad.{parameter}"])
        optim.set_values(optimizer, values)
        optimizer.step()
        reference = {
            key: torch.tensor(value, dtype=torch.float64) for key, value in figures.items()
        }
        yield compare(f"{name}.loss", out.loss, reference["loss"])
        yield compare(f"{name}.loss_of_errors", errors.loss, reference["loss"])
        yield compare(f"{name}.lr", torch.tensor(values.lr, dtype=torch.float64), reference["lr"])
        yield compare(f"{name}.prediction", out.prediction, tensors[f"{name}.prediction"])
        yield compare(f"{name}.mask", out.mask, tensors[f"{name}.mask"])
    for parameter, value in network.state_dict().items():
        allowed = _final_atol(parameter, value, has_batch_norm=False)
        yield compare(f"final.{parameter}", value, tensors[f"final.{parameter}"], allowed)


def build(config: dict[str, Any]) -> tuple[MSN, MSNLoss, Schedule]:
    """Network in float64, loss and schedules of a reference file's `config`."""
    trunk = ("img_size", "patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio")
    network = MSN(
        model={name: config[name] for name in trunk},
        head={
            "hidden_dim": config["hidden_dim"],
            "output_dim": config["output_dim"],
            "use_batch_norm": config["use_bn"],
        },
        num_prototypes=config["num_prototypes"],
    ).double()
    loss = MSNLoss(
        temperature=config["temperature"],
        me_max_weight=config["memax_weight"],
        entropy_weight=config["ent_weight"],
        use_sinkhorn=config["use_sinkhorn"],
        sinkhorn_iterations=3,
    )
    schedule = Schedule(
        start_lr=config["start_lr"],
        lr=config["lr"],
        final_lr=config["final_lr"],
        warmup_epochs=config["warmup_epochs"],
        weight_decay=config["weight_decay"],
        final_weight_decay=config["final_weight_decay"],
        momentum=config["ema_start"],
        final_momentum=config["ema_end"],
        sharpen_temperature=config["sharpen"],
        final_sharpen_temperature=config["sharpen"],
        schedule_stretch=config["ipe_scale"],
        epochs=config["epochs"],
        steps_per_epoch=config["steps_per_epoch"],
    )
    return network, loss, schedule


def load_network(network: MSN, tensors: dict[str, Tensor]) -> None:
    """Put a reference file's initial weights into a network."""
    network.anchor.load_state_dict(encoder_state(tensors, "anchor.init."))
    network.target.load_state_dict(encoder_state(tensors, "target.init."))
    with torch.no_grad():
        network.prototypes.copy_(tensors["prototypes.init"])


def encoder_state(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Entries of the file below a prefix, under the names of `msn.method.network.Encoder`."""
    state = {}
    for name, value in tensors.items():
        if name.startswith(prefix):
            name = name.removeprefix(prefix)
            is_head = name.startswith("fc.")
            state[f"head.{name[3:]}" if is_head else f"trunk.{name}"] = value
    return state


def step_views(
    config: dict[str, Any], tensors: dict[str, Tensor], step: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Target [B, 3, S, S], rand [R, B, 3, S, S] and focal [F, B, 3, s, s] views of a step."""
    target = tensors[f"step{step}.view0"]
    num_rand, num_focal = config["rand_views"], config["focal_views"]
    views = [tensors[f"step{step}.view{1 + i}"] for i in range(num_rand + num_focal)]
    rand = torch.stack(views[:num_rand]) if num_rand else target.new_empty(0)
    focal = torch.stack(views[num_rand:]) if num_focal else target.new_empty(0)
    return target, rand, focal


def compare(name: str, ours: Tensor, reference: Tensor, atol: float | Tensor = ATOL) -> Difference:
    """Difference of one figure, relative to its tolerance."""
    if ours.shape != reference.shape:
        shapes = f"{list(ours.shape)} against {list(reference.shape)}"
        raise UserError(f"reference figure {name} has another shape: {shapes}")
    reference = reference.double().cpu()
    gap = (ours.detach().double().cpu() - reference).abs()
    excess = gap / (atol + RTOL * reference.abs())
    return Difference(name, gap.max().item(), excess.max().item())


def _compare_gradients(network: MSN, tensors: dict[str, Tensor]) -> Iterator[Difference]:
    reference = encoder_state(tensors, "anchor.grad.")
    for name, parameter in network.anchor.named_parameters():
        assert parameter.grad is not None
        yield compare(f"anchor.grad.{name}", parameter.grad, reference[name])
    assert network.prototypes.grad is not None
    yield compare("prototypes.grad", network.prototypes.grad, tensors["prototypes.grad"])


def _compare_step(
    name: str,
    figures: dict[str, float],
    tensors: dict[str, Tensor],
    ours: tuple[Projections, LossTerms, ScheduleValues, Tensor],
) -> Iterator[Difference]:
    out, terms, values, norm = ours
    num_views = out.anchor.shape[0]
    yield compare(f"{name}.anchor_out", out.anchor.flatten(0, 1), tensors[f"{name}.anchor_out"])
    yield compare(f"{name}.target_out", out.target, tensors[f"{name}.target_out"])
    yield compare(f"{name}.targets", terms.targets.repeat(num_views, 1), tensors[f"{name}.targets"])
    scalars = {
        "loss": terms.loss,
        "ce": terms.cross_entropy,
        "memax": terms.me_max,
        # Files made without the entropy term hold 0 there.
        "ent": terms.entropy if figures["ent"] else torch.tensor(0.0),
        "lr": torch.tensor(values.lr, dtype=torch.float64),
        "wd": torch.tensor(values.weight_decay, dtype=torch.float64),
        "ema": torch.tensor(values.momentum, dtype=torch.float64),
        "grad_norm": norm,
        "used_targets": terms.targets.argmax(dim=-1).unique().numel(),
        "mean_max_target": terms.targets.max(dim=-1).values.mean(),
    }
    for key, value in scalars.items():
        reference = torch.tensor(figures[key], dtype=torch.float64)
        yield compare(f"{name}.{key}", torch.as_tensor(value), reference)


def _compare_final(network: MSN, tensors: dict[str, Tensor]) -> Iterator[Difference]:
    for prefix, encoder in {"anchor": network.anchor, "target": network.target}.items():
        reference = encoder_state(tensors, f"{prefix}.final.")
        has_norm = "head.bn1.weight" in reference
        for name, value in encoder.state_dict().items():
            yield compare(
                f"{prefix}.final.{name}", value, reference[name], _final_atol(name, value, has_norm)
            )
    yield compare("prototypes.final", network.prototypes, tensors["prototypes.final"])


def _final_atol(name: str, value: Tensor, has_batch_norm: bool) -> Tensor:
    """Wider for biases that BatchNorm or the softmax over keys cancels, and for running means."""
    atol = torch.full(value.shape, ATOL, dtype=torch.float64)
    if name.endswith("attn.qkv.bias"):
        atol.view(3, -1)[1] = ATOL_ZERO_GRADIENT  # queries, keys, values
    cancelled = ("trunk.norm.bias", "head.fc1.bias", "head.fc2.bias", "running_mean")
    if has_batch_norm and name.endswith(cancelled):
        atol.fill_(ATOL_ZERO_GRADIENT)
    return atol


def _compare_features(network: MSN, tensors: dict[str, Tensor]) -> Iterator[Difference]:
    trunk = network.target.trunk.eval()
    with torch.no_grad():
        for name in sorted(n for n in tensors if n.startswith("features.") and n.endswith(".in")):
            for kind, norm in {"out": False, "out_norm": True}.items():
                ours = trunk.forward_features(tensors[name], norm=norm)[:, 0]
                key = f"{name.removesuffix('in')}{kind}"
                # The final norm adds its bias, whose true gradient is zero.
                yield compare(key, ours, tensors[key], ATOL_ZERO_GRADIENT if norm else ATOL)


def run(config: DictConfig) -> None:
    """Replay `golden` in float64 on the CPU; exit code 1 when a figure is out of tolerance.

    Raises:
        UserError: if the file is missing, damaged or of another layout.
    """
    settings = to_plain(config)
    golden, shipped = settings["golden"] or "default", Path(msn.__file__).parent / "golden"
    path = Path(golden)
    if golden in SHIPPED:
        path = shipped / f"golden_{golden}.safetensors"
    with torch.random.fork_rng(devices=[]):
        differences = list(replay(load_golden(path)))
    console = Console()
    console.print(_table(differences if settings["all"] else worst_of_each_kind(differences)))
    failed = [difference for difference in differences if not difference.ok]
    console.print(
        f"{len(differences)} figures of {path.name}: {len(differences) - len(failed)} within "
        f"rtol {RTOL:g}, atol {ATOL:g} ({ATOL_ZERO_GRADIENT:g} where the true gradient is zero), "
        f"{len(failed)} out of tolerance"
    )
    if failed:
        sys.exit(1)


def worst_of_each_kind(differences: Iterable[Difference]) -> list[Difference]:
    """The worst figure of each kind, which is its name without step number and parameter."""
    worst: dict[str, Difference] = {}
    for difference in differences:
        parts = difference.name.split(".")
        kind = parts[-1] if parts[0].startswith("step") else ".".join(parts[:2])
        # NaN compares as not ok and must win.
        if kind not in worst or not difference.excess <= worst[kind].excess:
            worst[kind] = difference
    return list(worst.values())


def _table(differences: Iterable[Difference]) -> Table:
    table = Table(title="Difference to the reference, float64")
    table.add_column("figure", overflow="fold")
    table.add_column("largest |difference|", justify="right", overflow="fold", min_width=8)
    table.add_column("share of its tolerance", justify="right", overflow="fold", min_width=8)
    for difference in differences:
        mark = "[green]ok[/green]" if difference.ok else "[red]OUT[/red]"
        name = f"{mark} {difference.name}"
        table.add_row(name, f"{difference.max_abs:.2e}", f"{difference.excess:.2e}")
    return table
