"""What the API process and a model worker say to each other, and how the process is started and watched."""
