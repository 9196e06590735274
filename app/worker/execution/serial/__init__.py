"""One request at a time through transformers' own generate."""
