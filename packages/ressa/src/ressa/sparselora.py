"""SparseLoRA as a PEFT method of its own, type SPARSELORA (section 3 of the paper).

Importing this module registers it. A process that has not done so fails on such an adapter with KeyError 'SPARSELORA',
instead of taking it for a plain LoRA that would destroy the zeros.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from peft import LoraConfig, PeftType, get_peft_model
from peft.tuners.lora import LoraModel
from peft.utils import register_peft_method
from torch import Tensor, nn

from model_hooks.errors import RequestError
from ressa import masks as mask_files
from ressa.branches import BRANCHES, Branches, find_branches
from ressa.layers import BACKWARDS, SparseLoraLinear
from ressa.masks import weight_at

NAME = "SPARSELORA"
REFUSED = (
    "use_dora",
    "lora_bias",
    "layer_replication",
    "target_parameters",
    "modules_to_save",
    "trainable_token_indices",
)


def _register() -> None:
    """Add the type to PEFT's list, which takes no other."""
    if NAME not in PeftType.__members__:
        member = str.__new__(PeftType, NAME)
        member._name_, member._value_ = NAME, NAME
        PeftType._member_map_[NAME] = member
        PeftType._value2member_map_[NAME] = member
        PeftType._member_names_.append(NAME)
        type.__setattr__(PeftType, NAME, member)
    register_peft_method(name="sparselora", config_cls=SparseLoraConfig, model_cls=SparseLoraModel, prefix="lora_")


