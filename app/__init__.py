"""An OpenAI-style backend for your own Hugging Face models."""

__version__ = "0.1.0"
