"""Prints the lm-eval task folder: ``lm_eval --include_path $(python -m model_hooks.zoo.tasks)``."""

from model_hooks.zoo import tasks_dir

print(tasks_dir())
