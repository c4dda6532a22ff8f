"""What makes the numbers in README and docs; results/ holds them, each with its command, hardware and commit."""
