"""Logistic regression and kNN on frozen features, and the choice of lambda by cross-validation.

lambda is either the paper's fixed value or chosen by cross-validation inside the labelled set
alone, never on test images. A fixed value gives the row, and the cross-validated one its entry
`cross_validated`. Without a fixed value, the cross-validated one gives the row.

As in the reference, strengths are given as `lambd` = lambda * n, which means the same for every
number of labels (scikit-learn's C = 1 / lambd).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Annotated, Any, NamedTuple

import torch
from torch import Tensor

from msn.data.sampler import permutation
from msn.errors import UserError
from msn.evaluation.logistic import LogisticFit, centre_and_normalise, fit_logistic
from msn.evaluation.neighbours import knn_scores
from msn.evaluation.outcomes import Outcome, balanced_accuracies, spread
from msn.evaluation.sets import Head, LabelSet, Result, Trial, make_row
from msn.progress import Progress
from msn.schema import Range, check_ranges

# Numbers of labelled rows gathered at once.
_MAX_GATHERED = 2**28
# Scores of held-out and of test images held at once.
_MAX_SCORES = 2**27
# Certified relative gap at which a candidate's held-out accuracy no longer changes noticeably.
_SELECTION_TOLERANCE = 1e-3


@dataclass(frozen=True, kw_only=True)
class Logistic:
    """Settings of logistic regression; the values live in `configs/protocol/logistic.yaml`.

    Raises:
        UserError: a number is out of range, or there is neither a value nor a grid.
    """

    # Fixed lambda * n; None takes the cross-validated one.
    lambd: Annotated[float | None, Range(0, above_low=True)]
    lambd_grid: Sequence[float] | None  # values for cross-validation; None does none
    folds: Annotated[int, Range(2)]  # at most the number of images of the largest class
    intercept: bool  # append a constant to the rows; regularised like the other weights
    # Certified (objective - optimum) / objective.
    tolerance: Annotated[float, Range(0, above_low=True)]
    max_evaluations: Annotated[int, Range(1)]  # passes over the labelled rows

    def __post_init__(self) -> None:
        check_ranges("protocol.logistic", self)
        if self.lambd is None and not self.lambd_grid:
            raise UserError("protocol.logistic: give lambd, or lambd_grid to choose from")
        for value in self.lambd_grid or []:
            if not value > 0:
                raise UserError(f"protocol.logistic.lambd_grid: must be > 0, got {value}")

    def prepare(self, features: Tensor) -> Tensor:
        """Rows for the fit: centred, normalised, with a constant if there is an intercept."""
        rows = centre_and_normalise(features)
        return torch.cat([rows, torch.ones_like(rows[:, :1])], dim=1) if self.intercept else rows

    def fit(
        self,
        rows: Tensor,
        labels: Tensor,
        *,
        num_classes: int,
        lambds: Sequence[float] | Tensor,
        tolerance: float,
    ) -> LogisticFit:
        """Fit sets of one size, [S, n, D] and [S, n], for every lambd (of all, or [S, L])."""
        return fit_logistic(
            rows,
            labels,
            num_classes=num_classes,
            lambdas=torch.as_tensor(lambds, dtype=torch.float64) / rows.shape[1],
            tolerance=tolerance,
            max_evaluations=self.max_evaluations,
        )


def check_lambda_choice(settings: Logistic, sets: Sequence[LabelSet], labels: Tensor) -> None:
    """Raise a UserError if lambda is to be chosen and a set is too small to cross-validate.

    Args:
        settings: of the regression.
        sets: label sets.
        labels: of the pool that their positions point into, [n].
    """
    for labelled in sets if settings.lambd is None else []:
        if int(torch.bincount(labels[labelled.positions]).max()) < 2:
            raise UserError(
                f"protocol.logistic.lambd=null: with {labelled.labels} labels no class has two "
                "images, which cross-validation needs; give protocol.logistic.lambd"
            )


def logistic_results(trial: Trial, settings: Logistic) -> list[Result]:
    """A result for each number of labels, over all its label sets."""
    problem = _Problem(trial, settings)
    results = []
    for name, group in _groups(f"{trial.backbone}: logistic regression", trial.sets):
        fixed = None if settings.lambd is None else [settings.lambd] * len(group)
        chosen = problem.cross_validate(group)
        lambds = fixed or chosen
        if lambds is None:
            check_lambda_choice(settings, group, trial.train.labels)
            raise UserError(
                f"protocol.logistic.lambd=null: with {name} labels all images are of one group, "
                "and cross-validation needs two; give protocol.logistic.lambd"
            )
        wanted = [lambds] if chosen in (None, lambds) else [lambds, chosen]
        fits, *others = problem.fit(group, wanted)
        more: dict[str, Any] = {"lambda_choice": "fixed" if fixed else "cross-validation"}
        if fixed and chosen:
            more["cross_validated"] = _summary(others[0] if others else fits, chosen)
        row = make_row(
            backbone=trial.backbone,
            classifier="logistic",
            labels=name,
            outcome=fits.outcome,
            splits=[labelled.split for labelled in group],
            lambda_=sum(fits.lambdas) / len(fits.lambdas),
            lambd=lambds[0] if len(set(lambds)) == 1 else lambds,
            labelled_images=len(group[0].positions),
            converged=fits.converged,
            feature=trial.feature,
            **more,
        )
        bias = fits.weight[:, -1] if settings.intercept else None
        weight = fits.weight[:, :-1] if settings.intercept else fits.weight
        split = group[0].split
        head = Head(weight, bias, trial.train.classes, trial.feature, True, True, split)
        results.append(Result(row, head, fits.outcome))
    return results


def _groups(title: str, sets: Sequence[LabelSet]) -> Iterator[tuple[str, list[LabelSet]]]:
    """Label sets of one number of labels together, counted in a progress bar."""
    with Progress(title, len(sets), show=True) as progress:
        for name in dict.fromkeys(labelled.labels for labelled in sets):
            group = [labelled for labelled in sets if labelled.labels == name]
            yield name, group
            progress.advance(len(group))


def knn_results(trial: Trial, neighbours: Sequence[int], temperature: float | None) -> list[Result]:
    """A result for each number of neighbours; `variant` distinguishes several.

    Args:
        trial: with one label set.
        neighbours: numbers k.
        temperature: of the votes, see `knn_predictions`.
    """
    (labelled,) = trial.sets
    train, test, device = trial.train, trial.test, trial.device
    references, labels = train.features[labelled.positions], train.labels[labelled.positions]
    found = knn_scores(
        references.to(device),
        labels.to(device),
        test.features.to(device),
        neighbours=neighbours,
        temperature=temperature,
        num_classes=len(train.classes),
    )
    votes = "majority" if temperature is None else f"temperature {temperature:g}"
    results = []
    for k, scores in zip(neighbours, found, strict=True):
        shares = (scores / scores.sum(dim=1, keepdim=True)).cpu()
        outcome = test.outcome(shares.argmax(dim=1).unsqueeze(0), shares)
        row = make_row(
            backbone=trial.backbone,
            classifier="knn",
            labels=labelled.labels,
            outcome=outcome,
            splits=[labelled.split],
            labelled_images=len(labels),
            neighbours=k,
            votes=votes,
            feature=trial.feature,
            **({"variant": f"k={k}"} if len(neighbours) > 1 else {}),
        )
        results.append(Result(row, None, outcome))
    return results


class _Fits(NamedTuple):
    """Classifiers of some label sets, for a row of the table."""

    weight: Tensor  # of the first set, [C, D]
    outcome: Outcome
    lambdas: list[float]  # lambda of each set
    converged: bool


class _Problem:
    """Prepared rows of both pools, and what is asked of them."""

    def __init__(self, trial: Trial, settings: Logistic) -> None:
        train, test, device = trial.train, trial.test, trial.device
        if device.type == "mps":
            device = torch.device("cpu")  # the proof of the optimum needs float64
        self.settings, self.num_classes = settings, len(train.classes)
        self.rows = settings.prepare(train.features.to(device))
        self.labels = train.labels.to(device)
        self.test_rows = settings.prepare(test.features.to(device))
        self.test, self.groups = test, train.groups

    def fit(self, group: Sequence[LabelSet], choices: Sequence[Sequence[float]]) -> list[_Fits]:
        """Fit every set with its own lambd and classify the test images, for each choice of them.

        Args:
            group: label sets.
            choices: a lambd for each of these; several choices.
        """
        predicted = torch.empty(len(choices), len(group), len(self.test_rows), dtype=torch.long)
        converged, first = torch.ones(len(choices), dtype=torch.bool), self.rows
        sizes = [len(labelled.positions) for labelled in group]
        strengths = torch.tensor(choices, dtype=torch.float64).T  # [S, L]
        for size, members in _grouped(sizes):  # those of one size are solved side by side
            for some in self._chunks(members, size):
                positions = torch.stack([group[i].positions for i in some]).to(self.rows.device)
                fit = self._solve(positions, strengths[some], self.settings.tolerance)
                converged &= fit.converged.all(dim=0).cpu()
                for i, weights in zip(some, fit.weight, strict=True):
                    scores = [self._probabilities(weight, group[i]) for weight in weights]
                    predicted[:, i] = torch.stack(scores).argmax(dim=2)
                    first = weights if i == 0 else first
        return [
            _Fits(
                weight.cpu(),
                self.test.outcome(of_sets, self._probabilities(weight, group[0])),
                [lambd / size for lambd, size in zip(lambds, sizes, strict=True)],
                bool(well),
            )
            for weight, of_sets, lambds, well in zip(
                first, predicted, choices, converged, strict=True
            )
        ]

    def cross_validate(self, group: Sequence[LabelSet]) -> list[float] | None:
        """The lambd that each set chooses by itself; None where it cannot or need not."""
        grid = sorted(self.settings.lambd_grid or [])
        if not grid:
            return None
        folds: list[Fold] = []
        for number, labelled in enumerate(group):
            labels, groups = self.labels[labelled.positions].cpu(), None
            if self.groups is not None:
                groups = self.groups[labelled.positions]
            folds += folds_of(labels, self.settings.folds, of=number, groups=groups)
        if {fold.of for fold in folds} != set(range(len(group))):
            return None
        right = torch.zeros(len(group), len(grid), dtype=torch.float64)
        loss = torch.zeros_like(right)
        sizes = [len(fold.train) for fold in folds]
        for size, members in _grouped(sizes):
            for some in self._chunks(members, size):
                trained = [group[folds[i].of].positions[folds[i].train] for i in some]
                positions = torch.stack(trained).to(self.rows.device)
                tolerance = max(self.settings.tolerance, _SELECTION_TOLERANCE)
                fit = self._solve(positions, grid, tolerance)
                for i, weights in zip(some, fit.weight, strict=True):
                    held_out = group[folds[i].of].positions[folds[i].held_out]
                    hits, losses = self._held_out(weights, held_out)
                    right[folds[i].of] += hits
                    loss[folds[i].of] += losses
        return best_lambds(right, loss, grid)

    def _solve(
        self, positions: Tensor, lambds: Sequence[float] | Tensor, tolerance: float
    ) -> LogisticFit:
        return self.settings.fit(
            self.rows[positions],
            self.labels[positions],
            num_classes=self.num_classes,
            lambds=lambds,
            tolerance=tolerance,
        )

    def _held_out(self, weights: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Hits and log losses of held-out images, summed, for weights [L, C, D]: each [L]."""
        hits = loss = torch.zeros(len(weights), dtype=torch.float64)
        step = max(1, _MAX_SCORES // (len(weights) * self.num_classes))
        for some in positions.to(self.rows.device).split(step):
            scores = self.rows[some] @ weights.mT  # [L, v, C]
            labels = self.labels[some].expand(len(weights), -1)
            log_probs = scores.log_softmax(dim=-1).gather(-1, labels.unsqueeze(-1))
            hits = hits + (scores.argmax(dim=-1) == labels).sum(dim=1).cpu()
            loss = loss - log_probs.cpu().double().sum(dim=(1, 2))
        return hits, loss

    def _probabilities(self, weight: Tensor, labelled: LabelSet) -> Tensor:
        """For the test images, [m, C]; a class without a labelled image is never predicted."""
        unseen = torch.bincount(self.labels[labelled.positions], minlength=self.num_classes) == 0
        parts = self.test_rows.split(max(1, _MAX_SCORES // self.num_classes))
        scores = ((rows @ weight.T).masked_fill(unseen, -torch.inf) for rows in parts)
        return torch.cat([some.softmax(dim=1).cpu() for some in scores])

    def _chunks(self, members: list[int], size: int) -> list[list[int]]:
        step = max(1, _MAX_GATHERED // (size * self.rows.shape[1]))
        return [members[at : at + step] for at in range(0, len(members), step)]


def _grouped(keys: Sequence[Any]) -> list[tuple[Any, list[int]]]:
    """Positions of equal keys, in order of the keys."""
    order = sorted(range(len(keys)), key=lambda i: keys[i])
    return [(key, list(members)) for key, members in groupby(order, key=lambda i: keys[i])]


def _summary(fits: _Fits, lambds: list[float]) -> dict[str, Any]:
    top1, balanced = fits.outcome.correct.double().mean(dim=1), balanced_accuracies(fits.outcome)
    return {
        "lambd": lambds,
        "lambda": fits.lambdas,
        "top1_mean": float(top1.mean()),
        "top1_std": spread(top1),
        "top1": top1.tolist(),
        "balanced_mean": float(balanced.mean()),
        "balanced_std": spread(balanced),
    }


_FOLD_DRAWS = 5  # separates these draws from others of the same seed


class Fold(NamedTuple):
    """One fold of one label set."""

    of: int
    """Which label set."""
    train: Tensor
    """Positions within the set, [n - v]."""
    held_out: Tensor
    """Positions within the set, [v]."""


def folds_of(
    labels: Tensor, num_folds: int, *, of: int, groups: Tensor | None = None
) -> list[Fold]:
    """Cut a label set into stratified folds.

    Args:
        labels: classes of the set's images, [n].
        num_folds: >= 2; fewer if no class has as many images.
        of: number of the set, kept with the folds.
        groups: numbers of groups that stay whole, [n].

    Returns:
        The folds; none if no class has two images or there is a single group. Each image is held
        out once, and each class as evenly as its count (or the groups) allows. The folds depend on
        the set alone.
    """
    members = [torch.nonzero(labels == label)[:, 0] for label in labels.unique()]
    num_folds = min(num_folds, max(len(positions) for positions in members))
    if groups is not None:
        num_folds = min(num_folds, len(groups.unique()))
    if num_folds < 2:
        return []
    if groups is not None:
        return _folds(_deal_groups(labels, groups, num_folds), num_folds, of)
    fold = torch.empty(len(labels), dtype=torch.long)
    dealt = 0  # each class continues where the last one ended, so that folds have one size
    for label, positions in enumerate(members):
        order = torch.from_numpy(permutation(len(positions), 0, _FOLD_DRAWS, label))
        fold[positions[order]] = (torch.arange(len(positions)) + dealt) % num_folds
        dealt += len(positions)
    return _folds(fold, num_folds, of)


def _folds(fold: Tensor, num_folds: int, of: int) -> list[Fold]:
    """The folds, from each image's number of its fold, [n]."""
    return [
        Fold(of, torch.nonzero(fold != i)[:, 0], torch.nonzero(fold == i)[:, 0])
        for i in range(num_folds)
    ]


def _deal_groups(labels: Tensor, groups: Tensor, num_folds: int) -> Tensor:
    """A fold for each image, [n]: the largest groups first, each where its classes are rarest."""
    inverse = groups.unique(return_inverse=True)[1]
    counts = torch.zeros(int(inverse.max()) + 1, int(labels.max()) + 1, dtype=torch.float64)
    counts.index_put_((inverse, labels), torch.ones((), dtype=torch.float64), accumulate=True)
    shares = counts / counts.sum(dim=0).clamp_min(1)
    held = torch.zeros(num_folds, counts.shape[1], dtype=torch.float64)
    fold = torch.empty(len(counts), dtype=torch.long)
    for group in counts.sum(dim=1).argsort(descending=True, stable=True).tolist():
        # An empty fold always has least, so no fold stays empty.
        at = int((held @ shares[group] + 1e-9 * held.sum(dim=1)).argmin())
        held[at] += shares[group]
        fold[group] = at
    return fold[inverse]


def best_lambds(accuracy: Tensor, log_loss: Tensor, grid: list[float]) -> list[float]:
    """The best value of an ascending grid for each label set.

    Args:
        accuracy: held-out accuracy over all folds, [S, L].
        log_loss: held-out log loss over all folds, [S, L]; breaks ties of the accuracy.
        grid: L values, ascending; between equals the larger, more regularised one wins.
    """
    best = []
    for right, loss in zip(accuracy.tolist(), log_loss.tolist(), strict=True):
        order = max(range(len(grid)), key=lambda i: (right[i], -loss[i], grid[i]))
        best.append(grid[order])
    return best
