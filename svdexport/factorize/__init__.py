"""factorize."""
