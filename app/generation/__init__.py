"""What is asked: the one path that every route takes."""
