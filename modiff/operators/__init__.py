"""One linear operator."""
