"""The entry point for launchers: python -m loki.eval MODEL --basis FILE is `loki eval`."""

if __name__ == "__main__":
    import sys

    from loki.cli import app

    app(["eval", *sys.argv[1:]], prog_name="python -m loki.eval")
