"""The model's own tokenizer in the API process."""
