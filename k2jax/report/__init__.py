"""HTML pages about runs: each reads run folders only, and is one file that needs nothing else."""
