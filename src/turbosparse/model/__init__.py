"""What a model is: configuration, families, GGUF files, quantisation, tokenizer. Never imports torch."""
