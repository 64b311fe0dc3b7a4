"""What probgen's loops cost over hand-written PyTorch: `python -m benchmarks.training`, `python -m benchmarks.sampling`."""
