"""The options of the verbs with requests: `paper_tables.endpoint` for this package's journal."""

from __future__ import annotations

from typing import Any

from paper_tables.endpoint import endpoint_options


def _service(**settings: Any) -> Any:
    from realign.service import CandidateService

    return CandidateService(method="realign", **settings)


service_options = endpoint_options(_service)
