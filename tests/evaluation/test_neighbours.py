import math

import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from msn.errors import UserError
from msn.evaluation import neighbours
from msn.evaluation.neighbours import majority_votes, nearest, rankme, weighted_votes


@pytest.fixture
def rows() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    references = torch.randn(60, 8, generator=generator, dtype=torch.float64)
    queries = torch.randn(25, 8, generator=generator, dtype=torch.float64)
    return references, queries, torch.randint(4, (60,), generator=generator)


def test_nearest_finds_what_a_full_sort_of_cosines_finds(rows, monkeypatch):
    references, queries, _ = rows
    # Blocks of three queries: the last one is not full.
    monkeypatch.setattr(neighbours, "_MAX_SIMILARITIES", 3 * len(references))
    cosines, indices = nearest(references, queries, 7)
    for q, query in enumerate(queries):
        every = torch.stack([query @ r / query.norm() / r.norm() for r in references])
        order = every.argsort(descending=True)[:7]
        assert indices[q].tolist() == order.tolist()
        torch.testing.assert_close(cosines[q], every[order], rtol=0, atol=1e-12)


@pytest.mark.parametrize("k", [0, 61])
def test_impossible_number_of_neighbours_is_refused(rows, k):
    with pytest.raises(UserError, match=r"must be in \[1, 60\]"):
        nearest(rows[0], rows[1], k)


def test_majority_counts_more_than_closeness():
    cosines = torch.tensor([[0.99, -0.9, -0.95]])
    labels = torch.tensor([[0, 1, 1]])
    assert majority_votes(cosines, labels, 3).argmax().item() == 1


def test_tie_goes_to_the_class_of_larger_summed_cosines():
    cosines = torch.tensor([[0.9, 0.8, 0.7, 0.2]])
    labels = torch.tensor([[2, 1, 1, 2]])
    assert majority_votes(cosines, labels, 3).argmax().item() == 1


def test_majority_agrees_with_scikit_learn_where_there_is_no_tie(rows):
    references, queries, labels = rows
    cosines, indices = nearest(references, queries, 9)
    ours = majority_votes(cosines, labels[indices], 4)
    counts = torch.stack([(labels[indices] == c).sum(dim=1) for c in range(4)], dim=1)
    sure = counts.topk(2, dim=1).values.diff(dim=1)[:, 0] < 0
    other = KNeighborsClassifier(9, metric="cosine").fit(references.numpy(), labels.numpy())
    theirs = torch.from_numpy(other.predict(queries.numpy()))
    assert sure.sum() > 10
    assert torch.equal(ours.argmax(dim=1)[sure], theirs[sure])


def test_weighted_votes_are_sums_of_exponentials_relative_to_the_nearest(rows):
    references, queries, labels = rows
    cosines, indices = nearest(references, queries, 5)
    scores = weighted_votes(cosines, labels[indices], 4, temperature=0.07)
    for q in range(len(queries)):
        expected = [0.0] * 4
        for cosine, index in zip(cosines[q].tolist(), indices[q].tolist(), strict=True):
            expected[int(labels[index])] += math.exp((cosine - float(cosines[q, 0])) / 0.07)
        torch.testing.assert_close(scores[q], torch.tensor(expected, dtype=torch.float64))


def test_tiny_temperature_gives_the_nearest_neighbour_without_overflow(rows):
    references, queries, labels = rows
    cosines, indices = nearest(references, queries, 5)
    scores = weighted_votes(cosines.float(), labels[indices], 4, temperature=1e-4)
    assert torch.isfinite(scores).all()
    assert torch.equal(scores.argmax(dim=1), labels[indices[:, 0]])


def test_temperature_must_be_positive():
    with pytest.raises(UserError, match="temperature must be > 0"):
        weighted_votes(torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.long), 2, temperature=0.0)


def test_rankme_counts_equal_directions():
    basis = torch.linalg.qr(torch.randn(20, 20, generator=torch.Generator().manual_seed(0)))[0]
    assert rankme(torch.cat([basis[:6], basis[:6]])) == pytest.approx(6, rel=1e-5)
    assert rankme(torch.ones(10, 5)) == pytest.approx(1, abs=1e-5)
    assert rankme(torch.zeros(10, 5)) == 0


def test_rankme_is_the_entropy_of_singular_values_at_any_scale():
    rows = torch.randn(30, 4, generator=torch.Generator().manual_seed(1)) * torch.tensor(
        [9.0, 3, 1, 0.1]
    )
    values = torch.linalg.svdvals(rows.double())
    share = values / values.sum()
    expected = math.exp(-(share * share.log()).sum())
    assert rankme(rows) == pytest.approx(expected, rel=1e-9)
    assert rankme(1000 * rows) == pytest.approx(expected, rel=1e-5)


def test_alignment_and_uniformity_against_loops(rows):
    first, second = rows[0][:9], rows[0][9:18]
    unit = [[x / x.norm() for x in part] for part in (first, second)]
    aligned = sum(float((a - b).square().sum()) for a, b in zip(*unit, strict=True)) / 9
    assert float(neighbours.alignment(first, second)) == pytest.approx(aligned)
    potentials = [
        math.exp(-2 * float((unit[0][i] - unit[0][j]).square().sum()))
        for i in range(9)
        for j in range(i)
    ]
    expected = math.log(sum(potentials) / len(potentials))
    assert float(neighbours.uniformity(first)) == pytest.approx(expected)
    assert float(neighbours.alignment(first, 3 * first)) == pytest.approx(0)
    assert float(neighbours.uniformity(first[:1].expand(5, -1))) == pytest.approx(0)


def test_leaving_one_out_is_what_a_loop_over_the_others_finds(rows):
    features, _, labels = rows
    features = torch.cat([features, features[:5]])  # some rows have an equal
    labels = torch.cat([labels, labels[:5].flip(0)])
    right = 0
    for i in range(len(features)):
        others = torch.tensor([j for j in range(len(features)) if j != i])
        cosines, found = nearest(features[others], features[i : i + 1], 7)
        votes = majority_votes(cosines, labels[others][found], 4)
        right += int(votes.argmax() == labels[i])
    share = neighbours.leave_one_out(features, labels, k=7, num_classes=4)
    assert share == pytest.approx(right / len(features))
