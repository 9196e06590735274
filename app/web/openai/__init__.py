"""OpenAI's dialect: the same service in the words that OpenAI's clients speak.  Translation only."""
