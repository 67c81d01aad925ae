"""What the server of processes.py imports once: heavy modules of other people, none of ours."""

from contextlib import suppress
from importlib import import_module

for name in (
    "torch.distributed.fsdp",
    "torch._dynamo",
    "transformers.trainer",
    "transformers.models.llama.modeling_llama",
    "transformers.models.gpt2.modeling_gpt2",
    "accelerate",
    "datasets",
    "peft",
    "deepspeed",
    "trl.trainer.sft_trainer",
    "trl.trainer.dpo_trainer",
):
    with suppress(ImportError):  # an extra that is not installed; its tests skip
        import_module(name)
