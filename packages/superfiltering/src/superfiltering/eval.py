"""How good is a student: the loss on the answers of held-out records, and any lm-eval task.

python -m superfiltering.eval MODEL --data heldout.jsonl       # = superfiltering eval
"""

from __future__ import annotations

if __name__ == "__main__":
    import sys

    from superfiltering.cli import app

    app(["eval", *sys.argv[1:]], prog_name="python -m superfiltering.eval")
