"""Drop attention, feed-forwards or whole blocks from a model, in place, keeping generation and saving right."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from . import kv
from .errors import RequestError, UnsupportedArchitectureError
from .expert_surgery import resize
from .lean import VERSION, apply_edit, become_lean, become_stock, needs_lean
from .loading import quiet
from .structure import Anatomy, Block, Kind, Sublayer, anatomy, text_config

Bias = Mapping[tuple[Kind, int], Tensor]

PER_LAYER = (
    "layer",
    "attention",
    "expert",
    "moe",
    "types",
)  # in the names of settings that are a list with one entry a block
INDEX_LISTS = ("mlp_only_layers", "moe_layers")  # settings that are a list of block numbers
NOT_SETTINGS = ("layer_idx", "training", "gradient_checkpointing", "_is_hf_initialized")


def drop(
    model: Any, attention: Iterable[int] = (), mlp: Iterable[int] = (), bias: Bias | None = None, check: bool = True
) -> Any:
    """Drop sublayers of `model` in place and return it.

    `attention` and `mlp` are block indices counted in the ORIGINAL model, so that plans compose. A block that loses
    both sublayers is removed from the stack; the result of whole-block drops alone is a stock model. With `bias`, a
    dropped sublayer (kind, original index) is replaced by adding that vector, [hidden_size], to the residual stream.

    Raises `RequestError` (indices out of range, twice, or already dropped; no attention left) before anything changes,
    and `UnsupportedArchitectureError` for a model that cannot be read. `check` compares cached with uncached logits
    on four tokens afterwards.
    """
    plan = {"attention": _indices("attention", attention), "mlp": _indices("mlp", mlp)}
    if not any(plan.values()):
        return model
    a = anatomy(model)
    _refuse_bad_plan(a, plan)
    constants = dict(bias or {})
    _refuse_bad_bias(a, plan, constants)
    removed, edits = _edits(a, plan, constants)
    config = _config_without(a, removed)  # refuses before the model is touched
    lean = _lean_section(a, removed, edits)
    stack = model.get_submodule(a.stack_name)
    for edit in edits:
        apply_edit(stack[edit["block"]], edit, _constant(stack[edit["block"]], edit, constants, a))
    _remove_blocks(model, a, stack, removed, config)
    model.config.lean = lean
    (become_lean if needs_lean(lean) else become_stock)(model)
    if check:
        kv.self_check(model)
    return model


def _indices(kind: str, given: Iterable[int]) -> list[int]:
    indices = [int(i) for i in given]
    twice = sorted({i for i in indices if indices.count(i) > 1})
    if twice:
        raise RequestError(f"{kind} {twice} given more than once; name each block once")
    return sorted(indices)


def _refuse_bad_plan(a: Anatomy, plan: dict[str, list[int]]) -> None:
    last = a.num_original_layers - 1
    for kind, indices in plan.items():
        outside = [i for i in indices if not 0 <= i <= last]
        if outside:
            raise RequestError(f"{kind} {outside} out of range; this model has blocks 0 to {last}")
        gone = sorted(set(indices) & set(a.dropped_attention if kind == "attention" else a.dropped_mlp))
        if gone:
            raise RequestError(f"{kind} {gone} already dropped from this model; indices count in the original model")
    kept = set(range(a.num_original_layers)) - set(a.dropped_attention) - set(plan["attention"])
    if not kept:
        raise RequestError(
            f"at least one attention layer must stay; {len(plan['attention'])} of "
            f"{a.num_original_layers - len(a.dropped_attention)} were to be dropped"
        )


def _refuse_bad_bias(a: Anatomy, plan: dict[str, list[int]], bias: dict[tuple[Kind, int], Tensor]) -> None:
    width = a.model.get_submodule(a.embeddings).weight.shape[-1]
    for (kind, index), vector in bias.items():
        if index not in plan.get(kind, ()):
            raise RequestError(f"bias given for {kind} {index}, which is not dropped")
        if vector.shape != (width,) or not bool(torch.isfinite(vector).all()):
            raise RequestError(
                f"bias of {kind} {index} must be {width} finite numbers, got shape {tuple(vector.shape)}"
            )


def _edits(
    a: Anatomy, plan: dict[str, list[int]], bias: dict[tuple[Kind, int], Tensor]
) -> tuple[list[int], list[dict[str, Any]]]:
    """Blocks to remove (present indices), and the edits of blocks that keep something or need a constant."""
    removed: list[int] = []
    edits: list[dict[str, Any]] = []
    constants = {e["block"] for e in a.edits if e["bias"]}
    for original, block in zip(a.original_index, a.blocks, strict=True):
        going = [s for s in block.sublayers if original in plan[s.kind]]
        constant = block.index in constants or any(index == original for _, index in bias)
        if going and len(going) == len(block.sublayers) and not constant:
            removed.append(block.index)
            continue
        for sub in going:
            norms = [n for n in sub.own_norms if not isinstance(block.module.get_submodule(n), nn.Dropout)]
            edits.append(
                {
                    "block": block.index,
                    "original": original,
                    "name": sub.name,
                    "norms": norms,
                    "layout": block.layout,
                    "returns": block.returns,
                    "drops_returns": sub.returns,
                    "drops_scale": sub.scale,
                    "bias": (sub.kind, original) in bias,
                    "kept": _kept(a, block, sub),
                }
            )
    return removed, edits


def _kept(a: Anatomy, block: Block, going: Sublayer) -> dict[str, Any]:
    """The sublayer that stays when `going` goes; where it went earlier, leaving a constant, the stand-in for it."""
    for s in block.sublayers:
        if s is not going:
            return {"kind": s.kind, "name": s.name, "pre": list(s.pre), "post": list(s.post),
                    "scale": s.scale, "returns": s.returns}  # fmt: skip
    earlier = next(e for e in a.edits if e["block"] == block.index)
    return {"kind": "mlp" if going.kind == "attention" else "attention", "name": earlier["name"], "pre": [], "post": [],
            "scale": earlier["drops_scale"], "returns": earlier["drops_returns"]}  # fmt: skip


def _constant(
    block: nn.Module, edit: dict[str, Any], bias: dict[tuple[Kind, int], Tensor], a: Anatomy
) -> Tensor | None:
    kind: Kind = "attention" if edit["kept"]["kind"] == "mlp" else "mlp"
    vector = bias.get((kind, edit["original"]))
    if vector is None:
        return None
    like = next(p for p in block.parameters() if p.is_floating_point())
    device = getattr(getattr(block, "_hf_hook", None), "execution_device", None)  # where weights are offloaded
    scale = 1.0 if kind == "attention" else edit["drops_scale"]  # the block scales what its feed-forward returns
    return (vector.detach() / scale).to(dtype=like.dtype, device=like.device if device is None else device)


def _lean_section(a: Anatomy, removed: list[int], edits: list[dict[str, Any]]) -> dict[str, Any]:
    """What config.json says: every edit so far, with block numbers of the new stack."""
    kept = [b.index for b in a.blocks if b.index not in removed]
    new_index = {old: new for new, old in enumerate(kept)}
    moved = [{**e, "block": new_index[e["block"]]} for e in (*a.edits, *edits) if e["block"] in new_index]
    before = (getattr(a.model.config, "lean", None) or {}).get("experts")
    gone = {e["block"] for e in edits if e["kept"]["kind"] == "attention"}  # these lose their experts with the rest
    experts = {"experts": [None if i in gone else before[i] for i in kept]} if before else {}
    return experts | {
        "version": VERSION,
        "base_model_type": a.model.config.model_type.removeprefix("lean_"),
        "stack": a.stack_name,
        "hidden_size": a.model.get_submodule(a.embeddings).weight.shape[-1],
        "num_original_layers": a.num_original_layers,
        "original_index": [a.original_index[i] for i in kept],
        "dropped_attention": _now_dropped(a, "attention", edits, removed),
        "dropped_mlp": _now_dropped(a, "mlp", edits, removed),
        "edits": moved,
    }


def _now_dropped(a: Anatomy, kind: Kind, edits: list[dict[str, Any]], removed: list[int]) -> list[int]:
    before = a.dropped_attention if kind == "attention" else a.dropped_mlp
    now = [e["original"] for e in edits if e["kept"]["kind"] != kind]
    return sorted({*before, *now, *(a.original_index[i] for i in removed)})


def _config_without(a: Anatomy, removed: list[int]) -> dict[str, Any]:
    """New values of the text config's per-layer settings once blocks `removed` are gone.

    Raises `UnsupportedArchitectureError` where no stock config describes the blocks that stay.
    """
    if not removed:
        return {}
    config = text_config(a.model)
    depth, kept = len(a.blocks), [b.index for b in a.blocks if b.index not in removed]
    values: dict[str, Any] = {"num_hidden_layers": len(kept)}
    for name, value in config.to_dict().items():
        if isinstance(value, (list, tuple)) and len(value) == depth and any(w in name for w in PER_LAYER):
            values[name] = [value[i] for i in kept]
    for name in INDEX_LISTS:
        if isinstance(indices := getattr(config, name, None), list):
            values[name] = [new for new, old in enumerate(kept) if old in indices]
    if isinstance(dense := getattr(config, "first_k_dense_replace", None), int):
        values["first_k_dense_replace"] = sum(old < dense for old in kept)
    if (getattr(config, "decoder_sparse_step", None) or 1) > 1:  # experts in every nth block: say which are dense
        values["decoder_sparse_step"] = 1
        values["mlp_only_layers"] = [new for new, old in enumerate(kept) if a.blocks[old].experts is None]
    _refuse_unlike(a, kept, values)
    return values


def _refuse_unlike(a: Anatomy, kept: list[int], values: dict[str, Any]) -> None:
    """A model built from the new config must have the blocks that stay: same tensors, same settings in every module.

    This is what notices rules of a kind unknown here (every 4th layer without rotary embeddings, scales by depth).
    """
    config = copy.deepcopy(a.model.config)
    for name, value in values.items():
        setattr(config.get_text_config(decoder=True), name, value)
    base = getattr(type(a.model), "lean_base", type(a.model))
    with torch.device("meta"), quiet():
        stack = base(config).get_submodule(a.stack_name)
    if counts := (getattr(config, "lean", None) or {}).get("experts"):
        resize(stack, [counts[i] for i in kept])
    edited = {e["block"] for e in a.edits}
    for new, old in zip(stack, kept, strict=True):
        theirs: dict[str, Any] = dict(new.named_modules())
        for name, module in a.blocks[old].module.named_modules():
            other = theirs.get(name)
            if other is not None and type(other) is getattr(type(module), "lean_base", type(module)):
                same = _settings(module, other) == _settings(other, module)
            else:  # quantisers and adapters stand where a Linear was; their inside has no counterpart
                same = old in edited or other is None or isinstance(other, nn.Linear)
            if not same:
                raise UnsupportedArchitectureError(
                    f"{type(a.model).__name__}: block {old} would not be the same block in a shallower model (its "
                    f"{name or 'own settings'} depend on its number), so blocks cannot be removed; drop attention or "
                    "feed-forwards alone"
                )


def _settings(module: nn.Module, other: nn.Module) -> dict[str, Any]:
    """What `module`'s config and number made it: plain attributes, where `other` has them too, and tensor shapes."""
    plain = {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, (int, float, str, type(None))) and name in vars(other) and name not in NOT_SETTINGS
    }
    tensors = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    return plain | {f"{n} (tensor)": tuple(t.shape) for n, t in tensors if n != "lean_bias"}


def _remove_blocks(
    model: Any, a: Anatomy, stack: nn.ModuleList, removed: list[int], config_values: dict[str, Any]
) -> None:
    for index in reversed(removed):
        del stack[index]
    for index, block in enumerate(stack):
        module: Any
        for module in block.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = index
    config = text_config(model)
    for name, value in config_values.items():
        setattr(config, name, value)
