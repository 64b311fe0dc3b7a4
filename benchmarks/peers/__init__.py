"""Scripts that other libraries' environments run: they import PyTorch, that library and `probgen.nets` alone."""
