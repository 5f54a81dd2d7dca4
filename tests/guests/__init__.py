"""Stock kernels as guests: the packages they come from, the machines they boot in, what runs there."""
