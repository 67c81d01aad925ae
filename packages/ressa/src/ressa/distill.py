"""The objective of RESSA: (1 - w) L_task + w L_KD, with an optional loss on the connector's output (section 3)."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from model_hooks.errors import RequestError
from ressa.encoding import IGNORED
from ressa.teachercache import Answers, targets_of

FEATURES = "image_hidden_states"  # of an output: the images' vectors, as the connector gives them
NO_FEATURES = f"this model's output has no {FEATURES}, so feature_weight must be 0"


@dataclass(frozen=True)
class Objective:
    """Called with the outputs of student and teacher and the labels; gives the loss and its parts.

    Args:
        kl_weight: w, 0 to 1.
        temperature: T, of both sides; "ours" multiplies by T squared, so that gradients keep their size.
        positions: Tokens where L_KD counts: target (those with a label), text (all but images and padding) or all (all
            but padding). A decoder behind a text encoder has only such with a label, so there they are all the same.
        loss_mode: ours, the mean over these tokens; or original, the sum over all positions divided by the batch size,
            without T squared, as the authors' code computes it.
        feature_weight: Of 1 - cosine between the images' vectors that both hand to the language model.
        image_token_id: Needed for positions text.
        shift: Logits at t predict the label at t + 1; False for models with a text encoder.

    Raises:
        RequestError: a value is not accepted; vocabularies differ; there is no token to learn from.
    """

    kl_weight: float = 0.5
    temperature: float = 2.0
    positions: str = "target"
    loss_mode: str = "ours"
    feature_weight: float = 0.0
    image_token_id: int | None = None
    shift: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.kl_weight <= 1 or not self.temperature > 0 or self.feature_weight < 0:
            raise RequestError(
                f"kl_weight {self.kl_weight}, temperature {self.temperature}, feature_weight {self.feature_weight}: "
                "0 to 1, above 0 and 0 or more are accepted"
            )
        if self.positions not in ("target", "text", "all") or self.loss_mode not in ("ours", "original"):
            raise RequestError(
                f"positions {self.positions!r} and loss_mode {self.loss_mode!r}: target, text or all, and ours or "
                "original are accepted"
            )

    def __call__(
        self, student: Any, teacher: Any, labels: Tensor, inputs: dict[str, Tensor] | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss and its detached parts task, kd and feature.

        Args:
            student: The model's output, with logits [B, T, V].
            teacher: The same of the dense model; or its `Answers` from a cache at the batch's tokens with a label; or
                None: the task alone.
            labels: [B, T], -100 where there is none.
            inputs: The batch, for positions text and all: input_ids and attention_mask.
        """
        logits, targets = self._aligned(student.logits), labels[:, 1:] if self.shift else labels
        if bool((targets == IGNORED).all()):
            raise RequestError("all labels of a batch are -100: none of its examples has an answer to learn from")
        task = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED)
        parts = {"task": task.detach()}
        if teacher is None:
            return task, parts
        loss = (1 - self.kl_weight) * task
        if self.kl_weight:
            if isinstance(teacher, Answers):
                chosen = targets_of(student.logits, labels, self.shift)
                kd = teacher.divergence(chosen, self.temperature) * self.temperature**2 / len(chosen)
            else:
                kd = self.divergence(student.logits, teacher.logits, labels, inputs)
            loss, parts["kd"] = loss + self.kl_weight * kd, kd.detach()
        if self.feature_weight:
            feature = _feature(student, teacher)
            loss, parts["feature"] = loss + self.feature_weight * feature, feature.detach()
        return loss, parts

    def divergence(
        self, student: Tensor, teacher: Tensor, labels: Tensor, inputs: dict[str, Tensor] | None = None
    ) -> Tensor:
        """KL(teacher || student) of logits [B, T, V]; no gradient reaches the teacher."""
        if student.shape != teacher.shape:
            raise RequestError(
                f"the teacher's vocabulary has {teacher.shape[-1]} words and the student's {student.shape[-1]} (logits "
                f"{list(teacher.shape)} and {list(student.shape)}); give the dense model of the same kind"
            )
        temperature = self.temperature
        if self.loss_mode == "original":
            ours, theirs = student, teacher
            scale = 1 / student.shape[0]
        else:
            chosen = self._chosen(labels, inputs)
            ours, theirs = self._aligned(student)[chosen], self._aligned(teacher)[chosen]
            scale = temperature**2 / len(ours)
        ours = F.log_softmax(ours.float() / temperature, -1)
        theirs = F.log_softmax(theirs.detach().float() / temperature, -1)
        return F.kl_div(ours, theirs, reduction="sum", log_target=True) * scale

    def _aligned(self, logits: Tensor) -> Tensor:
        return logits[:, :-1] if self.shift else logits

    def _chosen(self, labels: Tensor, inputs: dict[str, Tensor] | None) -> Tensor:
        """Where the divergence counts, bool, aligned with the logits: places whose next token is wanted."""
        if self.positions == "target" or not self.shift:
            chosen = labels != IGNORED
        else:
            chosen = self._real(labels, inputs)
        chosen = chosen[:, 1:] if self.shift else chosen
        if not bool(chosen.any()):
            raise RequestError(f"no token of a batch counts with positions {self.positions}")
        return chosen

    def _real(self, labels: Tensor, inputs: dict[str, Tensor] | None) -> Tensor:
        if inputs is None:
            raise RequestError(
                f"positions {self.positions} needs the batch's input_ids and attention_mask; give inputs"
            )
        chosen = torch.ones_like(labels, dtype=torch.bool)
        if "attention_mask" in inputs:
            chosen &= inputs["attention_mask"].bool()
        if self.positions == "text":
            if self.image_token_id is None:
                raise RequestError("positions text needs image_token_id, to tell text from images")
            chosen &= inputs["input_ids"] != self.image_token_id
        return chosen


def _feature(student: Any, teacher: Any) -> Tensor:
    """1 - mean cosine of the connectors' outputs, each a tensor [images, tokens, H] or [tokens, H] or several such."""
    ours, theirs = (getattr(output, FEATURES, None) for output in (student, teacher))
    if ours is None or theirs is None:
        raise RequestError(NO_FEATURES)
    pairs = [(ours, theirs)] if isinstance(ours, Tensor) else list(zip(ours, theirs, strict=True))
    alike = [F.cosine_similarity(a.float(), b.detach().float(), dim=-1).flatten() for a, b in pairs]
    return 1 - torch.cat(alike).mean()


def has_features(model: Any) -> bool:
    """Whether the outputs of `model`, with or without adapters, have what `feature_weight` compares: by the classes
    that its forward says it returns."""
    plain = model.get_base_model() if hasattr(model, "get_base_model") else model
    said = inspect.signature(type(plain).forward, eval_str=True).return_annotation
    return any(FEATURES in getattr(kind, "__dataclass_fields__", ()) for kind in get_args(said) or (said,))
