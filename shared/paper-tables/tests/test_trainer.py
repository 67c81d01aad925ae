"""What all trainers of the workspace share."""

from __future__ import annotations

import pytest

transformers = pytest.importorskip("transformers", reason="needs the extra [train] of a package")
pytest.importorskip("accelerate")


def test_a_checkpoint_is_called_whole_when_all_processes_have_written(monkeypatch, tmp_path):
    from paper_tables.trainer import WholeCheckpoints

    class Trainer(WholeCheckpoints, transformers.Trainer):
        pass

    said = []
    monkeypatch.setattr(transformers.Trainer, "_save_rng_state", lambda self, folder: said.append("own file"))
    trainer = Trainer.__new__(Trainer)
    trainer.accelerator = type("All", (), {"wait_for_everyone": lambda self: said.append("waited")})()
    trainer._save_rng_state(str(tmp_path))
    assert said == ["own file", "waited"]
