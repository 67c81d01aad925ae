"""Which version of a record the student keeps (Selective Reflection-Tuning, arXiv 2402.10110): rules as data.

A record has up to four versions: ori, Q (instruction and answer reflected on), A (the answer alone) and QA (both, one
after the other). The instruction is decided first, by the difficulty of the instruction for the student (IFD), then the
answer within the kept instruction, by how well it reveals that instruction (r-IFD).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from model_hooks.errors import RequestError

VERSIONS = ("ori", "Q", "A", "QA")
METRICS = ("ifd", "rifd", "ifd_loss", "rifd_loss")
ALWAYS = "always"


@dataclass(frozen=True)
class Ratios:
    """Scores of one version under the student, section 2.1 of the paper's method; None where there is none.

    ifd, rifd: ratios of perplexities. ifd_loss, rifd_loss: ratios of losses.
    """

    ifd: float | None = None
    rifd: float | None = None
    ifd_loss: float | None = None
    rifd_loss: float | None = None

    def known(self, metric: str) -> float | None:
        """The score, None unless it is a finite number above 0: NaN, infinity and the 0 of a failure are none."""
        value = getattr(self, metric)
        return float(value) if value is not None and math.isfinite(value) and value > 0 else None


@dataclass(frozen=True)
class Rule:
    """When the newer text is kept: its metric is `higher` (or `lower`) than the older one's by more than `margin`.

    `always`: whenever there is a newer text, without any score.
    """

    metric: str = "ifd"
    direction: str = "higher"
    margin: float = 0.0

    def __post_init__(self) -> None:
        if self.metric not in METRICS or self.direction not in ("higher", "lower", ALWAYS):
            raise RequestError(
                f"rule {self.metric!r} {self.direction!r}: the metric is one of {', '.join(METRICS)}, the direction "
                "higher, lower or always"
            )
        if not (isinstance(self.margin, int | float) and 0 <= self.margin < math.inf):
            raise RequestError(f"margin {self.margin!r}: give a number from 0 on")

    def keeps(self, newer: Ratios | None, older: Ratios | None) -> bool | None:
        """Whether the newer text is kept; None where a score that decides it is unknown. A tie keeps the older."""
        if self.direction == ALWAYS:
            return True
        new, old = (None if r is None else r.known(self.metric) for r in (newer, older))
        if new is None or old is None:
            return None
        return new > old + self.margin if self.direction == "higher" else new < old - self.margin


@dataclass(frozen=True)
class Decision:
    """What becomes of a record.

    version: the winner. emitted: whether it belongs to the result. reason: "" if it does; else unscored (a score that
    decides was unknown), out_of_bounds, or not_wanted (the policy emits no such winner).
    """

    version: str
    emitted: bool
    reason: str = ""


@dataclass(frozen=True)
class SelectionPolicy:
    """Rules of selection.

    instruction, response: when a newer one is kept. bounds: for a metric (lowest, bound): the winner needs
    lowest <= score < bound. emit: the winners that belong to the result.
    """

    name: str
    instruction: Rule = field(default_factory=Rule)
    response: Rule = field(default_factory=lambda: Rule("rifd", "lower"))
    bounds: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    emit: tuple[str, ...] = VERSIONS

    def __post_init__(self) -> None:
        if unknown := [v for v in self.emit if v not in VERSIONS]:
            raise RequestError(f"emit {unknown[0]!r}: choose of {', '.join(VERSIONS)}")
        for metric, bound in self.bounds.items():
            good = len(bound) == 2 and all(isinstance(b, int | float) for b in bound) and bound[0] < bound[1]
            if metric not in METRICS or not good:
                raise RequestError(
                    f"bounds {metric!r} {list(bound)}: give (lowest, bound) for one of {', '.join(METRICS)}"
                )

    @property
    def needs_scores(self) -> bool:
        return bool(self.bounds) or self.instruction.direction != ALWAYS or self.response.direction != ALWAYS

    def decide(self, scores: Mapping[str, Ratios | None]) -> Decision:
        """The winner. `scores` has a key for each version that exists; None where it was not scored.

        A version that does not exist never wins, one whose score is unknown wins no comparison, and without a score of
        the winner its bounds are not met.
        """
        unknown = False
        winner = "ori"
        for newer, rule in (("Q", self.instruction), ("A", self.response)):
            name = newer if winner == "ori" else "QA"
            if name not in scores:
                continue
            kept = rule.keeps(scores[name], scores.get(winner))
            unknown |= kept is None
            winner = name if kept else winner
        found = scores.get(winner) or Ratios()
        for metric, (lowest, bound) in self.bounds.items():
            value = found.known(metric)
            if value is None:
                return Decision(winner, False, "unscored")
            if not lowest <= value < bound:
                return Decision(winner, False, "out_of_bounds")
        if winner not in self.emit:
            return Decision(winner, False, "unscored" if unknown else "not_wanted")
        return Decision(winner, True)


BOUNDS = {"rifd": (0.0, 1.0), "ifd": (0.0, 1.0)}
PRESETS: dict[str, SelectionPolicy] = {
    "v1": SelectionPolicy("v1", Rule(direction=ALWAYS), Rule("rifd", ALWAYS)),
    "v2-paper": SelectionPolicy("v2-paper", bounds=BOUNDS, emit=("QA", "A")),
    "v2-keep-all": SelectionPolicy("v2-keep-all", bounds=BOUNDS),
}


def load_policy(name: str) -> SelectionPolicy:
    """A preset by its name, or a YAML file with the fields of `SelectionPolicy`. Raises `RequestError`."""
    if name in PRESETS:
        return PRESETS[name]
    if not Path(name).is_file():
        raise RequestError(f"policy {name!r} is neither a file nor one of {', '.join(PRESETS)}")
    from paper_tables.yamlfile import read_yaml

    given: dict[str, Any] = dict(read_yaml(Path(name)))
    known = [f.name for f in fields(SelectionPolicy)]
    if unknown := [key for key in given if key not in known]:
        raise RequestError(f"{name}: unknown key {unknown[0]!r}; known are {', '.join(known)}")
    try:
        for part in ("instruction", "response"):
            if part in given:
                given[part] = Rule(**given[part])
        if "bounds" in given:
            given["bounds"] = {metric: tuple(bound) for metric, bound in given["bounds"].items()}
        if "emit" in given:
            given["emit"] = tuple(given["emit"])
    except (TypeError, AttributeError) as error:
        raise RequestError(f"{name}: {error}; see configs/policy.yaml for the form") from None
    return SelectionPolicy(**{"name": Path(name).stem} | given)


def as_data(policy: SelectionPolicy) -> dict[str, Any]:
    """The policy as strict JSON has it."""
    found = asdict(policy)
    return found | {"bounds": {k: list(v) for k, v in policy.bounds.items()}, "emit": list(policy.emit)}
