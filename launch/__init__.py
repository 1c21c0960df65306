"""The command line and the launchers: the same node entry points, started everywhere."""
