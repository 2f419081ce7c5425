"""The parts of `python -m gpt.plan`: compile the step, read the program, estimate its time, search, report."""
