"""Share a trained model: a card made from its run, and the way to the Hugging Face hub."""
