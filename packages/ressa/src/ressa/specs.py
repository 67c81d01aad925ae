"""What a request means, read before anything is loaded: shares, patterns and the original's spec strings."""

from __future__ import annotations

import re
from dataclasses import dataclass

from model_hooks.errors import RequestError

SPEC = re.compile(
    r"(?:(?P<branch>vision|language):)?(?P<layers>\d+)-(?P<keep>[\d.]+)-(?P<attention>[\d.]+)-(?P<mlp>[\d.]+)"
)


def share(value: float, flag: str) -> float:
    """`value`, if it is a share of weights to remove: from 0, below 1. Raises `RequestError`."""
    if 0 <= value < 1:
        return value
    hint = f"; did you mean {value / 100:.2f}?" if 1 < value < 100 else ""
    raise RequestError(f"{flag} {value:g} is not a share from 0 to below 1{hint}")


def implied(pattern: str) -> float:
    """The sparsity of a pattern N:M, 0.5 for none; a pattern that is none is refused where it is used."""
    found = re.fullmatch(r"(\d+):(\d+)", pattern)
    kept, of = (int(found[1]), int(found[2])) if found else (1, 2)
    return 1 - kept / of if 0 < kept < of else 0.5


@dataclass(frozen=True)
class Spec:
    """One spec string of the original: so many layers, of whose weights `keep` stay."""

    layers: int
    keep: float
    branch: str = ""

    @property
    def sparsity(self) -> float:
        return round(1 - self.keep, 6)

    def say(self) -> str:
        """What it was taken to mean."""
        where = f"the {self.branch} branch" if self.branch else "every branch"
        return f"keep {100 * self.keep:g} % = sparsity {100 * self.sparsity:g} %, of {where} with {self.layers} layers"


def read_specs(text: str) -> tuple[Spec, ...]:
    """`24-0.5-1.0-1.0`, or several as `vision:39-0.5-1.0-1.0,language:24-0.5-1.0-1.0`.

    Layers, KEEP ratio, and the shares of attention and MLP widths, which must be 1.0 here. Raises `RequestError`.
    """
    found = []
    for part in text.split(","):
        match = SPEC.fullmatch(part.strip())
        if not match:
            raise RequestError(f"--compat-spec {part!r} is not LAYERS-KEEP-ATTENTION-MLP, such as 24-0.5-1.0-1.0")
        keep, widths = float(match["keep"]), (float(match["attention"]), float(match["mlp"]))
        if not 0 < keep <= 1:
            raise RequestError(
                f"--compat-spec {part!r}: its second number is the share that is KEPT, above 0 and at most 1"
            )
        if widths != (1.0, 1.0):
            raise RequestError(f"--compat-spec {part!r} narrows attention or MLP; only single weights are pruned here")
        found.append(Spec(int(match["layers"]), keep, match["branch"] or ""))
    return tuple(found)


def by_branch(specs: tuple[Spec, ...], blocks: dict[str, int]) -> dict[str, float]:
    """Sparsity of each branch, 0 where no spec names it. `blocks`: how many blocks each has; an encoder-decoder's count
    as its halves too. Raises `RequestError` where a spec fits none."""
    found = dict.fromkeys(blocks, 0.0)
    for spec in specs:
        fits = [b for b, n in blocks.items() if spec.branch in ("", b) and spec.layers in (n, n / 2)]
        if not fits:
            have = ", ".join(f"{branch} {count}" for branch, count in blocks.items())
            raise RequestError(f"--compat-spec for {spec.layers} layers fits no branch; blocks of this model: {have}")
        found |= dict.fromkeys(fits, spec.sparsity)
    return found


def ratios(text: str) -> tuple[tuple[float, float], ...]:
    """`10:90,50:50` as pairs of shares (vision, language). Raises `RequestError`."""
    pairs = []
    for part in text.split(","):
        numbers = re.fullmatch(r"\s*([\d.]+):([\d.]+)\s*", part)
        if not numbers:
            raise RequestError(f"--ratios {part!r} is not VISION:LANGUAGE in percent, such as 50:50")
        pairs.append((share(float(numbers[1]) / 100, "--ratios"), share(float(numbers[2]) / 100, "--ratios")))
    return tuple(pairs)
