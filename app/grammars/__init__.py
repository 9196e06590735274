"""Grammars that completions must follow: what a schema, an expression or a Lark grammar means to llguidance."""
