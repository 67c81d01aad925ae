"""Gradients and losses against their closed forms; what is pushed where."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from mod_router import attach, routing_context
from mod_router.attaching import routers
from mod_router.objective import Multiplier, paper_penalty, token_losses
from routermodels import build, ids, left_padded, randomise

LAYERS = (1, 2)


def routed(**changes: Any) -> Any:
    model = attach(build(), layers=LAYERS, **changes)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for router in routers(model).values():
        router.weight.requires_grad_(True)
    return model


def gradients(model: Any, loss: torch.Tensor) -> dict[int, torch.Tensor]:
    for router in routers(model).values():
        router.weight.grad = None
    loss.backward()
    return {layer: router.weight.grad.clone() for layer, router in routers(model).items()}


@pytest.mark.parametrize("level", ["sequence", "token"])
def test_routers_decide_in_float32_under_autocast(level: str) -> None:
    """The first layer's input is the same with and without autocast, so its probabilities are."""
    model, x = randomise(attach(build(), layers=(0,), level=level), scale=0.5), ids(3, 6)
    found = []
    for on in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=on), routing_context(train=True) as seen:
            model(input_ids=x, use_cache=False)
        found.append(seen.probabilities[0])
    assert found[1].dtype == torch.float32
    assert torch.equal(*found)


