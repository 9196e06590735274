"""The worker: the child process that loads one model and generates tokens.  The API process imports nothing of it."""
