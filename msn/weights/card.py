"""The model card of an export: what it is, where it comes from, and under which licence."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from msn.images.depth import levels_of, recorded_depth
from msn.method.vit import PLAIN
from msn.weights.classifier import Classifier
from msn.weights.dino import DINOV3_LICENCE
from msn.weights.hub import model_index
from msn.weights.weights import BASELINES, MAJORITY, PIXELS, PUBLISHED_LICENCE, RANDOM

# Licences that the Hub has names for; any other is `other` there, with name and link.
_HUB_LICENCES = (
    *("apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause", "openrail", "cc0-1.0", "unlicense"),
    *("cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0", "cc-by-nc-nd-4.0"),
    *("gpl-3.0", "lgpl-3.0", "agpl-3.0", "mpl-2.0"),
)
_NAMES = {
    "msn": "Masked Siamese Network, vision transformer backbone",
    "mae": "Masked autoencoder (MAE), vision transformer",
}
_LIBRARIES = {"timm": "timm", "huggingface": "transformers", "onnx": "onnx"}

_OF_DINOV3 = (
    "These weights descend from DINOv3 and stay under its own licence, the DINOv3 License "
    "(https://ai.meta.com/resources/models-and-libraries/dinov3-license/): read it before use, and "
    "hand it on with them."
)

_USE = {
    "timm": """import timm

model = timm.create_model("local-dir:DIR", pretrained=True)
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
class_tokens = model(images)  # after the final norm""",
    "huggingface": """from transformers import AutoImageProcessor, {auto}

processor = AutoImageProcessor.from_pretrained("DIR")
model = {auto}.from_pretrained("DIR", attn_implementation="sdpa")
outputs = model(**processor(images, return_tensors="pt"))""",
    "mae": """from transformers import ViTForImageClassification, ViTImageProcessor
from transformers import ViTMAEForPreTraining

processor = ViTImageProcessor.from_pretrained("DIR")
model = ViTMAEForPreTraining.from_pretrained("DIR", attn_implementation="sdpa")
outputs = model(**processor(images, return_tensors="pt"))  # loss, logits, mask; masks at random
# The encoder without the decoder, to be fine-tuned; only its classifier is new.
classifier = ViTForImageClassification.from_pretrained("DIR", num_labels=10)""",
    "torch": """import msn

backbone = msn.load_backbone("DIR")
class_tokens = backbone(backbone.transform(image)[None])  # after the final norm""",
    "official": """import msn

backbone = msn.load_backbone("DIR/msn.pth.tar")
class_tokens = backbone(backbone.transform(image)[None])  # after the final norm""",
    "onnx": """import onnxruntime

session = onnxruntime.InferenceSession("DIR/model.onnx")
(tokens,) = session.run(None, {"pixel_values": images})  # float32 [batch, 3, S, S]""",
}


