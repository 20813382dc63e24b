"""Which patches are kept: how many, how often each, and independent of the number of processes."""

import pytest
import torch

from msn.errors import UserError
from msn.method.masking import PatchDrop, num_kept_patches


def draw(patch_drop, scope, *, images=range(8), size=8, key=0, patches=16, rand_views=1):
    return PatchDrop(patch_drop=patch_drop, patch_drop_scope=scope).draw(
        patches, rand_views=rand_views, images=images, global_batch_size=size, key=key
    )


@pytest.mark.parametrize(
    ("patches", "patch_drop", "kept"),
    [(196, 0.15, 166), (196, 0.3, 137), (784, 0.3, 548), (3136, 0.7, 940), (1024, 0.7, 307)],
)
def test_number_of_kept_patches_is_the_paper_s(patches, patch_drop, kept):
    assert num_kept_patches(patches, patch_drop) == kept


@pytest.mark.parametrize("scope", ["batch", "image"])
def test_every_patch_is_kept_equally_often(scope):
    counts = torch.zeros(16)
    draws = 0
    for key in range(2000 if scope == "batch" else 250):
        kept = draw(0.25, scope, key=key)
        assert kept.sort(-1).values.diff(dim=-1).min() > 0  # distinct
        counts += torch.bincount(kept.flatten(), minlength=16)
        draws += kept.numel() // 12
    share = counts / draws
    assert share.mean().item() == pytest.approx(0.75)
    # five standard deviations of a share of 2,000 draws
    assert (share - 0.75).abs().max() < 5 * (0.75 * 0.25 / draws) ** 0.5


def test_scope_batch_shares_one_draw_and_scope_image_does_not():
    assert draw(0.25, "batch").shape == (12,)
    per_image = draw(0.25, "image", rand_views=2).flatten(0, 1)
    assert len({tuple(sorted(row.tolist())) for row in per_image}) > 10


@pytest.mark.parametrize("scope", ["batch", "image"])
def test_draws_do_not_depend_on_the_number_of_processes(scope):
    whole = draw(0.25, scope)
    parts = [draw(0.25, scope, images=r) for r in (range(4), range(4, 8))]
    if scope == "batch":
        assert torch.equal(parts[0], whole)
        assert torch.equal(parts[1], whole)
    else:
        assert torch.equal(torch.cat(parts, dim=1), whole)


def test_draws_repeat_with_the_key_and_differ_without():
    assert torch.equal(draw(0.25, "batch", key=3), draw(0.25, "batch", key=3))
    assert not torch.equal(draw(0.25, "batch", key=3), draw(0.25, "batch", key=4))


def test_nothing_dropped_is_none():
    assert draw(0.0, "batch") is None


@pytest.mark.parametrize("wrong", [1.0, -0.1, 0.99])
def test_shares_that_leave_nothing_are_refused(wrong):
    with pytest.raises(UserError, match="patch_drop"):
        draw(wrong, "batch")
    with pytest.raises(UserError, match="scope"):
        draw(0.5, "pixel")
