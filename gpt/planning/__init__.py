"""What `python -m gpt.plan` is made of: compile, read the program, estimate, search, show."""
