"""Losses of responses under a language model, with and without their prompts, for any number of pairs and processes."""

from .engine import score
from .pairs import Encoder, Pair, Segment
from .results import SCHEMA, Scores, merge
from .shards import WINDOW, Shard

__all__ = ["SCHEMA", "WINDOW", "Encoder", "Pair", "Scores", "Segment", "Shard", "merge", "score"]
