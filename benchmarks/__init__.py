"""What probgen costs over hand-written PyTorch: `python -m benchmarks.training`, `python -m benchmarks.sampling`."""
