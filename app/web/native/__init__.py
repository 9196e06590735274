"""The native dialect: /v1/generate, /v1/chat and /v1/sessions."""
