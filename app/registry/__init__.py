"""Models of an MLflow registry: which version a name means, and its files in a private folder."""
