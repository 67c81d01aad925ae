"""The lean model types are known in every order of imports, and importing model_hooks alone costs next to nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from families import VOCAB, build

from model_hooks import Card, drop, save
from model_hooks.registration import register

# In a process that has neither transformers nor model_hooks yet; FOLDER holds a lean_llama.
LOAD = "model = AutoModelForCausalLM.from_pretrained(FOLDER)\nassert type(model).__name__ == 'LeanLlamaForCausalLM'"
ORDERS = {
    "ours first": "import model_hooks, transformers",
    "transformers first": "import transformers, model_hooks",
    "the table first": "import transformers.models.auto.configuration_auto, model_hooks",
    "Auto class first": f"from transformers import AutoModelForCausalLM\nimport model_hooks\n{LOAD}",
    "the Auto classes' own module, then a configuration": "import model_hooks, transformers.models.auto.modeling_auto\n"
    "config = transformers.AutoConfig.from_pretrained(FOLDER)\n"
    "assert type(config).__name__ == 'LeanLlamaConfig'",
    "another thread imports it meanwhile": "import importlib, threading, transformers\n"
    "thread = threading.Thread(target=importlib.import_module, args=['transformers.models.auto.configuration_auto'])\n"
    "thread.start()\nimport model_hooks\nthread.join()",
    "after an import that failed": "import model_hooks, transformers.configuration_utils as needed\n"
    "kept = needed.__dict__.pop('PreTrainedConfig')\n"
    "try: import transformers.models.auto.configuration_auto\n"
    "except ImportError: needed.PreTrainedConfig = kept\n"
    "else: raise SystemExit('the import did not fail')",
}
CHECK = """
import sys
import transformers.models.auto.configuration_auto as table
assert "lean_llama" in table.CONFIG_MAPPING
assert table.__loader__ is table.__spec__.loader
assert type(table.__loader__).__module__ != "model_hooks.registration"
assert [finder for finder in sys.meta_path if type(finder).__module__ == "model_hooks.registration"] == []
"""
# What costs the most and is not the question is imported once; every order has a process of its own.
EACH_IN_A_FORK = """
import contextlib, json, os, sys, torch._dynamo, traceback
with contextlib.suppress(ImportError):  # where it is installed, transformers imports it
    import sklearn.metrics
assert not {"transformers", "model_hooks"} & set(sys.modules)
failed = []
for order, code in json.loads(sys.argv[2]).items():
    child = os.fork()
    if not child:
        try:
            exec(code, {"FOLDER": sys.argv[1]})
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        failed.append(order)
sys.exit(f"failed: {failed}" if failed else 0)
"""


def python(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True)


@pytest.mark.slow
def test_the_types_are_known_in_whatever_order_things_are_imported(tmp_path: Path) -> None:
    folder = save(drop(build("llama"), attention=[0, 2]), tmp_path / "m", card=Card("someone/base", "two dropped"))
    codes = {order: f"{code}\n{CHECK}" for order, code in ORDERS.items()}
    done = python(EACH_IN_A_FORK, folder, json.dumps(codes))
    assert done.returncode == 0, done.stderr[-3000:]


def test_the_import_alone_brings_neither_torch_nor_transformers() -> None:
    code = "import sys, model_hooks; print({'numpy', 'torch', 'transformers'} & set(sys.modules) or 'none')"
    assert python(code).stdout.strip() == "none"


def test_registering_twice_is_harmless_and_cheap() -> None:
    register()
    assert build("llama").config.vocab_size == VOCAB
