import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from msn.errors import UserError
from msn.weights import build_trunk, load_backbone, read_weights
from msn.weights.classifier import Classifier, fold, read_classifier
from msn.weights.export import export
from msn.weights.tensors import save_tensors
from tests.weights.conftest import assert_same, make_weights

CLASSES = [str(digit) for digit in range(10)]


def head_file(path, weight, bias=None, **changes):
    header = {"classes": CLASSES, "feature": "class_token", "centred": True, "normalised": True}
    tensors = {"weight": weight} | ({} if bias is None else {"bias": bias})
    save_tensors(path, tensors, {"msn": json.dumps(header | changes)})
    return path


def test_digits_head_predicts_the_same_through_auto_model_for_image_classification(tmp_path):
    transformers = pytest.importorskip("transformers")
    weights = make_weights("patch7")
    digits = load_digits()
    pictures = [Image.fromarray((16 * d).clip(0, 255).astype("uint8")) for d in digits.images[:400]]
    save = tmp_path / "plain"
    settings = {"image_size": None, "overwrite": False, "lowshot": None}
    export(weights, format="torch", out=save, head=None, **settings)
    backbone = load_backbone(save)
    images = torch.stack([backbone.transform(picture) for picture in pictures])
    with torch.no_grad():
        tokens = backbone.forward_features(images, norm=False)[:, 0]
    rows = F.normalize(tokens - tokens.mean(dim=1, keepdim=True), dim=1)
    fit = LogisticRegression(C=100, fit_intercept=False, max_iter=500)
    fit.fit(rows[:300].numpy(), digits.target[:300])
    ours = fit.predict(rows[300:].numpy())
    best = np.sort(fit.decision_function(rows[300:].numpy()), axis=1)
    clear = best[:, -1] - best[:, -2] > 1e-2  # two libraries' rounding may turn a tie
    assert clear.sum() >= 90
    assert (ours == digits.target[300:400]).mean() > 0.2  # ten classes; a random trunk
    path = head_file(tmp_path / "head.safetensors", torch.tensor(fit.coef_).float())
    head = read_classifier(path, 64)
    export(weights, format="huggingface", out=tmp_path / "hf", head=head, **settings)
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "hf")
    model = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "hf").eval()
    inputs = processor([p.convert("RGB") for p in pictures[300:]], return_tensors="pt")
    with torch.no_grad():
        theirs = model(**inputs).logits.argmax(dim=1).tolist()
    named = np.array([int(model.config.id2label[k]) for k in theirs])
    assert (named == ours)[clear].all()
    assert_same(read_weights(tmp_path / "hf").trunk, weights.trunk)


def test_the_norm_and_the_licence_survive_saving_by_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    weights = make_weights("patch7")
    head = Classifier(torch.randn(3, 64), None, ("a", "b", "c"), "class_token", True, True)
    settings = {"image_size": None, "overwrite": False, "lowshot": None}
    export(weights, format="huggingface", out=tmp_path / "hf", head=head, **settings)
    model = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "hf")
    model.save_pretrained(tmp_path / "again")
    again = read_weights(tmp_path / "again")
    assert_same(again.trunk, weights.trunk)
    assert again.meta["licence"] == "Apache-2.0"
    with torch.no_grad():  # who trains on means the norm as it is then
        model.vit.layernorm.weight.mul_(1.5)
    model.save_pretrained(tmp_path / "trained")
    found = read_weights(tmp_path / "trained").trunk
    assert torch.equal(found["norm.weight"], torch.full((64,), 1.5))
    assert torch.equal(found["norm.bias"], torch.zeros(64))


def test_folding_an_unnormalised_head_after_the_norm_keeps_norm_and_intercept():
    torch.manual_seed(0)
    trunk = build_trunk(make_weights())
    tokens, weight, bias = torch.randn(5, 32), torch.randn(3, 32), torch.randn(3)
    for centred in (False, True):
        head = Classifier(weight, bias, ("a", "b", "c"), "class_token_norm", centred, False)
        folded = fold(head, trunk.norm.weight, trunk.norm.bias)
        rows = trunk.norm(tokens)
        seen = rows - rows.mean(dim=1, keepdim=True) if centred else rows
        normed = F.layer_norm(tokens, (32,), folded.norm_weight, folded.norm_bias, 1e-6)
        torch.testing.assert_close(
            F.linear(normed, folded.weight, folded.bias), F.linear(seen, weight, bias)
        )


@pytest.mark.parametrize(
    ("changes", "bias", "reason"),
    [
        ({"feature": "patch_mean"}, None, "mean of the patches"),
        ({"feature": "class_token_norm"}, None, "nothing divides by it"),
        ({"centred": False}, None, "not both row-centred and normalised"),
        ({}, torch.ones(10), "has an intercept"),
        ({"feature": "last_2"}, None, "several blocks"),
        ({"feature": "pixels"}, None, "feature is 'pixels'"),
    ],
)
def test_a_head_that_cannot_be_folded_is_refused_with_the_reason(changes, bias, reason, tmp_path):
    path = head_file(tmp_path / "head.safetensors", torch.randn(10, 32), bias, **changes)
    with pytest.raises(UserError, match=reason):
        fold(read_classifier(path, 32), torch.ones(32), torch.zeros(32))


def test_a_head_of_another_width_and_a_file_that_is_no_head_are_refused(weights, tmp_path):
    path = head_file(tmp_path / "head.safetensors", torch.randn(10, 31))
    with pytest.raises(UserError, match=r"weight is \[10, 31\], this backbone needs \[10, 32\]"):
        read_classifier(path, 32)
    save_tensors(tmp_path / "net.safetensors", weights.trunk, {})
    with pytest.raises(UserError, match="not a head of the low-shot evaluation"):
        read_classifier(tmp_path / "net.safetensors", 32)


def test_a_head_that_is_not_finite_is_refused(tmp_path):
    header = {"classes": ["a", "b"], "feature": "class_token", "centred": 1, "normalised": 1}
    weight = torch.full((2, 4), float("nan"))
    save_tensors(tmp_path / "a.safetensors", {"weight": weight}, {"msn": json.dumps(header)})
    with pytest.raises(UserError, match="weight holds NaN"):
        read_classifier(tmp_path / "a.safetensors", 4)
    save_tensors(tmp_path / "a.safetensors", {"weight": weight}, {"msn": "[" * 200_000})
    with pytest.raises(UserError, match="not a head"):
        read_classifier(tmp_path / "a.safetensors", 4)
