import numpy as np
import pytest
from PIL import Image

from msn.data.groups import hold_out_groups
from msn.data.pools import PoolSettings, build_pools
from msn.errors import UserError

SETTINGS = {
    "val_root": None,
    "hold_out": 0.2,
    "split_seed": 0,
    "use_labels": True,
    "download": False,
    "image_size": None,
}
GROUPS, PER_GROUP = 10, 6


@pytest.fixture
def photos(tmp_path):
    """Ten patients with six photographs each, of two classes; the last of each has no label."""
    lines = ["path,label,patient"]
    for patient in range(GROUPS):
        for i in range(PER_GROUP):
            label = "" if i == PER_GROUP - 1 else "ab"[(patient + i) % 2]
            name = f"p{patient}_{i}.png"
            Image.new("L", (8, 8), 20 * patient + i).save(tmp_path / name)
            lines.append(f"{name},{label},patient {patient}")
    (tmp_path / "list.csv").write_text("\n".join(lines))
    return tmp_path


def pools(root, source="list", **changes):
    return build_pools(PoolSettings(**{**SETTINGS, "source": source, "root": str(root), **changes}))


@pytest.mark.parametrize("group", ["patient", r"p(\d+)_", r"p\d+"])
@pytest.mark.parametrize("split_seed", [0, 1])
def test_no_group_is_on_both_sides(photos, group, split_seed):
    found = pools(photos / "list.csv", group=group, split_seed=split_seed)

    def patients(subset):
        return {subset.name(i).partition("_")[0] for i in range(len(subset))}

    assert not patients(found.train) & patients(found.held_out)
    assert not patients(found.labelled) & patients(found.held_out)
    assert patients(found.train) | patients(found.held_out) == {f"p{i}" for i in range(GROUPS)}
    assert len(found.held_out) == 10  # two patients, without their images that have no label
    assert len(found.train) == (GROUPS - 2) * PER_GROUP
    assert found.labelled.groups is not None
    assert len(set(found.labelled.groups.tolist())) == GROUPS - 2


def test_another_seed_holds_other_groups_out(photos):
    out = [
        set(pools(photos / "list.csv", group="patient", split_seed=s).held_out.positions.tolist())
        for s in range(3)
    ]
    assert len({frozenset(one) for one in out}) > 1


def test_folders_have_groups_in_their_paths(photos):
    for label in "ab":
        (photos / "images" / label).mkdir(parents=True)
    for i, file in enumerate(sorted(photos.glob("*.png"))):
        file.rename(photos / "images" / "ab"[i % 2] / file.name)
    found = pools(photos / "images", "folder", group=r"/(p\d)_")
    names = [{s.name(i).split("/")[1][:2] for i in range(len(s))} for s in found[1:3]]
    assert not names[0] & names[1]


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ("doctor", "is no column of .* not found in p0_0.png"),
        ("p(", "no regular expression"),
        (r"p0_(\d)", "not found in p1_0.png"),
    ],
)
def test_what_is_no_group_is_refused(photos, group, message):
    with pytest.raises(UserError, match=message):
        pools(photos / "list.csv", group=group)


def test_a_row_without_a_group_is_refused(photos):
    text = (photos / "list.csv").read_text().replace("patient 3", "", 1)
    (photos / "list.csv").write_text(text)
    with pytest.raises(UserError, match="line 20 has no group"):
        pools(photos / "list.csv", group="patient")


def test_a_group_in_both_lists_is_refused(photos):
    lines = (photos / "list.csv").read_text().splitlines()
    (photos / "train.csv").write_text("\n".join(lines[:20]))
    (photos / "val.csv").write_text("\n".join([lines[0], *lines[20:]]))
    with pytest.raises(UserError, match="the group patient 3 is in"):
        pools(photos / "train.csv", val_root=str(photos / "val.csv"), group="patient")
    (photos / "val.csv").write_text("\n".join([lines[0], *lines[25:]]))
    pools(photos / "train.csv", val_root=str(photos / "val.csv"), group="patient")


def test_whole_groups_come_near_the_share_of_every_class():
    rng = np.random.default_rng(0)
    groups = rng.integers(0, 60, 2000)
    labels = (rng.random(2000) < 0.1).astype(int) + (groups % 2)
    out = np.isin(groups, hold_out_groups(labels, groups, 0.2, 0))
    for label in range(3):
        assert np.mean(out[labels == label]) == pytest.approx(0.2, abs=0.04)


def test_two_large_groups_give_the_smaller_one_up():
    labels = np.tile([0, 1], 500)
    groups = np.repeat([0, 1], [590, 410])
    assert hold_out_groups(labels, groups, 0.2, 0).tolist() == [1]
    assert hold_out_groups(labels, np.zeros(1000, int), 0.2, 0).tolist() == []


def test_groups_are_kept_with_a_list_that_is_read_once(photos, monkeypatch):
    from msn.data import lists

    monkeypatch.setattr(lists, "KEEP_FROM", 1)
    for _ in range(2):
        index = lists.index_list(
            str(photos / "list.csv"),
            key="data.root",
            base=str(photos),
            use_labels=True,
            columns=lists.Columns(group="patient"),
            cache_from=1,
        )
        assert index.group_names[index.groups[7]] == "patient 1"
