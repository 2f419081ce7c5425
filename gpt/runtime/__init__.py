"""The lowest floor: files, processes, devices and output, on which all other packages are built."""
