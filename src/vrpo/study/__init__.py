"""Methods x noise x seeds: many ordinary runs, one table, one figure."""
