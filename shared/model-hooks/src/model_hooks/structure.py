"""Find the parts of any decoder-only transformers model by structure and one traced forward pass, never by class list.

Every block is read as two sublayers around a residual stream, `y = x + scale * post(module(pre(x)))`, in one of four
layouts. The reading is checked against the traced numbers: a block that does not compute what its anatomy says raises
`UnsupportedArchitectureError` instead of being misread.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .errors import UnsupportedArchitectureError
from .moe import MixtureOfExperts, mixture_of_experts
from .trace import BlockTrace, Call, trace

Layout = Literal["pre_norm", "sandwich", "post_norm", "parallel"]
Kind = Literal["attention", "mlp"]


@dataclass(frozen=True)
class Sublayer:
    """`x + scale * post(module(pre(x)))`: a token mixer or a feed-forward with the norms that belong to it."""

    kind: Kind
    name: str  # inside the block, e.g. "self_attn"
    module: nn.Module
    pre: tuple[str, ...]  # names inside the block, in the order they act; OPT's fc1 is among them, its fc2 the module
    post: tuple[str, ...]
    shared: tuple[str, ...]  # of those, the ones the other sublayer uses too
    scale: float  # residual multiplier; 1.0 in most models
    returns: int  # 0: the module returns a tensor; n: a tuple of n whose first is the hidden states

    @property
    def own_norms(self) -> tuple[str, ...]:
        """Norms and dropouts (and OPT's fc1) that go when this sublayer goes."""
        return tuple(n for n in dict.fromkeys((*self.pre, *self.post)) if n not in self.shared)


@dataclass(frozen=True)
class Block:
    """One decoder layer. A sublayer that was dropped is None."""

    index: int
    name: str
    module: nn.Module
    layout: Layout
    attention: Sublayer | None
    mlp: Sublayer | None
    returns: int = 0

    @property
    def sublayers(self) -> tuple[Sublayer, ...]:
        return tuple(s for s in (self.attention, self.mlp) if s is not None)

    @cached_property
    def experts(self) -> MixtureOfExperts | None:
        """The experts of the feed-forward, or None where it is dense."""
        return mixture_of_experts(self.mlp.module) if self.mlp else None


@dataclass(frozen=True)
class Anatomy:
    """Where everything is in `model`. Names are module paths from `model`."""

    model: Any
    decoder: Any  # the module that owns the stack and takes input_ids
    decoder_name: str
    stack_name: str
    blocks: tuple[Block, ...]
    embeddings: str
    final_norm: str | None
    head: str | None
    vision_tower: str | None
    connector: str | None
    original_index: tuple[int, ...]  # of each block, counted in the model before anything was dropped
    num_original_layers: int
    edits: tuple[dict[str, Any], ...] = ()  # what was dropped before, as config.json says it

    @property
    def layout(self) -> Layout:
        return self.blocks[0].layout

    @property
    def dropped_attention(self) -> tuple[int, ...]:
        """Original indices of the blocks without attention."""
        return self._dropped("attention")

    @property
    def dropped_mlp(self) -> tuple[int, ...]:
        return self._dropped("mlp")

    def _dropped(self, kind: Kind) -> tuple[int, ...]:
        kept = {o for o, b in zip(self.original_index, self.blocks, strict=True) if getattr(b, kind) is not None}
        return tuple(i for i in range(self.num_original_layers) if i not in kept)

    def __str__(self) -> str:
        lines = [f"{type(self.model).__name__}: {len(self.blocks)} blocks in {self.stack_name}, {self.layout}"]
        for block in self.blocks:
            parts = [f"{s.kind} {s.name}({'+'.join(s.own_norms)})" for s in block.sublayers]
            moe = f", {block.experts.num_experts} experts" if block.experts else ""
            lines.append(f"  {block.index:3d}  {'  '.join(parts)}{moe}")
        return "\n".join(lines)


def text_config(model: Any) -> Any:
    return model.config.get_text_config(decoder=True)


def refuse(model: Any, reason: str) -> UnsupportedArchitectureError:
    return UnsupportedArchitectureError(f"{type(model).__name__} is not supported: {reason}")


def anatomy(model: Any) -> Anatomy:
    """Read the structure of `model` (on any device, any dtype; runs one forward of six tokens, changes nothing).

    Raises `UnsupportedArchitectureError`, naming what was not recognised, for encoder-decoders, recurrent or hybrid
    mixers, shared KV caches, and blocks whose arithmetic is not one of the four layouts.
    """
    if getattr(model.config, "is_encoder_decoder", False):
        raise refuse(model, "it is an encoder-decoder; decoder-only models are")
    stack_name, stack = _stack(model)
    decoder_name = stack_name.rpartition(".")[0]
    decoder = model.get_submodule(decoder_name)
    *traces, top = trace(model, [*stack, decoder])
    if any(t.y is None for t in traces):
        raise refuse(model, f"not every block of {stack_name} ran in a forward pass of text")
    lean = getattr(model.config, "lean", None) or {}
    edits = tuple(lean.get("edits", ()))
    blocks = tuple(
        _read_block(model, index, f"{stack_name}.{index}", module, t, [e for e in edits if e["block"] == index])
        for index, (module, t) in enumerate(zip(stack, traces, strict=True))
    )
    vision_tower, connector = _vision(model, decoder)
    return Anatomy(
        model=model,
        decoder=decoder,
        decoder_name=decoder_name,
        stack_name=stack_name,
        blocks=blocks,
        embeddings=_name_of(model, model.get_input_embeddings()) or "",
        final_norm=next((f"{decoder_name}.{c.name}" for c in top.calls if _same(c.input, traces[-1].y)), None),
        head=_name_of(model, model.get_output_embeddings()),
        vision_tower=vision_tower,
        connector=connector,
        original_index=tuple(lean.get("original_index", range(len(blocks)))),
        num_original_layers=lean.get("num_original_layers", len(blocks)),
        edits=edits,
    )


def _stack(model: Any) -> tuple[str, nn.ModuleList]:
    """The ModuleList of decoder blocks: as long as the text model is deep, outside of any vision tower."""
    depth = getattr(text_config(model), "num_hidden_layers", None)
    vision = [n for n, _ in _vision_modules(model)]
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module) == depth
        and not any(name.startswith(v + ".") for v in vision)
    ]
    found = [f for f in found if not any(f[0].startswith(other + ".") for other, _ in found)]
    if len(found) != 1:
        names = ", ".join(n for n, _ in found) or "none"
        raise refuse(model, f"expected one ModuleList of {depth} decoder blocks, found {names}")
    return found[0]


