"""How good a model is on encoded examples."""

from fedkseed.evaluation.loss import EvalLoss, evaluate_loss, mean_loss, response_loss

__all__ = ["EvalLoss", "evaluate_loss", "mean_loss", "response_loss"]
