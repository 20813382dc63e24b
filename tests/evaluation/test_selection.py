import torch

from msn.evaluation.selection import best_lambds, folds_of


def test_every_image_is_held_out_once_and_classes_evenly():
    labels = torch.tensor([0] * 13 + [1] * 12 + [2] * 5)
    folds = folds_of(labels, 5, of=3)
    assert [fold.of for fold in folds] == [3] * 5
    held_out = torch.cat([fold.held_out for fold in folds])
    assert sorted(held_out.tolist()) == list(range(30))
    for fold in folds:
        assert set(fold.train.tolist()) == set(range(30)) - set(fold.held_out.tolist())
        counts = torch.bincount(labels[fold.held_out], minlength=3)
        assert counts[0] in (2, 3)
        assert counts[1] in (2, 3)
        assert counts[2] == 1
        assert len(fold.held_out) == 6  # folds of one size


def test_fewer_images_than_folds_leave_one_out():
    folds = folds_of(torch.tensor([0, 1, 0, 1]), 5, of=0)
    assert len(folds) == 2
    for fold in folds:
        assert len(fold.held_out) == 2


def test_one_image_a_class_cannot_be_cross_validated():
    assert folds_of(torch.tensor([0, 1, 2]), 5, of=0) == []


def test_accuracy_decides_then_log_loss_then_the_stronger_value():
    grid = [0.1, 1.0, 10.0]
    accuracy = torch.tensor([[3.0, 5, 4], [5, 5, 1], [5, 5, 5]])
    log_loss = torch.tensor([[1.0, 9, 1], [2, 3, 1], [1, 1, 1]])
    assert best_lambds(accuracy, log_loss, grid) == [1.0, 0.1, 10.0]
