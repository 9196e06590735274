"""The edge without a dialect: middleware, JSON bodies, server-sent events, errors, authentication."""
