"""Where the models are, with the choice how several replies to the same messages are asked for."""

from __future__ import annotations

from dataclasses import dataclass

from instruct_data import Journal
from instruct_data.llm import read_key
from instruct_data.llm.client import Backend
from instruct_data.llm.service import Service
from model_hooks.errors import RequestError

N_MODES = ("client", "server")


@dataclass(frozen=True)
class CandidateService(Service):
    """A `Service`. n_mode: client sends a request for each candidate, which every server answers; server sends one for
    all of them, whose prompt is paid for once."""

    n_mode: str = "client"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.n_mode not in N_MODES:
            raise RequestError(f"n-mode {self.n_mode!r}; choose {' or '.join(N_MODES)}")
        if self.n_mode == "server" and self.backend != "server":
            raise RequestError(f"n-mode server needs the backend server, not {self.backend}")

    def make(self, model: str, journal: Journal) -> Backend:
        if self.n_mode == "client":
            return super().make(model, journal)
        from instruct_data.llm.choices import ChoicesEndpoint

        return ChoicesEndpoint(
            self.base_url, read_key(self.key_variable, self.key_file), concurrency=self.concurrency,
            timeout=self.timeout, attempts=self.attempts, requests_per_minute=self.requests_per_minute,
            tokens_per_minute=self.tokens_per_minute,
        )  # fmt: skip
