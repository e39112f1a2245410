"""How good a model is: token-weighted loss, and answers by greedy generation."""

from fedkseed.evaluation.generation import NOTHING_ASKED, Decoder, exact_match, generate
from fedkseed.evaluation.loss import EvalLoss, evaluate_loss, guess_loss, mean_loss, response_log_probs, response_loss
from fedkseed.evaluation.objectives import Score, check_score, find_score, scored
from fedkseed.evaluation.rouge import rouge_l, rouge_l_published
from fedkseed.evaluation.scores import AllScores, Scores, score

__all__ = [
    "NOTHING_ASKED",
    "AllScores",
    "Decoder",
    "EvalLoss",
    "Score",
    "Scores",
    "check_score",
    "evaluate_loss",
    "exact_match",
    "find_score",
    "generate",
    "guess_loss",
    "mean_loss",
    "response_log_probs",
    "response_loss",
    "rouge_l",
    "rouge_l_published",
    "score",
    "scored",
]
