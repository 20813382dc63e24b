"""Extraction of features on the fake CUDA device: its types, and one wait per batch."""

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
        ("last_2", "bf16", torch.bfloat16),
    ],
)
def test_features_leave_the_device_once_per_batch(gpu, feature, precision, dtype):
    from tests.cuda.fake_cuda import CUDA

    gpu.strict = False
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
    waits = [wait.split(" of ")[0] for wait in gpu.waits[weights:]]
    assert waits == ["blocking copy cuda -> cpu"] * 3
