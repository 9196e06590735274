"""LangChain's face of the engine, and the chains that the service runs."""
