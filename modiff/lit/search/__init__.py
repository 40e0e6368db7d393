"""The search for the cheapest setting that keeps a quality: space, measurements, study, frontier."""
