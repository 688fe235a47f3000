"""Real parts wherever they can be had; `make test` runs what takes a quarter of an hour."""
