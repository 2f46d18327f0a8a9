"""How the bundled checkpoint is made: corpus, tokenizer, training and evaluation."""
