"""Train what guesses which neurons will fire: predictors for the engine's predicted mode."""

from turbosparse.predict.train import Report, train_predictors
from turbosparse.predict.wish import Wish

__all__ = ["Report", "Wish", "train_predictors"]
