"""What is measured: Baton's engine, its peers, and the machine's own limits, a process each."""
