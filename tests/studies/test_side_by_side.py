"""Classifiers that are trained side by side: each once, wherever it runs, and errors come through."""

from dataclasses import replace

import pytest
import torch

from prism_lib import devices
from prism_lib.devices import processes_for
from prism_lib.models.classifier import ClassifierConfig
from prism_lib.studies.side_by_side import Task, train

TINY = ClassifierConfig(("a", "b"), blocks=(1, 1), growth=4, features=4, batch_size=4, steps=2)


def task(seed=0, images=4):
    draw = torch.Generator().manual_seed(0)
    pixels = torch.rand(images, 1, 32, 32, generator=draw)
    labels = torch.tensor([[0.0, 1.0], [1.0, 0.0]]).repeat(images // 2, 1)
    return Task(pixels, labels, torch.arange(images) % 2, replace(TINY, seed=seed), pixels[:3])


def test_one_process_goes_in_order_and_draws_a_task_when_it_needs_it():
    drawn = []
    tasks = (drawn.append(seed) or (seed, task(seed)) for seed in range(3))
    found = train(tasks)
    assert next(found)[0] == 0 and drawn == [0]
    assert [key for key, _ in found] == [1, 2]


def test_two_processes_read_what_one_does_and_hold_few_tasks():
    before, drawn, most = torch.get_num_threads(), [], 0
    torch.set_num_threads(1)
    try:
        alone = dict(train((seed, task(seed)) for seed in range(5)))
    finally:
        torch.set_num_threads(before)
    found = {}
    for key, readings in train(((drawn.append(seed) or seed, task(seed)) for seed in range(5)), 2):
        found[key] = readings
        most = max(most, len(drawn) - len(found))
    assert set(found) == set(range(5)) and most <= 3
    assert all(torch.equal(found[seed], alone[seed]) for seed in alone)
    assert not torch.equal(found[0], found[1])


def test_what_is_wrong_in_a_process_is_said_here():
    with pytest.raises(ValueError, match="2 images are fewer than one batch of 4"):
        dict(train([(0, task(images=2)), (1, task())], 2))


def test_as_many_processes_as_suit(monkeypatch):
    monkeypatch.setattr(devices.os, "sched_getaffinity", lambda _: range(64), raising=False)
    monkeypatch.setattr(devices, "default_device", lambda: torch.device("cpu"))
    assert processes_for(0) == 4 and processes_for(9) == 9
    monkeypatch.setattr(devices, "default_device", lambda: torch.device("cuda"))
    assert processes_for(0) == 1
    with pytest.raises(ValueError, match="processes is -1"):
        processes_for(-1)