def model_card(
    format: str,
    header: Mapping[str, Any],
    *,
    head: Classifier | None,
    report: Mapping[str, Any],
    lowshot: list[dict[str, Any]] | None,
) -> str:
    """README.md of an export, in Markdown with the Hub's front matter.

    Args:
        format: a key of `FORMATS`.
        header: what the weights say about themselves, with `model`, `mean` and `std`.
        head: the classifier in the export, if any.
        report: content of `parity.json`.
        lowshot: rows of lowshot.json, if any.
    """
    parts = [
        _front_matter(format, header, head, lowshot),
        f"# {_NAMES[_kind(header)]}",
        _facts(header),
        _licence(header),
        _use("mae" if "reconstruction" in report else format, head),
        _left_to_you(format, header),
        _accuracy(lowshot),
        _head_note(head),
        _parity(report),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _kind(header: Mapping[str, Any]) -> str:
    return "mae" if header.get("kind") == "mae" else "msn"


def _front_matter(
    format: str,
    header: Mapping[str, Any],
    head: Classifier | None,
    lowshot: list[dict[str, Any]] | None,
) -> str:
    task = "image-feature-extraction" if head is None else "image-classification"
    lines = ["---", *_licence_lines(str(header["licence"]), header.get("licence_link"))]
    if format in _LIBRARIES:
        lines.append(f"library_name: {_LIBRARIES[format]}")
    lines += [f"pipeline_tag: {task}", "tags:", f"- {_kind(header)}", "- vit"]
    data = header.get("data")
    measured_on = data.get("source") if isinstance(data, Mapping) else data
    lines += model_index(_kind(header), lowshot or [], _text(measured_on))
    return "\n".join([*lines, "---"])


def _licence_lines(licence: str, link: str | None) -> list[str]:
    """The Hub's entries for a licence; a relative link, which leads nowhere here, is left out."""
    slug = "-".join(re.findall(r"[a-z0-9.]+", licence.partition("(")[0].lower()))
    if slug in _HUB_LICENCES:
        return [f"license: {slug}"]
    links = [f"license_link: {link}"] if link is not None and "://" in link else []
    return ["license: other", f"license_name: {slug or 'unknown'}", *links]


def _facts(header: Mapping[str, Any]) -> str:
    model = header["model"]
    rows = {
        "architecture": f"ViT, {model['depth']} blocks of width {model['embed_dim']}, "
        f"{model['num_heads']} heads, patches of {model['patch_size']} px, "
        f"images of {model['img_size']} px"
        + "".join(f", {name} {model[name]}" for name in PLAIN if name in model),
        "data": header.get("data"),
        "method": header.get("method"),
        "epochs": header.get("epoch"),
        "started from": _start(header),
        "config digest": header.get("config_digest"),
        "normalisation": f"mean {header['mean']}, std {header['std']}",
        "licence": header["licence"],
    }
    return _table(("", ""), [(key, _text(value)) for key, value in rows.items()])


def _start(header: Mapping[str, Any]) -> Any:
    """`init` is None in a run from scratch, and missing in files of others."""
    scratch = header.get("init", "") is None
    return "random weights" if scratch else header.get("init")


def _licence(header: Mapping[str, Any]) -> str:
    if header["licence"] == DINOV3_LICENCE:
        return f"## Licence\n\n{_OF_DINOV3}"
    if header["licence"] != PUBLISHED_LICENCE:
        return f"## Licence\n\nOf the weights: {_text(header['licence'])}.{_where(header)}"
    return "## Licence\n\n" + (
        f"These weights descend from the files published with facebookresearch/{_kind(header)} and "
        "stay under their licence, CC BY-NC 4.0: no commercial use."
    )


def _where(header: Mapping[str, Any]) -> str:
    """Where the licence's text is, if the source says so."""
    link = header.get("licence_link")
    if link is None:
        return ""
    if "://" in link:
        return f" Its text: <{_text(link)}>."
    return (
        f" The source's card links to its text as `{_text(link)}`, a file beside that card, which "
        "is not copied here."
    )


def _use(format: str, head: Classifier | None) -> str:
    auto = "AutoModel" if head is None else "AutoModelForImageClassification"
    return f"## Use\n\n```python\n{_USE[format].replace('{auto}', auto)}\n```"


def _left_to_you(format: str, header: Mapping[str, Any]) -> str:
    """What training and evaluation did and the library's own preprocessing does not do."""
    depth = recorded_depth(header)
    if format in ("torch", "official"):
        return ""
    library = {"timm": "timm's transform", "huggingface": "The image processor"}
    parts = [
        f"{library.get(format, 'The network')} does not apply EXIF orientation; training and "
        "evaluation did. Call `PIL.ImageOps.exif_transpose(image)` first, then convert to RGB "
        '(`.convert("RGB")`).'
    ]
    if depth is not None:
        low, high = levels_of(depth)
        parts.append(
            "Images of more than 8 bits were reduced to 8 bits for training, with "
            f"{low} as black and {high} as white: scale yours in the same way first."
        )
    return "\n\n".join(["## Left to you", *parts])


def _accuracy(lowshot: list[dict[str, Any]] | None) -> str:
    if not lowshot:
        return ""
    rows = [
        tuple(_text(row.get(key)) for key in ("backbone", "classifier", "labels", "splits"))
        + (_percent(row),)
        for row in lowshot
    ]
    heads = ("backbone", "classifier", "labels per class", "splits", "top-1 (%)")
    below = "".join(f"\n\n{_text(line)}." for line in floors_note(lowshot))
    return f"## Low-shot accuracy\n\n{_table(heads, rows)}{below}"


_FLOORS = {RANDOM: "a random network", PIXELS: "raw pixels", MAJORITY: "the majority class"}


def floors_note(rows: Sequence[Mapping[str, Any]], floors: Sequence[str] = BASELINES) -> list[str]:
    """One line for each backbone that does not beat every baseline.

    Args:
        rows: of lowshot.json; `above` says how far a row is above each baseline. Rows of older
            files do not have it and are passed over.
        floors: the baselines that count.
    """
    found = []
    for backbone in dict.fromkeys(row["backbone"] for row in rows if row.get("above")):
        own = [row for row in rows if row["backbone"] == backbone and row.get("above")]
        parts = []
        for floor in floors:
            there = [row for row in own if floor in row["above"]]
            below = [row for row in there if row["above"][floor]["interval"][0] <= 0]
            if below:
                whole = len(there) > 1 and len(below) == len(there)
                which = "every column" if whole else _columns(below)
                parts.append(f"{_FLOORS[floor]} ({which})")
        if parts:
            uneven = any(
                one["metric"] == "balanced" for row in own for one in row["above"].values()
            )
            by = ", in balanced accuracy" if uneven else ""
            if uneven and MAJORITY in floors:
                by += " (the majority class: top-1)"
            said = " or ".join(parts)
            found.append(f"{backbone} does not beat {said} beyond the 95 % interval{by}")
    return found


def _columns(rows: Sequence[Mapping[str, Any]]) -> str:
    """Names of several columns, those of one classifier together."""
    kinds: dict[str, list[str]] = {}
    for row in rows:
        kind, _, labels = column_name(row).partition(f" {row['labels']} ")
        kinds.setdefault(f"{kind} {{}} {labels}", []).append(row["labels"])
    return ", ".join(kind.format(", ".join(labels)) for kind, labels in kinds.items())


def column_name(row: Mapping[str, Any]) -> str:
    """Classifier and labels of a row, in words."""
    labels = row["labels"]
    kind = f"{row['neighbours']}-NN" if row["classifier"] == "knn" else row["classifier"]
    kind = "label spreading" if kind == "spreading" else kind
    return f"{kind} {labels} per class" if labels.isdigit() else f"{kind} {labels} labels"


def _percent(row: Mapping[str, Any]) -> str:
    mean, std = row.get("top1_mean"), row.get("top1_std")
    if mean is None:
        return "not stated"
    if std is None or row.get("splits") == 1:  # one split has no spread
        return f"{100 * mean:.1f}"
    return f"{100 * mean:.1f} \u00b1 {100 * std:.1f}"


def _head_note(head: Classifier | None) -> str:
    if head is None or not head.normalised:
        return ""
    return (
        "## The classifier\n\nIt was fitted on row-centred, L2-normalised class tokens before the "
        "final norm. A LayerNorm without affine does the same up to a factor per image. So the "
        "final norm here has weight 1 and bias 0: predictions are those of the low-shot "
        "evaluation, but tokens after the norm are not those of the backbone's own norm (`msn` "
        "restores it on reading)."
    )


def _parity(report: Mapping[str, Any]) -> str:
    half = [
        (name, _short(values["max_abs_difference"]), _short(values["mean_abs_difference"]))
        for name, values in report["half_precision"].items()
    ]
    text = (
        f"## Parity\n\n{report['compared']}, float32 on the CPU, against "
        f"{report['checked_with']}: max |difference| {report['max_abs_difference']:.1e} "
        f"(allowed {report['tolerance']:.0e}). Details in parity.json."
    )
    if more := report.get("reconstruction"):
        text += (
            f" {more['compared'].capitalize()}: max |difference| {more['max_abs_difference']:.1e} "
            f"and {more['loss_abs_difference']:.1e}."
        )
    if not half:
        return text
    return f"{text}\n\n{_table(('half precision against float32', 'max', 'mean'), half)}"


def _short(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.1e}"


def _table(heads: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [heads, ("---",) * len(heads), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _text(value: Any) -> str:
    if value is None:
        return "not stated"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_text(entry)}" for key, entry in value.items())
    return " ".join(str(value).replace("|", "/").split())
