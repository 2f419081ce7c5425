"""What every other part stands on: files, processes, devices, output."""