def _read_block(
    model: Any, index: int, name: str, module: nn.Module, t: BlockTrace, edits: list[dict[str, Any]]
) -> Block:
    where = f"block {index} ({type(module).__name__})"
    if t.x is None or t.x_value is None or t.y is None or t.y.shape != t.x.shape:
        raise refuse(model, f"{where} does not map hidden states to hidden states")
    if edits:
        return _edited_block(index, name, module, edits)
    attention = _attention_call(model, where, t)
    mlp, first_half = _mlp_call(model, where, t, attention)
    a_source, _, a_pre = _before(attention, t)
    m_source, m_value, m_pre = _before(mlp, t, first_half)
    if not _same(a_source, t.x):
        raise refuse(model, f"{where}: {attention.name} does not read the block's input")
    a_post, delta_a = _after(attention, t)
    m_post, delta_m = _after(mlp, t)
    parallel = m_source is a_source
    if parallel:
        scales = _fit(module, t.y, t.x_value, delta_a, delta_m)
        scale_a = scale_m = scales
    else:
        scale_a = _fit(module, m_value, t.x_value, delta_a)
        scale_m = _fit(module, t.y, m_value, delta_m)
    if scale_a is None or scale_m is None:
        overflow = next((c.name for c in t.calls if not bool(c.output_value.isfinite().all())), None)
        if overflow:
            raise refuse(model, f"{where}: {overflow} gives numbers that are not finite in {t.y.dtype}: try float32")
        raise refuse(model, f"{where} is not x + {attention.name}(...) and + {mlp.name}(...) around a residual stream")
    norms_before, norms_after = _weighted(module, a_pre), _weighted(module, a_post)
    layout: Layout = (
        "parallel" if parallel else "pre_norm" if not norms_after else "sandwich" if norms_before else "post_norm"
    )
    shared = tuple(n for n in dict.fromkeys((*a_pre, *a_post)) if n in {*m_pre, *m_post})

    def sublayer(kind: Kind, call: Call, pre: tuple[str, ...], post: tuple[str, ...], scale: float) -> Sublayer:
        return Sublayer(kind, call.name, call.module, pre, post, shared, scale, call.returns)

    return Block(
        index,
        name,
        module,
        layout,
        sublayer("attention", attention, a_pre, a_post, scale_a),
        sublayer("mlp", mlp, m_pre, m_post, scale_m),
        t.returns,
    )


def _edited_block(index: int, name: str, module: nn.Module, edits: list[dict[str, Any]]) -> Block:
    """A block that lost a sublayer (or both, for constants): its structure was written down when that happened."""
    edit = edits[0]
    kept: dict[Kind, Sublayer] = {}
    if len(edits) == 1:
        k = edit["kept"]
        child = module.get_submodule(k["name"])
        kept[k["kind"]] = Sublayer(
            k["kind"], k["name"], child, tuple(k["pre"]), tuple(k["post"]), (), k["scale"], k["returns"]
        )
    return Block(index, name, module, edit["layout"], kept.get("attention"), kept.get("mlp"), edit["returns"])


def _attention_call(model: Any, where: str, t: BlockTrace) -> Call:
    writers = list(dict.fromkeys(t.writers))
    found = [c for c in t.calls if c.name in writers]
    if len(found) != 1:
        kinds = ", ".join(f"{n} ({type(m).__name__})" for n, m in {c.name: c.module for c in t.calls}.items())
        raise refuse(model, f"{where}: one child should write the KV cache, {len(found)} did; its children: {kinds}")
    return found[0]


