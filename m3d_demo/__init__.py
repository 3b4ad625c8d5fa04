"""What the demonstration needs and the engine does not: sample scans and base models that ride in PyPI packages."""
