"""The steps of the demo, one a file, in the order in which they are taken."""
