"""What `experiments.benchmark` is made of: contestants, how they are held to laws, timed, and told about."""
