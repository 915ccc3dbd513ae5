"""A run as a SLURM job: what is sent, and what becomes of it when it ends."""
