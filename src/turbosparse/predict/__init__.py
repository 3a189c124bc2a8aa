"""Train what guesses which neurons will fire: predictors for the engine's predicted mode."""

from turbosparse.predict.train import Report, Wish, train_predictors

__all__ = ["Report", "Wish", "train_predictors"]
