"""Linear probes: how much of something can be read off frozen features."""

import torch
from torch import Tensor
from torch.nn import functional as F


# Strengths of the ridge to choose from, relative to the mean square of the features.
RIDGES = tuple(10.0**power for power in range(-5, 4))


def _standardised(train: Tensor, test: Tensor) -> tuple[Tensor, Tensor]:
    mean, scale = train.mean(0), train.std(0).clamp_min(1e-6)
    return (train - mean) / scale, (test - mean) / scale


def ridge_probe(train: Tensor, values: Tensor, test: Tensor, folds: int = 5) -> Tensor:
    """
    Predict numbers by ridge regression, its strength chosen by cross-validation on the training part alone.

    Args:
        train: (n, features).
        values: (n, outputs) of the training rows.
        test: (m, features).

    Returns:
        (m, outputs) float64. Solved in its dual form, so features may well outnumber rows.
    """
    train, test = _standardised(train.double(), test.double())
    values = values.double()
    kernel = train @ train.T / train.shape[1]

    def fit(rows: Tensor, queries: Tensor, ridge: float) -> Tensor:
        mean = values[rows].mean(0)
        gram = kernel[rows][:, rows] + ridge * torch.eye(len(rows), dtype=torch.float64)
        return queries @ torch.linalg.solve(gram, values[rows] - mean) + mean

    everything = torch.arange(len(train))
    errors = torch.zeros(len(RIDGES), values.shape[1], dtype=torch.float64)
    for fold in range(folds):
        held_out = everything % folds == fold
        rows, rest = everything[~held_out], everything[held_out]
        for index, ridge in enumerate(RIDGES):
            errors[index] += (fit(rows, kernel[rest][:, rows], ridge) - values[rest]).square().sum(0)
    kernel_test = test @ train.T / train.shape[1]
    predictions = torch.stack([fit(everything, kernel_test, ridge) for ridge in RIDGES])
    return predictions.gather(0, errors.argmin(0).expand(1, len(test), -1))[0]


def classification_probe(train: Tensor, labels: Tensor, test: Tensor, num_classes: int, steps: int = 60) -> Tensor:
    """
    Classes (m,) of the test rows by multinomial logistic regression (L-BFGS, weak weight decay).

    Args:
        train: (n, features).
        labels: (n,) int64 below `num_classes`.
        test: (m, features).
    """
    train, test = _standardised(train.float(), test.float())
    weight = torch.zeros(num_classes, train.shape[1], requires_grad=True)
    bias = torch.zeros(num_classes, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=steps, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(F.linear(train, weight, bias), labels) + 1e-3 * weight.square().sum() / num_classes
        loss.backward()
        return loss

    optimizer.step(closure)
    with torch.no_grad():
        return F.linear(test, weight, bias).argmax(-1)


def r_squared(predictions: Tensor, values: Tensor) -> Tensor:
    """(outputs,) 1 - squared error / squared error of the mean, of predictions and values (m, outputs)."""
    error = (predictions - values).square().sum(0)
    return 1 - error / (values - values.mean(0)).square().sum(0)
