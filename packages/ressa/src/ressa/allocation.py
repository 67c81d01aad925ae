"""How a sparsity is shared out: between the branches, or between the blocks of a branch."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from model_hooks.errors import RequestError

SPREAD = 0.08  # OWL's lambda: a block's sparsity is at most this far from the mean
OUTLIER = 5.0  # OWL's M: a score that is so many times its matrix's mean is an outlier


def budget(total: float, weights: Mapping[str, int], vision: float | None, language: float | None) -> dict[str, float]:
    """Sparsity by branch so that `total` of all prunable weights go; the branch that is None is solved for.

    Raises `RequestError` unless exactly one is given, or where the other would not be in [0, 1).
    """
    if (vision is None) == (language is None):
        raise RequestError(
            "allocation parameter_budget solves for one branch; give the other one's sparsity, and only it"
        )
    given, solved = ("vision", "language") if language is None else ("language", "vision")
    fixed = vision if vision is not None else language
    assert fixed is not None
    share = (total * sum(weights.values()) - fixed * weights[given]) / max(1, weights[solved])
    if not 0 <= share < 1:
        raise RequestError(
            f"sparsity {total} with {given} at {fixed} would need {solved} at {share:.3f}; that is not between 0 and 1"
        )
    return {given: fixed, solved: share}


def owl(outliers: Mapping[str, float], weights: Mapping[str, int], sparsity: float) -> dict[str, float]:
    """Sparsity by block: less where more outliers are, with mean `sparsity` over the weights (OWL, arXiv 2310.05175).

    outliers: Block -> share of its scores that are outliers. weights: Block -> prunable weights.
    """
    low, high = min(outliers.values()), max(outliers.values())
    spread = min(SPREAD, sparsity, 1 - sparsity - 1e-9)
    raw = {b: -spread * (2 * (v - low) / (high - low) - 1) if high > low else 0.0 for b, v in outliers.items()}
    total = sum(weights.values())
    mean = sum(raw[b] * weights[b] for b in raw) / total
    widest = max(abs(v - mean) for v in raw.values())
    scale = min(1.0, spread / widest) if widest else 1.0  # so that no block leaves [0, 1)
    return {b: sparsity + scale * (v - mean) for b, v in raw.items()}


def outlier_share(weight: Tensor, square_norms: Tensor) -> tuple[int, int]:
    """(outliers, weights) of a matrix: scores |W| * |X| above `OUTLIER` times their mean."""
    scores = weight.float().abs() * square_norms.to(weight.device).float().sqrt()
    return int((scores > OUTLIER * scores.mean()).sum()), scores.numel()
