"""What a job costs before it runs: memory, traffic, time, and decoding, by stated formulas."""
