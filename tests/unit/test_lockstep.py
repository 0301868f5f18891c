"""All batches through a model layer by layer: the same numbers as the model's own forward pass, and a clean end."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moe_compress.models.layers import decoder_layers
from moe_compress.models.lockstep import Enough, Lockstep
from tests.tiny_checkpoint import VOCABULARY, tiny_model

LAYERS = 3


@pytest.fixture(params=["qwen3_moe", "olmoe"])
def model(request: pytest.FixtureRequest) -> Any:
    return tiny_model(request.param, num_hidden_layers=LAYERS)


@pytest.fixture
def batches() -> list[Tensor]:
    """Batches of different shapes."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(VOCABULARY, shape, generator=generator) for shape in ((1, 12), (3, 7), (2, 12))]


def layers_of(model: Any) -> nn.ModuleList:
    return decoder_layers(model)[1]


def own_forward(model: Any, batches: list[Tensor]) -> Iterator[tuple[Tensor, tuple[Tensor, ...]]]:
    """Logits and the input of every layer, from the model itself."""
    with torch.no_grad():
        for batch in batches:
            output = model(input_ids=batch, use_cache=False, output_hidden_states=True)
            yield output.logits, output.hidden_states


def test_same_numbers_as_the_models_own_forward(model: Any, batches: list[Tensor]) -> None:
    expected = list(own_forward(model, batches))
    run = Lockstep(model, layers_of(model), batches)
    for index in range(LAYERS):
        hidden = run.through(index)
        if index < LAYERS - 1:  # the model gives its last hidden states after the final norm only
            assert all(torch.equal(one, states[index + 1]) for one, (_, states) in zip(hidden, expected, strict=True))
    logits = run.finish()
    assert all(torch.equal(one, own) for one, (own, _) in zip(logits, expected, strict=True))


def test_a_layer_is_needed_only_at_its_turn(model: Any, batches: list[Tensor]) -> None:
    expected = [logits for logits, _ in own_forward(model, batches)]
    kept = [{name: tensor.clone() for name, tensor in layer.state_dict().items()} for layer in layers_of(model)]

    def spoil(layer: nn.Module) -> None:
        for parameter in layer.parameters():
            parameter.data.fill_(float("nan"))

    for layer in layers_of(model):
        spoil(layer)
    run = Lockstep(model, layers_of(model), batches)
    for index, layer in enumerate(layers_of(model)):
        layer.load_state_dict(kept[index])
        run.through(index)
        spoil(layer)
    assert all(torch.equal(one, own) for one, own in zip(run.finish(), expected, strict=True))


@pytest.mark.parametrize("start", range(LAYERS + 1))
def test_continued_from_any_layer(start: int, model: Any, batches: list[Tensor]) -> None:
    expected = [logits for logits, _ in own_forward(model, batches)]
    first = Lockstep(model, layers_of(model), batches)
    for index in range(start):
        first.through(index)
    hidden = [states.clone() for states in first.hidden] if start else []
    first.close()
    for layer in layers_of(model)[:start]:
        for parameter in layer.parameters():
            parameter.data.fill_(float("nan"))
    run = Lockstep(model, layers_of(model), batches, start=start, hidden=hidden)
    for index in range(start, LAYERS):
        run.through(index)
    assert all(torch.equal(one, own) for one, own in zip(run.finish(), expected, strict=True))


def test_observer_sees_every_batch_enter_and_leave(model: Any, batches: list[Tensor]) -> None:
    expected = [states for _, states in own_forward(model, batches)]
    seen: list[tuple[Tensor, Tensor]] = []

    class Watcher:
        def layer(self, input_BSH: Tensor, output_BSH: Tensor) -> None:
            seen.append((input_BSH, output_BSH))

    run = Lockstep(model, layers_of(model), batches)
    run.through(0)
    run.observer = Watcher()
    run.through(1)
    run.observer = None
    run.through(2)
    run.close()
    assert len(seen) == len(batches)
    for (entering, leaving), states in zip(seen, expected, strict=True):
        assert torch.equal(entering, states[1]) and torch.equal(leaving, states[2])


def test_layers_are_passed_in_order(model: Any, batches: list[Tensor]) -> None:
    run = Lockstep(model, layers_of(model), batches)
    with pytest.raises(AssertionError):
        run.through(1)
    run.close()


