"""Data sets, networks, tasks."""

import itertools

import pytest
import torch
from torch import nn

import funcprecond as fp
from funcprecond.compare import models
from funcprecond.compare.data import batches
from funcprecond.compare.tasks import TASKS

CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=TASKS)
def loaded(request):
    task = TASKS[request.param]
    return task, task.load(CPU)


def test_splits_do_not_share_an_example(loaded):
    task, data = loaded
    if task.metric == "accuracy":
        rows = [
            {tuple(x.flatten().tolist()) for x in split.inputs}
            for split in (data.train, data.validation, data.test)
        ]
        assert not rows[0] & rows[1]
        assert not rows[0] & rows[2]
        assert not rows[1] & rows[2]
        assert sum(map(len, rows)) == 1797
    else:
        # Contiguous parts of one text: the last target of a part comes before the next part.
        ends = [split.targets[-1] for split in (data.train, data.validation)]
        assert not torch.equal(ends[0], data.validation.inputs[0])
        assert not torch.equal(ends[1], data.test.inputs[0])


def test_model_and_loss_fit_the_data(loaded):
    task, data = loaded
    problem = fp.problem(task.model(data, 0, CPU), fp.losses.cross_entropy)
    inputs, targets = next(batches(data.train, 4, torch.Generator().manual_seed(0)))
    evidence = fp.observe(problem, problem.params, (inputs, targets))
    assert evidence.outputs.shape == (*targets.shape, data.classes)
    guessing = torch.tensor(float(data.classes)).log()
    assert 0.7 * guessing < evidence.loss < 1.5 * guessing
    assert all(gradient.abs().sum() > 0 for gradient in evidence.grads.values())


def test_weights_depend_on_the_seed_alone(loaded):
    task, data = loaded
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = task.model(data, 0, CPU).state_dict()
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(2)
    again, other = task.model(data, 0, CPU).state_dict(), task.model(data, 1, CPU).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_description_states_name_and_sizes(loaded):
    _, data = loaded
    assert "training" in data.description
    assert any(character.isdigit() for character in data.description)


def test_language_model_predicts_the_next_character_and_does_not_look_ahead():
    task = TASKS["char-lm"]
    data = task.load(CPU)
    assert torch.equal(data.train.inputs[1:65, 0], data.train.targets[0])
    model = task.model(data, 0, CPU)
    tokens = data.train.inputs[:2].clone()
    changed = tokens.clone()
    changed[:, 40] = (changed[:, 40] + 1) % data.classes
    with torch.no_grad():
        difference = (model(tokens) - model(changed)).abs().amax((0, 2))
    assert torch.all(difference[:40] == 0)
    assert difference[40] > 0


def test_batches_reshuffle_and_leave_out_the_rest(digits):
    size = 500
    stream = batches(digits.train, size, torch.Generator().manual_seed(3))
    taken = [inputs for inputs, _ in itertools.islice(stream, 4)]
    assert all(len(inputs) == size for inputs in taken)
    assert not torch.equal(taken[0], taken[2])
    again = batches(digits.train, size, torch.Generator().manual_seed(3))
    assert torch.equal(next(again)[0], taken[0])


def test_batch_larger_than_the_split_is_a_sentence(digits):
    with pytest.raises(ValueError, match=r"1257 examples; choose --batch-sizes of at most 1257"):
        next(batches(digits.train, 5000, torch.Generator()))


def test_unknown_layer_is_a_sentence():
    with pytest.raises(TypeError, match="does not know the layer GRU"):
        models.build(lambda: nn.GRU(3, 4), 0, CPU)
