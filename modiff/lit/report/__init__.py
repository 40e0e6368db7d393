"""Tables, plots and pages of what a run found."""