@pytest.mark.parametrize("waiting", [(), (0, 2), (0, 1, 2)])
def test_a_layer_is_changed_in_the_middle_of_its_pass(
    waiting: tuple[int, ...], model: Any, batches: list[Tensor]
) -> None:
    """Batches that waited inside it, and others that start anew, leave it as if it had been so from the start."""
    run = Lockstep(model, layers_of(model), batches)
    run.through(0)
    layer: Any = layers_of(model)[1]
    before, place = layer.self_attn.q_proj, layer.mlp
    calls: list[int] = []
    stops: list[int] = []
    stopping = True

    def stop(module: nn.Module, inputs: Any) -> None:
        while stopping:
            stops.append(run.batch)
            if run.batch not in waiting:
                raise Enough
            run.hold()

    hooks = [before.register_forward_hook(lambda *arguments: calls.append(run.batch))]
    hooks.append(place.register_forward_pre_hook(stop))
    run.rehearse(1, 1)
    run.rehearse(1)
    assert stops == [0, 0, 1, 2], "only the first batch was rehearsed twice"
    layer.mlp.experts.down_proj.data.mul_(2)
    stopping = False
    run.through(1)
    for hook in hooks:
        hook.remove()
    again = [0] if 0 not in waiting else []
    assert sorted(calls) == sorted([0, 1, 2, *again, *(batch for batch in range(3) if batch not in waiting)])
    run.through(2)
    logits = run.finish()
    expected = [own for own, _ in own_forward(model, batches)]
    assert all(torch.equal(one, own) for one, own in zip(logits, expected, strict=True))


def test_a_rehearsal_to_the_end_is_forgotten(model: Any, batches: list[Tensor]) -> None:
    expected = [own for own, _ in own_forward(model, batches)]
    weight = layers_of(model)[0].mlp.experts.down_proj
    run = Lockstep(model, layers_of(model), batches)
    weight.data.mul_(2)
    run.rehearse(0)
    weight.data.div_(2)
    for index in range(LAYERS):
        run.through(index)
    assert all(torch.equal(one, own) for one, own in zip(run.finish(), expected, strict=True))


def test_batches_that_nobody_needs_end_before_the_last_layer(model: Any, batches: list[Tensor]) -> None:
    expected = [own for own, _ in own_forward(model, batches)]
    run = Lockstep(model, layers_of(model), batches)
    run.through(0)
    run.through(1)
    assert len(run.through(2, 1)) == 1
    hidden = [states.clone() for states in run.hidden]
    (logits,) = run.finish()
    assert torch.equal(logits, expected[0])
    (logits,) = Lockstep(model, layers_of(model), batches[:1], start=LAYERS, hidden=hidden).finish()
    assert torch.equal(logits, expected[0])


@pytest.mark.parametrize("passed", [0, 1, LAYERS])
def test_closing_gives_the_model_back(passed: int, model: Any, batches: list[Tensor]) -> None:
    expected = [logits for logits, _ in own_forward(model, batches)]
    run = Lockstep(model, layers_of(model), batches)
    for index in range(passed):
        run.through(index)
    run.close()
    run.close()
    again = [logits for logits, _ in own_forward(model, batches)]
    assert all(torch.equal(one, own) for one, own in zip(again, expected, strict=True))


def test_an_error_inside_a_layer_arrives_as_itself(
    model: Any, batches: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = [logits for logits, _ in own_forward(model, batches)]
    run = Lockstep(model, layers_of(model), batches)
    run.through(0)
    norm = layers_of(model)[1].input_layernorm
    with monkeypatch.context() as patch:
        patch.setattr(norm, "forward", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run.through(1)
    run.close()
    again = [logits for logits, _ in own_forward(model, batches)]
    assert all(torch.equal(one, own) for one, own in zip(again, expected, strict=True))


def test_nothing_is_differentiated(model: Any, batches: list[Tensor]) -> None:
    run = Lockstep(model, layers_of(model), batches)
    for index in range(LAYERS):
        assert not any(states.requires_grad for states in run.through(index))
    assert not any(logits.requires_grad for logits in run.finish())


@pytest.mark.parametrize("layer", range(LAYERS))
def test_forked_before_any_layer(layer: int, model: Any, batches: list[Tensor]) -> None:
    """A fork is the same pass, unless something tells them apart from there on."""
    expected = [logits for logits, _ in own_forward(model, batches)]
    run = Lockstep(model, layers_of(model), batches)
    numbers: list[int] = []
    for index in range(LAYERS):
        if index == layer:
            numbers = [run.fork(batch) for batch in range(len(batches))]
        run.through(index)
    found = [logits.clone() for logits in run.finish_each()]
    assert numbers == [3, 4, 5] and len(found) == 6
    for batch, own in enumerate(expected):
        assert torch.equal(found[batch], own) and torch.equal(found[numbers[batch]], own)


def test_a_fork_can_be_told_apart(model: Any, batches: list[Tensor]) -> None:
    """Only the forks run without the last layer's MLP, as the module itself sees by the number of the pass."""
    run = Lockstep(model, layers_of(model), batches)
    forks = {run.fork(batch): batch for batch in range(len(batches))}
    mlp = layers_of(model)[-1].mlp
    handle = mlp.register_forward_hook(
        lambda module, inputs, output: torch.zeros_like(output) if run.batch in forks else output
    )
    for index in range(LAYERS):
        run.through(index)
    found = list(run.finish_each())
    handle.remove()
    whole = [logits for logits, _ in own_forward(model, batches)]
    handle = mlp.register_forward_hook(lambda module, inputs, output: torch.zeros_like(output))
    without = [logits for logits, _ in own_forward(model, batches)]
    handle.remove()
    for number, batch in forks.items():
        assert torch.equal(found[batch], whole[batch]) and torch.equal(found[number], without[batch])
        assert not torch.equal(whole[batch], without[batch])
