"""The entry point for launchers: python -m llm_drop.eval MODEL --baseline PARENT is `llm-drop eval`."""

if __name__ == "__main__":
    import sys

    from llm_drop.cli import app

    app(["eval", *sys.argv[1:]], prog_name="python -m llm_drop.eval")