@dataclass
class SparseLoraConfig(LoraConfig):
    """LoraConfig whose updates are masked; the masks lie beside `adapter_config.json` and are checked when loaded.

    Args:
        backward: exact, ste or auto.
        update: masked, or dense (plain LoRA on the pruned weight, for comparison).
        vision_path, language_path: Where these branches are in the base model.
    """

    backward: str = field(default="exact", metadata={"help": "exact, ste or auto"})
    update: str = field(default="masked", metadata={"help": "masked or dense"})
    vision_path: str = field(default="", metadata={"help": "path of the vision tower"})
    language_path: str = field(default="", metadata={"help": "path of the language model"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType[NAME]
        if self.backward not in BACKWARDS or self.update not in ("masked", "dense"):
            raise RequestError(
                f"backward {self.backward!r} and update {self.update!r}: exact, ste or auto, and masked or dense are "
                "accepted"
            )
        for name in REFUSED:
            if getattr(self, name, None):
                raise RequestError(f"{name} does not go with masked adapters; leave it out")
        self.masks: dict[str, Tensor] = {}
        self.hashes: dict[str, dict[str, str]] = {}
        self.dense: dict[str, Tensor] = {}

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        super().save_pretrained(save_directory, **kwargs)
        mask_files.write_masks(os.path.join(save_directory, mask_files.FILE), self.masks, self.hashes)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any) -> Any:
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        file = os.path.join(pretrained_model_name_or_path, subfolder or "", mask_files.FILE)
        if not os.path.isdir(pretrained_model_name_or_path):
            from huggingface_hub import hf_hub_download

            hub = {k: kwargs[k] for k in ("revision", "token", "cache_dir") if kwargs.get(k) is not None}
            file = hf_hub_download(pretrained_model_name_or_path, mask_files.FILE, subfolder=subfolder, **hub)
        config.masks, config.hashes = mask_files.read_masks(file)
        return config


class SparseLoraModel(LoraModel):
    """PEFT's LoRA tuner with masked layers.

    Masked layers that get no adapter are zeroed in place where the base is dense; `held` keeps their dense weights,
    which `teacher.dense` puts in for its time.
    """

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        config = self.peft_config[adapter_name]
        if not config.masks:
            raise RequestError("masked adapters need masks; make them with `ressa.attach`, or load a folder of theirs")
        if not hasattr(self, "held"):
            self.held: dict[str, Tensor] = {}
        _refuse(model, config.masks)
        if config.hashes:
            mask_files.verify(model, config.masks, config.hashes)
        else:
            config.hashes = {
                path: {
                    "mask": mask_files.digest(mask),
                    "weight": mask_files.weight_digest(weight_at(model, path), mask),
                }
                for path, mask in config.masks.items()
            }
        self._refuse_other_masks(adapter_name, config)
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        self._zero_the_rest(model, config)

    def _refuse_other_masks(self, adapter_name: str, config: SparseLoraConfig) -> None:
        """All adapters of a model have the same masks: one weight cannot have two sets of zeros."""
        for name, other in self.peft_config.items():
            for path in config.masks.keys() | other.masks.keys():
                ours, theirs = (c.hashes.get(path, {}).get("mask") for c in (config, other))
                if ours != theirs and other.hashes:
                    raise mask_files.MaskMismatchError(
                        f"{path}: adapter {adapter_name} has mask {ours}, adapter {name} has {theirs}; give adapters "
                        "of the same masks"
                    )

    def _create_new_module(self, lora_config: Any, adapter_name: str, target: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        path = kwargs["target_name"]
        if not isinstance(target, nn.Linear):
            raise RequestError(f"{path} is {type(target).__name__}; adapters go on linear layers")
        kwargs.pop("device_map", None)
        mask, dense = lora_config.masks.get(path), lora_config.dense.get(path)
        return SparseLoraLinear(target, adapter_name, config=lora_config, mask=mask, dense=dense, **kwargs)

    @torch.no_grad()
    def _zero_the_rest(self, model: nn.Module, config: SparseLoraConfig) -> None:
        for path, mask in config.masks.items():
            if isinstance(model.get_submodule(path), SparseLoraLinear) or path in self.held:
                continue
            weight, gone = weight_at(model, path), ~mask
            if path in config.dense:
                self.held[path] = config.dense[path]
            elif bool((weight[gone.to(weight.device)] != 0).any()):
                self.held[path] = weight.detach().clone()
            weight.masked_fill_(gone.to(weight.device), 0)

    def unload(self) -> Any:
        """The base model as it was before the adapters."""
        for path, weight in self.held.items():
            weight_at(self.model, path).data = weight.to(weight_at(self.model, path).device)
        return super().unload()


def _refuse(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Raise `RequestError` for weights that are quantised, or split over processes."""
    for path in masks:
        weight = weight_at(model, path)
        if not weight.is_floating_point():
            raise RequestError(f"{path} holds {weight.dtype}; load the base without quantisation")
        if hasattr(weight, "ds_id"):
            raise RequestError(f"{path} is split over processes by ZeRO-3, which masks do not go with; use ZeRO-2")


def attach(
    model: Any, masks: Mapping[str, Tensor], *, rank: int | Mapping[str, int] = 16, alpha: float = 16.0,
    branches: Branches | None = None, targets: Sequence[str] = (), backward: str = "exact", update: str = "masked",
    dropout: float = 0.0, seed: int = 0, dense: Mapping[str, Tensor] | None = None,
) -> Any:  # fmt: skip
    """`model`, dense or pruned, with masked adapters: a PeftModel. Everything else is frozen.

    Args:
        masks: Path -> bool [out, in] of every pruned matrix, True = kept.
        rank: Of all adapters, or by branch; branches without one get no adapters. Default: all three.
        alpha: The update's scale is alpha / rank.
        branches: Of the model, where they are known already.
        targets: Paths, parts of paths or patterns with *: only these of the branches' layers get adapters.
        backward: exact; ste, without the mask in the adapters' gradients; auto, ste until `set_backward` is called.
        update: masked; dense adds an unmasked update, for comparison: it cannot be merged.
        dense: Dense weights by path, where a method has moved those that stayed (`Pruned.dense`).

    Raises:
        RequestError: a rank below 1, targets that fit nothing, masks of other modules, a quantised base.
    """
    found = branches or find_branches(model)
    ranks = dict.fromkeys(BRANCHES, rank) if isinstance(rank, int) else dict(rank)
    for name, value in ranks.items():
        if name not in BRANCHES or value < 1:
            raise RequestError(f"rank {value} of {name!r} is not accepted; 1 or more of vision, connector or language")
    if not alpha > 0 or not masks:
        raise RequestError(
            f"alpha is {alpha} with {len(masks)} masks; a number above 0 and at least one mask are needed"
        )
    for path, mask in masks.items():
        if weight_at(model, path).shape != mask.shape:
            raise mask_files.MaskMismatchError(
                f"{path}: the mask is {list(mask.shape)}, the weight {list(weight_at(model, path).shape)}"
            )
    chosen = _targets(found, masks, ranks, targets)
    torch.manual_seed(seed)
    used = {name: value for name, value in ranks.items() if chosen[name]}
    config = SparseLoraConfig(
        r=next(iter(used.values())), lora_alpha=cast(int, alpha), lora_dropout=dropout, backward=backward,
        update=update, target_modules=[path for paths in chosen.values() for path in paths], vision_path=found.vision,
        language_path=found.language,
        rank_pattern={path.replace(".", r"\."): used[name] for name in used for path in chosen[name]}
        if len(set(used.values())) > 1 else {},
    )  # fmt: skip
    config.masks = {path: mask.bool().cpu() for path, mask in masks.items()}
    config.dense = dict(dense or {})
    return get_peft_model(model, config)


def _targets(
    found: Branches, masks: Mapping[str, Tensor], ranks: Mapping[str, int], targets: Sequence[str]
) -> dict[str, list[str]]:
    """The layers of each branch that get adapters: the masked ones, and all linear ones of the connector."""
    from ressa.branches import matches

    chosen: dict[str, list[str]] = {name: [path for path in masks if found.of(path) == name] for name in ranks}
    if "connector" in ranks:
        chosen["connector"] = list(found.linears("connector"))
    everything = [path for paths in chosen.values() for path in paths]
    for pattern in targets:
        if not any(matches(path, pattern) for path in everything):
            raise RequestError(f"target {pattern!r} fits no layer of {', '.join(ranks)}; one is {everything[:1]}")
    if targets:
        chosen = {name: [p for p in paths if any(matches(p, t) for t in targets)] for name, paths in chosen.items()}
    if not any(chosen.values()):
        raise RequestError(
            f"no masked or connector layer lies in {', '.join(ranks) or 'no branch'}; choose other branches"
        )
    return chosen


def set_backward(model: nn.Module, backward: str) -> None:
    """Change the backward pass of all masked layers: exact or ste."""
    if backward not in BACKWARDS:
        raise RequestError(f"backward {backward!r} is not accepted; give exact, ste or auto")
    for module in model.modules():
        if isinstance(module, SparseLoraLinear):
            module.backward = backward


_register()
