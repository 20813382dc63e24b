"""Extraction of features on the fake CUDA device: its types, and copies that nothing waits for."""

import numpy as np
import pytest
import torch
from PIL import Image

from msn.evaluation.features import FeatureSettings, Runtime, extract_features
from msn.method.vit import VisionTransformer
from tests.cuda.conftest import case


class Gray:
    """Images as `LabelledSet` gives them."""

    names = [str(i) for i in range(20)]

    def __len__(self):
        return len(self.names)

    def __getitem__(self, i):
        return Image.new("RGB", (224, 224))


def as_tensor(image):
    return torch.from_numpy(np.array(image, np.float32)).permute(2, 0, 1)


@pytest.mark.parametrize(
    ("feature", "precision", "dtype"),
    [
        ("class_token", "32", torch.float32),
        ("patch_mean", "bf16", torch.bfloat16),
        ("last_2", "tf32", torch.float32),
    ],
)
def test_features_travel_while_the_next_batch_is_computed(
    gpu, monkeypatch, feature, precision, dtype
):
    from tests.cuda.fake_cuda import CUDA, _Event

    gpu.strict, events = False, []

    class Event(_Event):
        def record(self, stream):
            events.append(("recorded", torch.get_float32_matmul_precision()))

        def synchronize(self):
            events.append("awaited")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    trunk = VisionTransformer(**case().model)
    found = extract_features(
        trunk,
        Gray(),
        transform=as_tensor,
        settings=FeatureSettings(
            feature=feature, image_size=None, batch_size=8, precision=precision
        ),
        runtime=Runtime(devices=(CUDA,)),
        preprocessing={},
        title="",
    )
    assert found.rows.dtype == torch.float32
    assert found.rows.shape == (20, 384 * (2 if feature == "last_2" else 1))
    assert {launch.dtype for launch in gpu.launches if launch.name == "addmm"} == {dtype}
    weights = len(list(trunk.parameters()))  # come to the device one by one, before all batches
    assert gpu.waits[weights:] == []
    sent = ("recorded", "high" if precision == "tf32" else "highest")
    assert events == [sent, sent, "awaited", sent, "awaited", "awaited"]
    assert torch.get_float32_matmul_precision() == "highest"
