"""Every architecture of the installed mlx-lm as a tiny model, and what becomes of its layers."""