def _mlp_call(model: Any, where: str, t: BlockTrace, attention: Call) -> tuple[Call, list[Call]]:
    """The call whose output is the feed-forward's, and the calls before it where the block holds the feed-forward's
    matrices itself (OPT's fc1 and fc2): these count as what acts on the input of the last one."""
    others = [c for c in t.calls if c is not attention and not c.elementwise]
    *first_half, last = others or [attention]
    walked = _walk_back(last, t, first_half)
    whole = last.output.numel() == attention.output.numel() == walked[0].input.numel() and set(first_half) <= set(
        walked
    )
    if last is attention or not whole:
        names = ", ".join(f"{c.name} ({type(c.module).__name__})" for c in others) or "none"
        raise refuse(model, f"{where}: expected one feed-forward module beside {attention.name}, found {names}")
    return last, first_half


def _walk_back(call: Call, t: BlockTrace, through: Sequence[Call] = ()) -> list[Call]:
    """The calls, `call` the last, that each read the one before's output: norms, and what is in `through`."""
    chain = [call]
    for c in reversed(t.calls[: t.calls.index(call)]):
        if c.output is chain[0].input and (c.elementwise or c in through):
            chain.insert(0, c)
    return chain


def _before(call: Call, t: BlockTrace, through: Sequence[Call] = ()) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    """Follow norms back from a call's input: the residual tensor they read (object and value) and their names."""
    chain = _walk_back(call, t, through)
    return chain[0].input, chain[0].input_value, tuple(c.name for c in chain[:-1])


def _after(call: Call, t: BlockTrace) -> tuple[tuple[str, ...], Tensor]:
    """Follow norms and dropouts on from a call's output: their names, and the delta that comes out."""
    source, value, names = call.output, call.output_value, []
    for c in t.calls[t.calls.index(call) + 1 :]:
        if c.elementwise and c.input is source:
            source, value = c.output, c.output_value
            names.append(c.name)
    return tuple(names), value


def _same(a: Tensor, b: Tensor | None) -> bool:
    """`a` is the tensor `b`, or its copy on another device (in a model spread over several)."""
    return a is b or (b is not None and a.device != b.device and torch.equal(a.cpu(), b.cpu()))


def _weighted(block: nn.Module, names: tuple[str, ...]) -> tuple[str, ...]:
    """Norms: elementwise children that are not dropouts."""
    return tuple(n for n in names if not isinstance(block.get_submodule(n), (nn.Dropout, nn.Identity)))


def _fit(block: nn.Module, y: Tensor, x: Tensor, *deltas: Tensor) -> float | None:
    """The scale with which `y = x + scale * (sum of deltas)` holds: 1, or a float the block owns; None if none does.

    It holds where each number is right to the rounding of what was added up for it: a bound by the largest number of
    all would let a wrong scale pass in 16 bits, as one large channel hides the rest.
    """
    own = (v for v in vars(block).values() if isinstance(v, float))
    parts = [d.to(y.device).double().reshape(x.shape) for d in deltas]
    stream, size = x.to(y.device).double(), torch.stack([p.abs() for p in parts]).sum(0)
    for scale in dict.fromkeys((1.0, *own)):
        error = (y.double() - stream - scale * torch.stack(parts).sum(0)).abs()
        if bool((error <= 4 * torch.finfo(y.dtype).eps * (stream.abs() + abs(scale) * size)).all()):
            return scale
    return None


def _name_of(model: Any, module: nn.Module | None) -> str | None:
    return next((n for n, m in model.named_modules() if m is module), None) if module is not None else None


def _vision_modules(model: Any) -> list[tuple[str, nn.Module]]:
    """The outermost sub-models that run on `config.vision_config`."""
    vision_config = getattr(model.config, "vision_config", None)
    if vision_config is None:
        return []
    kind = getattr(vision_config, "model_type", None)
    found = [
        (n, m)
        for n, m in model.named_modules()
        if n and getattr(getattr(m, "config", None), "model_type", None) == kind and hasattr(m, "get_input_embeddings")
    ]
    return [f for f in found if not any(f[0].startswith(o + ".") for o, _ in found)]


def _vision(model: Any, decoder: nn.Module) -> tuple[str | None, str | None]:
    """Names of the vision tower and of the connector: the sibling with weights that is neither tower nor decoder, or
    else (Qwen-VL) the tower's own last child that ends at the width of the language model."""
    towers = _vision_modules(model)
    if not towers:
        return None, None
    tower = towers[0][0]
    parent = tower.rpartition(".")[0]
    for name, child in model.get_submodule(parent).named_children():
        path = f"{parent}.{name}" if parent else name
        taken = path == tower or any(m is decoder for m in child.modules()) or child is model.get_output_embeddings()
        if not taken and any(True for _ in child.parameters()):
            return tower, path
    width = text_config(model).hidden_size
    for name, child in reversed(list(model.get_submodule(tower).named_children())):
        linears = [m for m in child.modules() if isinstance(m, nn.Linear)]
        if linears and linears[-1].out_features == width and not isinstance(child, nn.ModuleList):
            return tower, f"{tower}.{name}"
    return tower, None
