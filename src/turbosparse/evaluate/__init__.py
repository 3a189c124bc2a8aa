"""How good a model is: perplexity, and the distance between two ways to run it."""
