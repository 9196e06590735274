"""The border between the API process and a model's worker process: messages, process start, supervision."""
