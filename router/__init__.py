"""The router: admits requests, places them on a pair of nodes, streams answers. No torch here."""
