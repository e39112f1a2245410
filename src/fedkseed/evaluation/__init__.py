"""How good a model is: token-weighted loss, and answers by greedy generation."""

from fedkseed.evaluation.generation import exact_match, generate
from fedkseed.evaluation.loss import EvalLoss, evaluate_loss, guess_loss, mean_loss, response_loss
from fedkseed.evaluation.rouge import rouge_l, rouge_l_published
from fedkseed.evaluation.scores import AllScores, Scores, score

__all__ = [
    "AllScores",
    "EvalLoss",
    "Scores",
    "evaluate_loss",
    "exact_match",
    "generate",
    "guess_loss",
    "mean_loss",
    "response_loss",
    "rouge_l",
    "rouge_l_published",
    "score",
]
