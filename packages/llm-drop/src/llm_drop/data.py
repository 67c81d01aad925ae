from model_hooks.text import load_sequences  # import it from model_hooks.text directly
