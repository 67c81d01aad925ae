"""The paper's allocation curve: sparsity shared out between vision and language, and what each share costs."""

from __future__ import annotations

import copy
import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from model_hooks.errors import RequestError
from ressa.workflow import Calibration, Where

RATIOS = "10:90,20:80,30:70,40:60,50:50,60:40,70:30,80:20,90:10"


def sweep(
    where: Where, output: Path, ratios: Sequence[tuple[float, float]], how: dict[str, Any], calibration: Calibration,
    *, data: str, samples: int, overwrite: bool = False,
) -> list[dict[str, Any]]:  # fmt: skip
    """Prune at each (vision, language) sparsity and measure; rows go to `output` as JSON and beside it as CSV.

    Each point is written when it is measured: the same command given again measures what is missing. Raises
    `RequestError` where `output` holds another sweep.
    """
    from paper_tables import progress
    from ressa.data import read
    from ressa.encoding import encoder_of
    from ressa.evaluating import evaluate
    from ressa.pruning import Pruning, prune

    settings = {**asdict(where), **how, **asdict(calibration), "measured_on": data, "measured": samples}
    rows = _begun(output, settings, overwrite)
    if all(_find(rows, pair) for pair in ratios):
        return rows
    model, processor, branches = where.load()
    encoder = encoder_of(model.config, processor)
    batches, examples = calibration.batches(encoder), read(data, samples)
    kept = {name: copy.deepcopy(weight.detach()) for name, weight in model.state_dict().items()}
    with progress("points measured", len(ratios)) as bar:
        for vision, language in ratios:
            if not _find(rows, (vision, language)):
                model.load_state_dict(kept)
                one = Pruning(**{**how, "sparsity": max(vision, language), "vision": vision, "language": language})
                report = prune(model, branches, batches, one, image_token_id=encoder.image_token_id).report
                found = evaluate(model, encoder, examples)
                rows.append({"vision": vision, "language": language, "exact": found["exact"]["value"],
                             "exact_se": found["exact"]["se"], "perplexity": found["perplexity"]["value"],
                             "sparsity": report["sparsity"]})  # fmt: skip
                _write(output, settings, rows)
            bar.advance()
    return rows


def _find(rows: list[dict[str, Any]], pair: tuple[float, float]) -> bool:
    return any((row["vision"], row["language"]) == pair for row in rows)


def _begun(output: Path, settings: dict[str, Any], overwrite: bool) -> list[dict[str, Any]]:
    if not output.is_file() or overwrite:
        return []
    try:
        record = json.loads(output.read_text())
        then, rows = record["settings"], record["rows"]
    except (ValueError, KeyError, TypeError):
        raise RequestError(f"{output} is not a sweep; give another --output, or --overwrite") from None
    changed = [k for k in settings if then.get(k) != json.loads(json.dumps(settings[k]))]
    if changed:
        k = changed[0]
        raise RequestError(
            f"{output} holds a sweep with {k} {then.get(k)!r}, now {settings[k]!r}; --overwrite begins again"
        )
    return list(rows)


def _write(output: Path, settings: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    from model_hooks.files import atomic_write

    atomic_write(output, json.dumps({"settings": settings, "rows": rows}, indent=1) + "\n")
    text = io.StringIO()
    table = csv.DictWriter(text, list(rows[0]))
    table.writeheader()
    table.writerows(rows)
    atomic_write(output.with_suffix(".csv"), text.getvalue())