def test_the_straight_through_gradient_is_the_papers() -> None:
    """dL/dw = sum over rows of dL/dg * p (1 - p) * mean_t h, with dL/dg = <dL/dy, A(h)> by the chain rule."""
    model = randomise(routed(), scale=0.3)
    x, mask = left_padded([6, 4, 5, 3, 6, 2, 5])
    states: dict[str, torch.Tensor] = {}

    def keep_input(module: Any, args: Any, kwargs: Any) -> None:
        states["h"] = kwargs["hidden_states"].detach()

    def keep_output(module: Any, args: Any, output: Any) -> None:
        output[0].retain_grad()
        states["y"] = output[0]

    block = model.model.layers[2]
    block.self_attn.register_forward_pre_hook(keep_input, with_kwargs=True)
    block.self_attn.register_forward_hook(keep_output)
    with routing_context(train=True) as seen:
        logits = model(input_ids=x, attention_mask=mask, use_cache=False).logits
    found = gradients(model, logits[mask.bool()].square().mean())[2]
    p, gate = seen.probabilities[2].detach(), seen.gates[2].detach()
    assert set(gate.tolist()) == {0.0, 1.0}
    attention = _attention(model, block, states["h"], mask)  # of every row, closed ones too
    pooled = (states["h"] * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    want = ((states["y"].grad * attention).sum((1, 2)) * p * (1 - p))[:, None] * pooled  # type: ignore[operator]
    assert float(want.abs().min(1).values.max()) > 0
    torch.testing.assert_close(found[0], want.sum(0), atol=1e-6, rtol=1e-4)


def _attention(model: Any, block: Any, h: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The block's attention on normed input h, gates off, as the model calls it."""
    positions = torch.arange(h.shape[1])[None]
    seen = torch.tril(torch.ones(h.shape[1], h.shape[1], dtype=torch.bool))[None, None] & mask.bool()[:, None, None]
    seen = seen | torch.eye(h.shape[1], dtype=torch.bool)
    with torch.no_grad():
        return type(block.self_attn).ungated.forward(
            block.self_attn,
            hidden_states=h,
            position_embeddings=model.model.rotary_emb(h, positions),
            attention_mask=seen,
        )[0]


@pytest.mark.parametrize("cheap", [False, True])
def test_closed_gates_get_a_gradient_by_default_and_none_in_the_papers_mode(cheap: bool) -> None:
    model = routed(cheap_train=cheap, tau=0.6)  # untrained routers say 0.5
    with routing_context(train=True) as seen:
        loss = model(input_ids=ids(4, 8), use_cache=False).logits.square().mean()
    assert float(seen.capacity.detach()) == 0.0
    found = gradients(model, loss)
    assert [float(g.abs().sum()) > 0 for g in found.values()] == [not cheap] * len(LAYERS)


@pytest.mark.parametrize("unit", ["attention", "block", "mlp"])
def test_skipping_rows_in_training_computes_what_masking_them_does(unit: Any) -> None:
    x, mask = left_padded([6, 4, 5, 6])
    results = []
    for cheap in (False, True):
        model = randomise(routed(unit=unit, cheap_train=cheap))
        with routing_context(train=True) as seen:
            logits = model(input_ids=x, attention_mask=mask, use_cache=False).logits
        found = gradients(model, logits[mask.bool()].square().mean())
        results.append((logits[mask.bool()].detach(), found, {i: g.detach() for i, g in seen.gates.items()}))
    assert 0 < float(torch.stack(list(results[0][2].values())).mean()) < 1
    torch.testing.assert_close(results[0][0], results[1][0], atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        plain = model(input_ids=x, attention_mask=mask, use_cache=False).logits
    torch.testing.assert_close(plain[mask.bool()], results[0][0], atol=1e-4, rtol=1e-4)


def test_checkpointed_blocks_give_the_same_gradient() -> None:
    x = ids(3, 8)
    found = []
    for checkpointed in (False, True):
        model = randomise(routed(), scale=0.3)
        if checkpointed:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
        with routing_context(train=True) as seen:
            loss = model(input_ids=x, use_cache=False).logits.square().mean() + seen.capacity
            found.append(gradients(model, loss))
    for layer in LAYERS:
        torch.testing.assert_close(found[0][layer], found[1][layer], atol=1e-6, rtol=1e-4)


def kept_bytes(model: Any, x: torch.Tensor, train: bool) -> int:
    """Bytes of the activations that a forward pass keeps for its backward pass."""
    weights = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        inputs = model.get_input_embeddings()(x).detach().requires_grad_(not train)
        with routing_context(train=True) if train else routing_context(off=True):
            loss = model(inputs_embeds=inputs, use_cache=False).logits.square().mean()
    assert loss.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize("name", ["llama", "gpt_neox"])
def test_training_keeps_no_more_than_the_activations_of_the_base(name: str) -> None:
    x, model = ids(4, 48), attach(build(name), layers=(1, 2))
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    base = kept_bytes(model, x, train=False)
    for router in routers(model).values():
        router.weight.requires_grad_(True)
    assert 0 < kept_bytes(model, x, train=True) <= 1.1 * base


def test_the_penalty_is_lambda_times_what_is_used_and_pushes_down() -> None:
    model = randomise(routed())
    with routing_context(train=True) as seen:
        model(input_ids=ids(5, 6), use_cache=False)
    loss = paper_penalty(seen, 0.25)
    want = 0.25 * sum(float(gate.detach().mean()) for gate in seen.gates.values())
    assert float(loss.detach()) == pytest.approx(want)
    (slope,) = torch.autograd.grad(loss, seen.probabilities[2])  # what an earlier gate does changes the later one
    torch.testing.assert_close(slope, torch.full((5,), 0.25 / 5))


def test_the_multiplier_pushes_both_ways_until_the_target_is_met() -> None:
    for start, sign in ((1.0, 1), (0.0, -1)):
        used = torch.tensor(start, requires_grad=True)
        (slope,) = torch.autograd.grad(Multiplier(0.5).penalty(used), used)
        assert float(slope) * sign > 0
    dual, used = Multiplier(0.4, rate=0.5), 1.0
    for _ in range(300):  # a plant that gives way to the price, as a task loss with slope 1 would
        used = min(1.0, max(0.0, 1.0 - 0.5 * (dual.nu + dual.rho * (used - 0.4))))
        dual.step(used)
    assert used == pytest.approx(0.4, abs=0.01)


@pytest.mark.parametrize("distill", [0.0, 0.3, 1.0])
def test_losses_are_the_hand_computed_ones(distill: float) -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(2, 6, 9, generator=generator) for _ in range(2))
    labels = torch.tensor([[-100, -100, 3, 4, 5, -100], [-100, 1, 2, -100, -100, -100]])
    found = token_losses(student, labels, teacher, distill)
    q, p = student.double().softmax(-1), teacher.double().softmax(-1)
    for row in range(2):
        total, count = 0.0, 0
        for t in range(5):
            if labels[row, t + 1] == -100:
                continue
            kl = float((p[row, t] * (p[row, t].log() - q[row, t].log())).sum())
            total += (1 - distill) * -float(q[row, t, labels[row, t + 1]].log()) + distill * kl
            count += 1
        assert float(found[row]) == pytest.approx(total / count, rel=1e-5)
