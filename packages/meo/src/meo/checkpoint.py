"""Save and load models with banks, whatever their head; what does not fit its config is refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from model_hooks.checkpoint import Card
from model_hooks.errors import RequestError
from model_hooks.files import atomic_folder
from model_hooks.loading import quiet, resolve

from .classes import PREFIX, is_merged

HEADS = {  # the Auto classes that give a model a head
    "classification": "AutoModelForSequenceClassification",
    "clm": "AutoModelForCausalLM",
    "mlm": "AutoModelForMaskedLM",
    "seq2seq": "AutoModelForSeq2SeqLM",
}

USE = """```python
import meo

model, tokenizer = meo.load("this folder")  # or transformers' Auto class, after `import meo`
```"""


def save(
    model: Any, folder: str | Path, tokenizer: Any = None, *, base: str = "a model", overwrite: bool = False,
    source: str | Path | None = None, verify: bool = True,
) -> Path:  # fmt: skip
    """Write a converted model as a checkpoint folder, whole or not at all.

    With `verify` it is loaded again and must have the same tensors, bit for bit. `source`: the folder that it came
    from, never written into. Raises `RequestError` where `model` has no banks or `folder` exists.
    """
    if not is_merged(model):
        raise RequestError("this model has no banks of experts; convert it first")
    record = model.config.meo["config"]
    kept = ("experts", "k", "method", "level", "gate", "gate_scope", "token_block", "init")
    card = Card(
        base, f"meo: {len(model.config.meo['banks'])} linears are banks of experts; `import meo` before loading",
        "arXiv 2310.09832", settings={k: record[k] for k in kept}, use=USE,
    )  # fmt: skip
    with atomic_folder(folder, overwrite, source) as part:
        with quiet():
            model.save_pretrained(part)
            if tokenizer is not None:
                tokenizer.save_pretrained(part)
        (part / "README.md").write_text(card.markdown(model))
        if verify:
            _check(model, part)
    return Path(folder)


def _check(model: Any, folder: Path) -> None:
    again, _ = load(folder, dtype=model.dtype, tokenizer=False)
    state = again.state_dict()
    wrong = [k for k, v in model.state_dict().items() if not torch.equal(v.cpu(), state[k])]
    if wrong:
        raise RuntimeError(f"the saved checkpoint reads back otherwise in {wrong[0]}; nothing was kept")


def load(
    source: str | Path, *, head: str = "", dtype: Any = "auto", tokenizer: bool = True, **kwargs: Any
) -> tuple[Any, Any]:
    """Load a converted model, or a dense one to convert: (model in eval mode, tokenizer or None).

    Args:
        source: checkpoint folder, hub id or zoo:NAME.
        head: classification, clm, mlm or seq2seq: a dense model gets that head, new where its checkpoint has none.
            Empty: the head that the checkpoint was saved with.
        kwargs: go to `from_pretrained`, such as num_labels.

    Raises:
        RequestError: tensors are missing, left over or of another shape (those of a new head aside), no such model.
    """
    if head and head not in HEADS:
        raise RequestError(f"unknown head {head!r}; it is one of {', '.join(HEADS)}")
    where = resolve(source)

    import transformers

    with quiet():
        try:
            kind = getattr(transformers, HEADS[head]) if head else _saved_class(where)
            model, info = kind.from_pretrained(
                where, dtype=dtype, use_safetensors=True, output_loading_info=True, **kwargs
            )
            found = transformers.AutoTokenizer.from_pretrained(where) if tokenizer else None
        except (OSError, RuntimeError, ValueError) as error:
            if isinstance(error, RequestError):
                raise
            raise RequestError(f"cannot load {source}: {str(error).strip().splitlines()[0]}") from error
    _refuse(source, model, info, new_head=bool(head))
    model.eval()
    return model, found


def _saved_class(where: str) -> Any:
    """The class that a checkpoint names."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(where)
    name = (config.architectures or [""])[0]
    if not config.model_type.startswith(PREFIX):
        kind = getattr(transformers, name, None)
    else:
        from .classes import model_class

        kind = model_class(getattr(transformers, name.removeprefix("Meo")))
    if kind is None:
        raise RequestError(f"{where} does not say its class; give the head: {', '.join(HEADS)}")
    return kind


def _refuse(source: Any, model: Any, info: dict[str, Any], new_head: bool) -> None:
    """Raise `RequestError` for what does not fit, unless it belongs to a head that is new or was left out."""
    prefix = model.base_model_prefix
    stem = f"{prefix}." if hasattr(model, prefix) else ""  # T5's body lies beside its head, under no name of its own
    for key, meaning in (
        ("missing_keys", "missing"),
        ("unexpected_keys", "left over"),
        ("mismatched_keys", "misshapen"),
    ):
        names = sorted(str(k[0] if isinstance(k, tuple) else k) for k in info.get(key) or ())
        wrong = [n for n in names if not new_head or (n.startswith(stem) and ".pooler." not in n)]
        if wrong:
            raise RequestError(f"{source}: {len(wrong)} tensors are {meaning}, first {wrong[0]}; nothing was loaded")


def read_config(source: str | Path) -> dict[str, Any]:
    """config.json of a checkpoint folder, or of a hub id or zoo model."""
    where = resolve(source)

    import transformers

    try:
        found: dict[str, Any] = transformers.PretrainedConfig.get_config_dict(where)[0]
    except OSError as error:
        raise RequestError(f"cannot read the config of {source}: {str(error).splitlines()[0]}") from None
    return found
