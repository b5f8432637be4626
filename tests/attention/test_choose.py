"""The choice by a score: the best, and the first of equal ones."""

import torch

from zoo.attention._choose import first_best


def test_the_best_are_chosen_and_of_equal_ones_the_first():
    # The third and fourth differ by float32 rounding alone.
    score = torch.tensor([[0.5, 2.0, 1.0, 1.0 + 1e-7, 3.0]])
    assert first_best(score, 3)[0].tolist() == [4, 1, 2]
    assert first_best(torch.zeros(2, 9), 4).tolist() == [[0, 1, 2, 3]] * 2


def test_scores_that_differ_are_not_taken_for_equal():
    """Among 200 tokens the next score is often nearer than a thousandth."""
    score = torch.tensor([[0.50, 0.5 + 2**-14, 0.4, -3.0, -3.0 + 2**-14]])
    assert first_best(score, 5)[0].tolist() == [1, 0, 2, 4, 3]
    assert first_best(torch.tensor([1.0, 1.0 + 1e-7], dtype=torch.float64), 1).tolist() == [1]


def test_infinite_scores_are_first_and_last():
    inf = float("inf")
    score = torch.tensor([-inf, 1.0, inf, -inf, inf, 5e4])
    assert first_best(score, 6).tolist() == [2, 4, 5, 1, 0, 3]
    assert first_best(score.double() / 100, 6).tolist() == [2, 4, 5, 1, 0, 3]
